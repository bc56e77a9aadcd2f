"""Forbidden pairs: the plan is exactly 0 there, and otherwise that of plain Sinkhorn iterations."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import DTYPES, close, rand, randn, simplex
from torch import Tensor
from torch.testing import assert_close

import otloss

METHODS = ("dense", "reference")
INF = math.inf


def masked(rng, n=6, m=5, dtype=torch.float64):
    """A cost matrix in which about a third is forbidden, but a plan is possible; a, b."""
    P = rand(rng, n, m) * (rand(rng, n, m) < 0.6) + 0.3 * torch.eye(n, m, dtype=torch.float64)
    P[-1, 0] += 0.3
    C = torch.where(P > 0, rand(rng, n, m), INF)
    P = P / P.sum()
    return [t.to(dtype) for t in (C, P.sum(1), P.sum(0))]


def sinkhorn(C: Tensor, a: Tensor, b: Tensor, eps: float, rho: float = INF) -> Tensor:
    """The plan, by iterations in which exp(-inf) is 0, until they move nothing: where few of the
    pairs that the plan needs are near, 5000 of them can still be 0.4% off."""
    C, a, b = C.double(), a.double(), b.double()
    if math.isinf(rho):  # totals that differ by the rounding of float32 move g for ever
        b = b * (a.sum() / b.sum())
    g, damping = torch.zeros_like(b), 1.0 if math.isinf(rho) else rho / (rho + eps)
    for _ in range(30_000):
        before = g
        f = -damping * eps * ((g - C) / eps + b.log()).logsumexp(1)
        g = -damping * eps * ((f[:, None] - C) / eps + a.log()[:, None]).logsumexp(0)
        g = g.nan_to_num(posinf=0.0)  # a column that is forbidden as a whole
        if torch.allclose(g, before, rtol=1e-12, atol=1e-13, equal_nan=True):
            break
    return a[:, None] * b * ((f[:, None] + g - C) / eps).exp()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strength", [None, 1.0, (None, 1.0)])
@pytest.mark.parametrize("n_iters", [1, 5])
def test_iterations_at_a_small_eps(n_iters, strength, method, rng):
    """The first iterations are far from the solution: none may use a forbidden pair, such as the
    first row's second, which is nearly the second column's cheapest there."""
    C, a, b = masked(rng)
    C[:2, :2] = torch.tensor([[1.0, INF], [0.0, 1.0]])
    C[0, 2:] = C[2:, 1] = INF
    C, eps, g = (10 * C).requires_grad_(), 1e-3, torch.zeros_like(b)
    if strength is None:
        dampings = 1.0, 1.0
    else:
        soft = 1 / (1 + eps)
        dampings = (1.0, soft) if isinstance(strength, tuple) else (soft, soft)
    for _ in range(n_iters):
        f = -dampings[0] * eps * ((g - C) / eps + b.log()).logsumexp(1)
        g = -dampings[1] * eps * ((f[:, None] - C) / eps + a.log()[:, None]).logsumexp(0)
    result = otloss.solve(C, eps, a=a, b=b, n_iters=n_iters, unbalanced=strength, method=method)
    assert_close(result.potentials, (f, g))
    v = randn(rng, len(b))
    (expected,) = torch.autograd.grad(g @ v, C)
    (grad,) = torch.autograd.grad(result.potentials[1] @ v, C)
    close(grad, torch.where(C.isinf(), 0.0, expected), 1e-6, scale=v.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [0.02, 0.1, 0.5])
def test_plan(eps, dtype, method, rng):
    C, a, b = masked(rng, dtype=dtype)
    tol = 1e-8 if dtype == torch.float64 else 1e-6 / eps
    result = otloss.solve(C, eps, a=a, b=b, method=method, tol=tol, max_iters=20_000)
    expected = sinkhorn(C, a, b, eps)
    assert bool((result.plan[C.isinf()] == 0).all())
    close(result.plan, expected, 1e-5 if dtype == torch.float64 else 1e-3)
    linear = torch.where(C.isinf(), 0.0, expected * C.double()).sum()
    close(result.value_linear, linear, 1e-4)
    kl = torch.xlogy(expected, expected / (a[:, None] * b).double()).sum()
    close(result.value, linear + eps * kl, 1e-4)
    assert result.converged


@pytest.mark.parametrize("objective", ["regularized", "transport"])
def test_gradients(objective, rng):
    """Of allowed costs and of weights, by differences; 0 at forbidden pairs."""
    C, a, b = masked(rng)
    allowed = C.isfinite()
    C, u, v = torch.where(allowed, C, 0.0).requires_grad_(), a.log(), b.log()

    def value(C, u, v):
        full = torch.where(allowed, C, INF)
        # the weights move along a feasible direction: those of a plan that is allowed
        P = torch.where(allowed, 0.1 + u.exp()[:, None] * v.exp(), 0.0)
        P = P / P.sum()
        options = {"a": P.sum(1), "b": P.sum(0), "tol": 1e-11, "max_iters": 20_000}
        return otloss.solve(full, 0.3, objective=objective, **options).value

    inputs = (C, u.requires_grad_(), v.requires_grad_())
    assert torch.autograd.gradcheck(value, inputs, atol=1e-5)
    (grad,) = torch.autograd.grad(value(*inputs), C)
    assert bool((grad[~allowed] == 0).all())


@pytest.mark.parametrize("method", METHODS)
def test_unbalanced(method, rng):
    """A row that is forbidden as a whole stays where it is, at the penalty's price."""
    C, a, b = masked(rng)
    C[2] = INF
    result = otloss.solve(C, 0.1, a=a, b=b, unbalanced=2.0, method=method, tol=1e-9)
    kept = torch.arange(6) != 2
    expected = sinkhorn(C[kept], a[kept], b, 0.1, 2.0)
    close(result.plan[kept], expected, 1e-5)
    assert bool((result.plan[C.isinf()] == 0).all())
    less = otloss.solve(C[kept], 0.1, a=a[kept], b=b, unbalanced=2.0, tol=1e-9)
    # KL(0 | a_2) is a_2, and the product measure has eps a_2 m_b more
    close(result.value, less.value + a[2] * (2.0 + 0.1 * b.sum()), 1e-6)


def test_chain(rng):
    """Mass that must go far by short steps: potentials rise well above the costs."""
    x = torch.arange(30, dtype=torch.float64)
    C = (x[:, None] - x).abs()
    C = torch.where(C <= 1, C, INF)
    w = 0.5 * simplex(randn(rng, 30))
    P = torch.diag_embed(w) + torch.diag_embed(w[1:], -1)
    P[0, 0] += w[0]  # all that can, moves one step
    a, b = P.sum(1), P.sum(0)
    result = otloss.solve(C, 0.2, a=a, b=b, tol=1e-8, max_iters=50_000)
    assert bool((result.plan[C.isinf()] == 0).all())
    close(result.plan.sum(1), a, 1e-6)
    close(result.plan.sum(0), b, 1e-6)


def test_batch_and_totals(rng):
    """Every problem of a batch, also at totals other than 1."""
    C, a, b = (torch.stack(t) for t in zip(*(masked(rng, 5, 5) for _ in range(3)), strict=True))
    C[1] = rand(rng, 5, 5)  # nothing forbidden
    mass = torch.tensor([1.0, 30.0, 0.1], dtype=torch.float64)[:, None]
    result = otloss.solve(C, 0.3, a=mass * a, b=mass * b, tol=1e-9)
    for k in range(3):
        close(result.plan[k], mass[k] * sinkhorn(C[k], a[k], b[k], 0.3), 1e-5)
    assert bool((result.plan[C.isinf()] == 0).all())


def test_losses_of_functions(rng):
    """Self terms have forbidden pairs too; asymmetric ones are not taken for symmetric."""
    x = torch.stack([torch.linspace(0, 2, 7).double(), randn(rng, 7)], -1) + 0.03 * rand(rng, 7, 2)
    y = (x + 0.1 * rand(rng, 7, 2)).flip(0)
    x.requires_grad_()

    def cost(u, v):
        far = (u[:, None, 0] - v[None, :, 0]) > 0.5  # far in one direction only
        C = (u[:, None] - v[None]).square().sum(-1)
        return C.masked_fill(far, INF)

    def value(x):
        return otloss.sinkhorn_divergence(x, y, 1.0, cost=cost, tol=1e-10)

    terms = [otloss.solve(cost(u, v), 1.0, tol=1e-10).value for u, v in ((x, y), (x, x), (y, y))]
    close(value(x), terms[0] - 0.5 * terms[1] - 0.5 * terms[2], 1e-7)
    assert torch.autograd.gradcheck(value, x, atol=1e-5)


def test_padding(rng):
    """A point of weight 0 needs no way."""
    C, a, b = masked(rng)
    wide = torch.full((7, 5), INF, dtype=torch.float64)
    wide[:6] = C
    result = otloss.solve(wide, 0.3, a=torch.cat([a, a[:1] * 0]), b=b, tol=1e-9)
    close(result.plan[:6], otloss.solve(C, 0.3, a=a, b=b, tol=1e-9).plan, 1e-6)
    assert bool((result.plan[6] == 0).all())


def test_infeasible():
    """Two rows that only one column of less weight takes."""
    C = torch.tensor([[0.0, INF, INF], [0.0, INF, INF], [0.0, 0.0, 0.0]])
    for one in (C, C.double(), C.expand(2, 3, 3)):
        with pytest.raises(ValueError, match="no plan avoids the forbidden pairs"):
            otloss.solve(one, 0.1)
    C = torch.zeros(2, 3, 3)
    C[1, 2] = INF
    with pytest.raises(ValueError, match="all costs of row 1, 2 are infinite"):
        otloss.solve(C, 0.1)
    with pytest.raises(ValueError, match="all costs of column 1, 2 are infinite"):
        otloss.solve(C.mT, 0.1, unbalanced=(1.0, None))


def iterated(C):
    return otloss.solve(C, 0.001, n_iters=3).potentials


def test_compiled_and_infeasible():
    """Where data is not read, as on a GPU, the value is NaN and the solve has not converged."""
    torch.compiler.reset()

    def solved(C):
        result = otloss.solve(C, 0.1)
        return result.value, result.plan, result.converged

    iterations = torch.compile(iterated, fullgraph=True, backend="aot_eager")
    compiled = torch.compile(solved, fullgraph=True, backend="aot_eager")
    good = torch.tensor([[0.0, INF], [0.3, 0.1]])
    bad = torch.tensor([[0.0, INF], [0.3, INF]])
    assert_close(compiled(good)[0], solved(good)[0], rtol=1e-3, atol=1e-4)
    assert_close(iterations(good), iterated(good))
    assert compiled(good)[1][0, 1] == 0
    assert bool(compiled(bad)[0].isnan())
    assert not compiled(bad)[2]


def test_an_energy_distance_has_no_plan_to_avoid_them(rng):
    x, y = randn(rng, 4, 2), randn(rng, 5, 2)
    with pytest.raises(ValueError, match="costs must be finite in an energy distance"):
        otloss.energy_distance(x, y, cost=lambda u, v: torch.cdist(u, v) * INF)


def test_what_a_result_gives(rng):
    """Pairs, bounds and starts: no forbidden pair is drawn."""
    C, a, b = masked(rng)
    result = otloss.solve(C, 0.2, a=a, b=b, tol=1e-8)
    i, j = result.sample(2000, rng)
    assert bool(C[i, j].isfinite().all())
    assert bool(C[torch.arange(6), result.argmax()].isfinite().all())
    assert result.duality_gap < 1e-6
    again = otloss.solve(C, 0.2, a=a, b=b, tol=1e-7, init=result)
    assert again.n_iters <= result.n_iters
    close(again.value, result.value, 1e-6)
