"""Closed forms and limits: Gaussians, single points, exact transport, energy distance."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from backends import BACKENDS
from helpers import (
    COSTS,
    DTYPES,
    METHODS,
    Clouds,
    clouds,
    make_weights,
    name,
    randn,
    some_of,
    unequal,
)
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor
from torch.testing import assert_close

import otloss
from otloss.costs import NAMED

TIGHT = {"tol": 1e-10, "max_iters": 20_000}


def quadrature(spacing: float, reach: float, d: int) -> tuple[Tensor, Tensor]:
    """A grid (n, d) and weights (n,) that stand for a standard Gaussian. The trapezoidal rule is
    exact to rounding for smooth functions that are wider than the spacing, so there is no sampling
    error; the weights fall to exp(-reach^2 d / 2)."""
    z = torch.arange(-reach, reach + spacing / 2, spacing, dtype=torch.float64)
    points = torch.cartesian_prod(*[z] * d).reshape(-1, d)
    weights = (-points.square().sum(-1) / 2).exp()
    return points, weights / weights.sum()


@some_of("method, eps", METHODS, [0.5, 2.0, 20.0], quick=1)
def test_gaussians_on_a_line(method, eps):
    """Janati et al. 2020, value and gradient in mean and scale of one Gaussian, to 8 digits. The
    weights of the grid go down to 1e-16."""
    z, w = quadrature(0.15, 8.4, 1)
    mean = torch.tensor([0.7]).double().requires_grad_()
    scale = torch.tensor([[1.3]]).double().requires_grad_()
    first, second = (mean, scale**2), (torch.zeros(1).double(), torch.ones(1, 1).double())
    across, *own = (
        oracle.gaussian_ot(*u, *v, eps)
        for u, v in ((first, second), (first, first), (second, second))
    )
    c, options = Clouds(z * scale + mean, z, w, w), {"method": method, **TIGHT}
    loss, exact = c.loss(eps, **options), across - sum(own) / 2
    assert_close(loss, exact, rtol=1e-8, atol=1e-10)
    grads = [torch.autograd.grad(t, (mean, scale), retain_graph=True) for t in (loss, exact)]
    assert_close(*grads, rtol=1e-6, atol=1e-8)
    result = c.solve(eps, **options)
    assert_close(result.value, across, rtol=1e-8, atol=1e-10)
    # the potential that solvers start from is then the solution, up to a constant
    found = result.potentials[1] - NAMED[0].gaussian_potential(c.x, c.y, w, w, eps)
    assert float(((found - w @ found).abs() * (w > 1e-9)).max().detach()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gaussians_in_the_plane(dtype, rng):
    """Covariances that do not commute."""
    z, w = quadrature(0.5, 6.0, 2)
    eps = 2.0
    A, B = (0.5 * torch.eye(2).double() + 0.4 * randn(rng, 2, 2) for _ in range(2))
    shift = randn(rng, 2)
    exact = oracle.gaussian_ot(shift, A @ A.T, torch.zeros(2).double(), B @ B.T, eps)
    x, y, w = (t.to(dtype) for t in (z @ A.T + shift, z @ B.T, w))
    tol = 1e-9 if dtype == torch.float64 else 1e-5
    loss = otloss.sinkhorn_loss(x, y, eps, a=w, b=w, tol=tol)
    assert_close(loss.double(), exact, rtol=max(1e-7, 10 * tol), atol=10 * tol)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cost", COSTS)
def test_one_point(cost, method, rng):
    """n = 1: the plan is the product, OT is the mean cost, f + g = C."""
    x, y = randn(rng, 1, 3).requires_grad_(), randn(rng, 6, 3)
    b = make_weights(rng, (6,), "random")
    a = torch.ones(1, dtype=torch.float64)
    C = oracle.cost(x, y, cost)
    truth = (b * C[0]).sum()
    options = {"cost": cost, "method": method}
    for u, v, p, q in ((x, y, a, b), (y, x, b, a)):
        loss = Clouds(u, v, p, q).loss(0.1, debiased=False, **options)
        assert_close(loss, truth)
        assert_close(*(torch.autograd.grad(t, x, retain_graph=True) for t in (loss, truth)))
    result = Clouds(x, y, a, b).solve(0.1, **options)
    assert_close(result.potentials[0] + result.potentials[1], C[0].detach())
    both = otloss.sinkhorn_divergence(x, y[:1], 0.1, **options)
    assert_close(both, C[0, 0])


@some_of("method, cost", METHODS, COSTS, quick=1)
def test_small_eps_is_exact_transport(method, cost, rng):
    """OT <= OT_eps <= OT + eps log n: against the Hungarian algorithm."""
    x, y = randn(rng, 12, 2), randn(rng, 12, 2)
    C = oracle.cost(x, y, cost)
    exact = float(C[linear_sum_assignment(C.numpy())].sum()) / 12
    eps = 0.01 * float(C.mean())
    options = {"cost": cost, "tol": 1e-4, "max_iters": 100_000, "method": method}
    loss = otloss.sinkhorn_loss(x, y, eps, **options).item()
    slack = 1e-4 * float(C.max())  # the marginals are off by tol
    assert exact - slack <= loss <= exact + eps * np.log(12) + slack
    linear = otloss.sinkhorn_loss(x, y, eps, objective="transport", **options).item()
    assert exact - slack <= linear <= loss + slack


def test_small_eps_with_weights(rng):
    """The same against linear programming."""
    n, m = 7, 9
    c = clouds(rng, n, m, 2, weights="random")
    C = oracle.cost(c.x, c.y, "euclidean")
    rows = np.kron(np.eye(n), np.ones(m))
    columns = np.tile(np.eye(m), n)
    marginals = np.concatenate([c.a.numpy(), c.b.numpy()])
    exact = linprog(C.flatten().numpy(), A_eq=np.vstack([rows, columns]), b_eq=marginals).fun
    for eps in (0.1, 0.01):
        result = otloss.solve(C, eps, a=c.a, b=c.b, tol=1e-7, max_iters=50_000)
        entropy = -float((c.a * c.a.log()).sum())  # KL(P | a b) <= H(a)
        assert exact - 1e-6 <= float(result.value) <= exact + eps * entropy + 1e-6
        assert exact - 1e-6 <= float(result.value_linear) <= float(result.value) + 1e-6


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("method", ["dense", "streamed"])
def test_energy_distance_of_close_clouds(cost, method, rng):
    """Its terms cancel: their rounding is a small part of a float32's."""
    errors = []
    for _ in range(8):
        x = randn(rng, 300, 5, dtype=torch.float32)
        x, y = x + 2, x + 2 + 1e-3 * randn(rng, 300, 5, dtype=torch.float32)
        got = otloss.energy_distance(x, y, cost=cost, method=method)
        exact = otloss.energy_distance(x.double(), y.double(), cost=cost)
        mean = otloss.cost_matrix(x, y, cost).mean()
        errors.append(float((got.double() - exact).abs() / mean))
    assert sum(errors) / len(errors) < 1.5e-8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cost", COSTS)
def test_large_eps_is_energy_distance(cost, method, rng):
    """S - E = O(1 / eps), values and gradients: ten times the eps, a tenth of the difference."""
    c = clouds(rng, 9, 7, 3, weights="random")
    x = c.x.requires_grad_()

    def both(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, x)]

    options = {"cost": cost, "method": method}
    energy, distances = both(c.energy(**options)), []
    for eps in (1e2, 1e3, 1e4):
        loss = both(c.loss(eps, **options, **TIGHT))
        distances.append([float((u - v).norm()) for u, v in zip(loss, energy, strict=True)])
    for near, nearer in pairwise(distances):
        for one, other in zip(near, nearer, strict=True):
            assert other <= 0.15 * one + 1e-9
    assert distances[0][0] > 1e-9  # so that the ratios say something


@some_of("backend, cost, dtype", BACKENDS, COSTS, DTYPES)
def test_coincident_points(backend, cost, dtype, rng):
    """Duplicates in a cloud, and points common to both, have finite, right gradients: those of the
    same measure with the duplicates merged."""
    x, y = (randn(rng, n, 3, dtype=dtype).to(backend.device) for n in (4, 5))
    y[0] = x[0]
    tol = 1e-9 if dtype == torch.float64 else 1e-5
    options = {"cost": cost, "tol": tol, "method": backend.method}
    twice = x.repeat_interleave(2, 0).requires_grad_()
    once = x.requires_grad_()
    loss = otloss.sinkhorn_divergence(twice, y, 0.5, **options)
    truth = otloss.sinkhorn_divergence(once, y, 0.5, **options)
    assert_close(loss, truth, rtol=1e-4, atol=10 * tol)
    (grad,), (expected,) = torch.autograd.grad(loss, twice), torch.autograd.grad(truth, once)
    assert_close(grad.reshape(4, 2, 3).sum(1), expected, rtol=1e-3, atol=100 * tol)


MODES = {
    "envelope": {},
    "implicit": {"objective": "transport"},
    "plan": {"objective": "transport", "backward": "envelope"},
    "unrolled": {"n_iters": 3},
    "soft": {"unbalanced": 1.0, "objective": "transport"},
}
BAD = {"nan": math.nan, "inf": math.inf, "large": None}


@some_of("backend, cost, dtype, mode, bad", BACKENDS, COSTS[:2], DTYPES, [*MODES], [*BAD])
@pytest.mark.parametrize("name", ["sinkhorn_loss", "sinkhorn_divergence"])
def test_a_failure_that_is_not_looked_for(name, backend, cost, dtype, mode, bad, rng, monkeypatch):
    """The loss of a problem is NaN, and its gradients too, but not of points of weight 0 nor of
    the other problem. The weight of an empty bin has a gradient like any other."""
    monkeypatch.setattr("otloss._check.readable", lambda t: False)  # as in a compiled graph
    x, y = (randn(rng, 2, n, 3, dtype=dtype).to(backend.device) for n in (4, 5))
    a, b = x.new_tensor([0.5, 0.2, 0, 0.3]), y.new_tensor([0.2, 0.2, 0, 0.5, 0.1])
    x[1, 0] = BAD[bad] or torch.finfo(dtype).max ** 0.8
    inputs = [t.requires_grad_() for t in (x, y, a.repeat(2, 1), b.repeat(2, 1))]
    loss = getattr(otloss, name)(
        x, y, 0.5, a=inputs[2], b=inputs[3], cost=cost, method=backend.method, **MODES[mode]
    )
    grads = torch.autograd.grad(loss.sum(), inputs)
    assert loss.isnan().tolist() == [False, True]
    for grad, w in zip(grads, (a, b, a, b), strict=True):
        assert bool(grad[0].isfinite().all() and grad[1, w > 0].isnan().all())
        if grad.dim() == 3:
            assert not bool(grad[:, w == 0].any())
        elif mode != "plan":  # which is held constant
            assert bool(grad[0, w == 0].all())
            if bad == "large":  # else all costs of y are as those of padding
                assert bool(grad[1, w == 0].isnan().all())


@some_of("backend", BACKENDS)
def test_zero_vectors_under_cosine(backend, rng):
    """No direction: cost 1 to everything, itself included, and gradient exactly 0."""
    x, y = randn(rng, 4, 3).to(backend.device), randn(rng, 5, 3).to(backend.device)
    x[1], y[2] = 0, 0
    x.requires_grad_()
    C = otloss.cost_matrix(x, y, "cosine")
    assert bool((C[1] == 1).all())
    assert bool((C[:, 2] == 1).all())
    assert float(otloss.cost_matrix(x, x, "cosine")[1, 1].detach()) == 1
    loss = otloss.sinkhorn_divergence(x, y, 0.5, cost="cosine", method=backend.method)
    (grad,) = torch.autograd.grad(loss, x)
    assert not bool(grad[1].any())
    assert bool(grad.isfinite().all())
    truth = oracle.loss(x, y, 0.5, cost_name="cosine").value
    assert_close(loss, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unbalanced", [None, 1.0])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_divergence_of_nearly_equal_clouds_is_not_negative(method, cost, unbalanced, rng):
    """The value of a pair may be further below its optimum than the whole divergence is above 0."""
    for scale in (1e-6, 1e-3):
        c = clouds(rng, 6, 6, 3, weights="random", batch=10 if method == "reference" else 100)
        near = Clouds(c.x, (c.x + scale * randn(rng, *c.x.shape)).flip(1), c.a, c.a.flip(1))
        for dtype in DTYPES:
            options = {"cost": cost, "unbalanced": unbalanced, "method": method}
            loss = near.to(dtype).loss(0.1, **options)
            assert bool((loss >= 0).all())


@pytest.mark.parametrize("method", METHODS)
def test_a_divergence_of_rounding_is_not_negative(method, rng):
    """Between points on one ray all costs are 0, and values only what rounding makes of it."""
    for dtype in DTYPES:
        n, m = 84, 4
        x, y = (torch.rand(50, count, 1, generator=rng, dtype=dtype) + 0.1 for count in (n, m))
        b = torch.rand(50, m, generator=rng, dtype=dtype) ** 8
        b /= b.sum(-1, keepdim=True)
        for direction in (torch.ones(1, dtype=dtype), randn(rng, 3, dtype=dtype)):
            points = (x * direction, y * direction)
            loss = otloss.sinkhorn_divergence(*points, 0.003, b=b, cost="cosine", method=method)
            assert bool((loss >= 0).all()), loss.min()
            assert float(loss.max()) < 1e-6


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("d", [2, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_self_cost_has_a_zero_diagonal(dtype, d, cost, rng):
    x = randn(rng, 30, d, dtype=dtype) + 5
    C = otloss.cost_matrix(x, x, cost)
    assert not bool(C.diagonal().any())
    assert bool((C >= 0).all())
    assert_close(C, C.T)


def test_near_duplicates_under_euclidean(rng):
    """Two points 1e-5 apart pull at each other with a unit vector each; in float32 the kernels
    keep it to 6e-8 |x| / 1e-5 of the pair's weight."""
    x = randn(rng, 10, 3, dtype=torch.float32)
    x[1] = x[0] + 1e-5
    y = randn(rng, 8, 3, dtype=torch.float32)
    single, double = x.clone().requires_grad_(), x.double().requires_grad_()
    for method in METHODS:
        options = {"cost": "euclidean", "tol": 1e-6, "method": method}
        got = torch.autograd.grad(otloss.sinkhorn_divergence(single, y, 1.0, **options), single)[0]
        loss = otloss.sinkhorn_divergence(double, y.double(), 1.0, **options)
        truth = torch.autograd.grad(loss, double)[0]
        apart = float((double[1] - double[0]).norm().detach())
        pair = 2 * 0.1 * 0.1 * 4  # weights, both orders, and P / ab <= 4 at this eps
        size = float(x.norm(dim=1).max())
        allowed = 4 * 6e-8 * size / apart * pair + 1e-5
        assert float((got.double() - truth).abs().max()) <= allowed


@some_of(
    "backend, debiased, strength", BACKENDS, [True, False], [1e6, (1e7, None), (None, 1e9), 1e12]
)
def test_strong_marginals_are_constraints(backend, debiased, strength, rng):
    """With equal totals the limit is the balanced problem, to some C / rho; no digit is lost."""
    c = clouds(rng, 30, 25, 3, weights="random").to(backend.device)
    options = {"method": backend.method, **TIGHT}
    found = []
    for unbalanced in (strength, None):
        loss = c.require_grad().loss(1.0, debiased=debiased, unbalanced=unbalanced, **options)
        grads = c.grads(loss)
        # The balanced gradient of weights is defined up to a constant.
        found.append((loss.detach(), *grads[:2], *(grad - grad.mean() for grad in grads[2:])))
    assert_close(*found, rtol=2e-5, atol=2e-5)


def test_a_weak_marginal_lets_everything_go(rng):
    """As rho falls the plan vanishes, and what is left is the price of giving up all the mass."""
    c = unequal(clouds(rng, 20, 15, 3, weights="random"), 2.0)
    c.x += 8  # far enough that nothing is worth transporting
    for strength in (0.1, 1e-2, 1e-3):
        result = c.solve(0.1, unbalanced=strength)
        assert result.converged
        assert float(result.plan.sum()) < 1e-20
        price = strength * (1 + 2) + 0.1 * 1 * 2
        assert_close(float(result.value), price)


@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_two_points(strength):
    """One point each: the plan is one number, known in closed form."""
    x, y, eps, m_a, m_b = torch.zeros(1, 1).double(), torch.ones(1, 1).double(), 0.5, 2.0, 0.3
    result = otloss.solve_sample(
        x, y, eps, a=m_a + x[0], b=m_b + x[0], unbalanced=strength, tol=1e-12
    )
    # c + eps log(p / (m_a m_b)) + rho log(p / m_a) + rho log(p / m_b) = 0
    p = (m_a * m_b) ** ((eps + strength) / (eps + 2 * strength)) * np.exp(-1 / (eps + 2 * strength))
    assert float(result.plan) == pytest.approx(p, rel=1e-10)
    value = strength * (m_a + m_b) + eps * m_a * m_b - (2 * strength + eps) * p
    assert float(result.value) == pytest.approx(value, rel=1e-10)
