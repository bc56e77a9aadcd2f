"""otloss.compat.pot beside the installed POT: plans, values, potentials, logs, errors; gradients
against finite differences and the oracle."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import close, clouds, rand, randn, simplex
from torch.testing import assert_close

import otloss
from otloss.compat import pot

ot = pytest.importorskip("ot")

REG = 1.0
# POT's own warning
pytestmark = pytest.mark.filterwarnings("ignore:Sinkhorn did not converge")


def problem(rng, n=6, m=5):
    """a, b, M."""
    a, b = simplex(randn(rng, n)), simplex(randn(rng, m))
    return a, b, rand(rng, n, m)


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "Sinkhorn"])
def test_sinkhorn(method, rng):
    a, b, M = problem(rng)
    expected, their_log = ot.sinkhorn(a, b, M, REG, log=True)
    plan, log = pot.sinkhorn(a, b, M, REG, method, log=True)
    close(plan, expected, 1e-6)
    assert log["err"][-1] < 1e-6
    assert set(their_log) <= set(log)
    close((log["log_u"][:, None] + log["log_v"] - M / REG).exp(), plan, 1e-9)
    close(log["u"][:, None] * log["v"] * (-M / REG).exp(), plan, 1e-9)
    close(pot.sinkhorn([], [], M, REG), ot.sinkhorn([], [], M, REG), 1e-6)
    close(pot.sinkhorn2(a, b, M, REG), ot.sinkhorn2(a, b, M, REG), 1e-6)


def test_several_histograms(rng):
    a, _, M = problem(rng)
    b = simplex(randn(rng, 3, 5)).mT
    expected, their_log = ot.sinkhorn(a, b, M, REG, log=True)
    for function in (pot.sinkhorn, pot.sinkhorn2):
        value, log = function(a, b, M, REG, log=True)
        close(value, expected, 1e-6)
        assert log["u"].shape == their_log["u"].shape
        assert log["v"].shape == their_log["v"].shape
        assert_close(function([], b, M, REG).shape, value.shape)


def test_warmstart(rng):
    a, b, M = problem(rng)
    a[0], a[1] = 0.0, a[0] + a[1]
    plan, log = pot.sinkhorn(a, b, M, 0.1, log=True, stopThr=1e-12)
    again, after = pot.sinkhorn(
        a, b, M, 0.1, log=True, warmstart=(log["log_u"], log["log_v"]), stopThr=1e-9
    )
    close(again, plan, 1e-8)
    assert after["niter"] <= 1 < log["niter"]
    _, uniform = pot.sinkhorn([], [], M, 0.1, log=True, stopThr=1e-12)
    _, after = pot.sinkhorn(
        [], [], M, 0.1, log=True, warmstart=(uniform["log_u"], uniform["log_v"])
    )
    assert after["niter"] <= 1


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
def test_empirical(metric, rng):
    c = clouds(rng, 7, 6, 3, weights="random")
    inputs = (c.x, c.y, REG, c.a, c.b, metric)
    plan = ot.bregman.empirical_sinkhorn(*inputs)
    close(pot.empirical_sinkhorn(*inputs), plan, 1e-4)
    close(pot.empirical_sinkhorn2(*inputs), ot.bregman.empirical_sinkhorn2(*inputs), 1e-4)
    got = pot.empirical_sinkhorn_divergence(*inputs)
    close(got, ot.bregman.empirical_sinkhorn_divergence(*inputs), 1e-4)


def test_what_programs_call_around_it(rng):
    """Costs, uniform weights, and the functions under the name of their module."""
    x, y = randn(rng, 6, 3), randn(rng, 5, 3)
    for metric in ("sqeuclidean", "euclidean", "cosine"):
        close(pot.dist(x, y, metric), ot.dist(x, y, metric), 1e-9)
    close(pot.dist(x), ot.dist(x), 1e-9)
    assert_close(pot.unif(6, type_as=x), ot.unif(6, type_as=x))
    assert pot.bregman.empirical_sinkhorn2 is pot.empirical_sinkhorn2


def test_empirical_lazy(rng):
    c = clouds(rng, 7, 6, 3, weights="random")
    inputs = (c.x, c.y, REG, c.a, c.b)
    u, v = pot.empirical_sinkhorn(*inputs, isLazy=True)
    plan = (u[:, None] + v - otloss.cost_matrix(c.x, c.y) / REG).exp()
    close(plan, ot.bregman.empirical_sinkhorn(*inputs), 1e-4)
    *_, log = pot.empirical_sinkhorn(*inputs, isLazy=True, log=True)
    assert_close((log["u"], log["v"]), (u, v))
    close(
        pot.empirical_sinkhorn2(*inputs, isLazy=True),
        ot.bregman.empirical_sinkhorn2(*inputs, isLazy=True),
        1e-4,
    )


def test_divergence_log(rng):
    c = clouds(rng, 7, 6, 3)
    inputs = (c.x, c.y, REG)
    value, log = pot.empirical_sinkhorn_divergence(*inputs, log=True)
    expected, their_log = ot.bregman.empirical_sinkhorn_divergence(*inputs, log=True)
    close(value, expected, 1e-4)
    assert set(log) == set(their_log)
    for name in ("sinkhorn_loss_ab", "sinkhorn_loss_a", "sinkhorn_loss_b"):
        close(log[name], their_log[name], 1e-4)


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
def test_solve(reg_type, rng):
    a, b, M = problem(rng)
    got, expected = (f.solve(M, a, b, REG, reg_type=reg_type) for f in (pot, ot))
    for name in ("value", "value_linear", "plan", "marginal_a", "marginal_b"):
        close(getattr(got, name), getattr(expected, name), 1e-4)
    u, v = got.potentials
    close((u[:, None] + v - M / REG).exp(), got.plan, 1e-9)
    assert_close(got.potential_a, u)
    assert got.status == "Converged"
    assert got.log["n_iter"] >= 1
    close(
        pot.solve(M, reg=REG, reg_type=reg_type).value,
        ot.solve(M, reg=REG, reg_type=reg_type).value,
        1e-4,
    )


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
@pytest.mark.parametrize("grad", ["autodiff", "envelope"])
def test_solve_gradients(grad, reg_type, rng):
    """Finite differences of the value, along weights of one total; POT's with "envelope" is wrong
    in unequal weights."""
    a, b, M = (t.requires_grad_() for t in problem(rng, 4, 3))

    def value(u, v, M):
        return pot.solve(
            M, simplex(u), simplex(v), REG, reg_type=reg_type, tol=1e-12, grad=grad
        ).value

    assert torch.autograd.gradcheck(value, (a, b, M), atol=1e-6)
    assert not pot.solve(M, a, b, REG, grad="detach").value.requires_grad


@pytest.mark.parametrize("unbalanced", [0.7, (0.7,), (0.7, 0.3), (float("inf"), 0.5)])
def test_solve_unbalanced(unbalanced, rng):
    """Plans; the value is the minimum, which POT's is not."""
    a, b, M = problem(rng)
    b = 1.5 * b
    got, expected = (f.solve(M, a, b, REG, unbalanced=unbalanced, max_iter=5000) for f in (pot, ot))
    close(got.plan, expected.plan, 1e-4)
    u, v = got.potentials
    close(a[:, None] * b * (u[:, None] + v - M / REG).exp(), got.plan, 1e-4)
    pair = unbalanced if isinstance(unbalanced, tuple) else (unbalanced,)
    rho = [None if r == float("inf") else r for r in (pair * 2)[:2]]
    P = got.plan

    def kl(p, q):
        return (torch.xlogy(p, p / q) - p + q).sum()

    minimum = (P * M).sum() + REG * kl(P, a[:, None] * b)
    for r, p, w in zip(rho, (P.sum(1), P.sum(0)), (a, b), strict=True):
        minimum = minimum + (0 if r is None else r * kl(p, w))
    close(got.value, minimum, 1e-4)


@pytest.mark.parametrize("lazy", [False, True])
def test_solve_sample(lazy, rng):
    c = clouds(rng, 7, 6, 3, weights="random")
    for metric in ("sqeuclidean", "euclidean"):
        got = pot.solve_sample(c.x, c.y, c.a, c.b, metric, REG, lazy=lazy)
        expected = ot.solve_sample(c.x, c.y, c.a, c.b, metric, REG)
        for name in ("value", "value_linear", "plan"):
            close(getattr(got, name), getattr(expected, name), 1e-4)


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
def test_solve_sample_debiased(reg_type, rng):
    c = clouds(rng, 7, 6, 3, weights="random")
    options = {"reg": REG, "reg_type": reg_type, "debias": True}
    got, expected = (f.solve_sample(c.x, c.y, c.a, c.b, **options) for f in (pot, ot))
    for name in ("value", "value_linear", "plan"):
        close(getattr(got, name), getattr(expected, name), 1e-4)


@pytest.mark.parametrize("options", [{}, {"reg_type": "kl"}, {"method": "log_sinkhorn"}])
def test_solve_batch(options, rng):
    a, b, M = simplex(randn(rng, 3, 6)), simplex(randn(rng, 3, 5)), rand(rng, 3, 6, 5)
    got, expected = (
        f(M, REG, a, b, tol=1e-9, **options) for f in (pot.solve_batch, ot.solve_batch)
    )
    for name in ("value", "value_linear", "plan"):
        close(getattr(got, name), getattr(expected, name), 1e-4)


def test_float32_and_warnings(rng):
    """POT's default of 1e-9 is out of float32's reach, and no reason to warn."""
    a, b, M = (t.float() for t in problem(rng))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = pot.sinkhorn(a, b, M, REG)
        pot.sinkhorn2(a, b, 20 * M, 1e-3, numItermax=1)
    close(plan, ot.sinkhorn(a.double(), b.double(), M.double(), REG), 1e-4)
    with pytest.warns(otloss.ConvergenceWarning):
        pot.sinkhorn(a, b, 20 * M, 1e-3, numItermax=1)


A, B, M = torch.full((4,), 0.25), torch.full((5,), 0.2), torch.ones(4, 5)
X, Y = torch.zeros(4, 2), torch.ones(5, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pot.sinkhorn(A, B, M, 1.0, "screenkhorn"), ValueError, "method must be one of"),
        (lambda: pot.sinkhorn(A, B, M, 1.0, stopthr=1), TypeError, "unexpected argument stopthr"),
        (lambda: pot.sinkhorn(A.numpy(), B, M, 1.0), TypeError, "must be a torch.Tensor"),
        (lambda: pot.sinkhorn(A, B, M, 0.0), ValueError, "eps must be finite and > 0"),
        (lambda: pot.sinkhorn(A, 2 * B, M, 1.0), ValueError, "same total mass"),
        (
            lambda: pot.empirical_sinkhorn(X, Y, 1.0, metric="cityblock"),
            NotImplementedError,
            "metric",
        ),
        (
            lambda: pot.empirical_sinkhorn_divergence(X, Y, 1.0, warmstart=(A, B)),
            NotImplementedError,
            "warmstart",
        ),
        (lambda: pot.solve(M), NotImplementedError, "reg=None"),
        (lambda: pot.solve(M, reg=1.0, reg_type="L2"), NotImplementedError, "reg_type='L2'"),
        (lambda: pot.solve(M, reg=1.0, c=M), NotImplementedError, "c="),
        (lambda: pot.solve(M, reg=1.0, plan_init=M), NotImplementedError, "plan_init="),
        (lambda: pot.solve(M, reg=1.0, method="mm"), NotImplementedError, "method='mm'"),
        (lambda: pot.solve(M, reg=1.0, grad="none"), ValueError, "grad must be one of"),
        (
            lambda: pot.solve(M, reg=1.0, unbalanced=1.0, unbalanced_type="TV"),
            NotImplementedError,
            "unbalanced_type='TV'",
        ),
        (
            lambda: pot.solve(M, reg=1.0, unbalanced=1.0, reg_type="entropy"),
            NotImplementedError,
            "entropy",
        ),
        (lambda: pot.solve_sample(X, Y, method="sliced", reg=1.0), NotImplementedError, "sliced_"),
        (lambda: pot.solve_sample(X, Y, debias="split", reg=1.0), NotImplementedError, "split"),
        (lambda: pot.solve_batch(M[None], 1.0, method="proximal"), NotImplementedError, "proximal"),
        (lambda: pot.emd, AttributeError, r"ot\.emd has no counterpart"),
        (lambda: pot.dist(X, Y, "cityblock"), NotImplementedError, "metric='cityblock'"),
        (lambda: pot.solve(M, reg=1.0).lazy_plan, NotImplementedError, "lazy_plan"),
    ],
)
def test_what_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()
