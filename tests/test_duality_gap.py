"""OTResult.duality_gap: a bound on the error of the value, whatever the potentials."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from backends import BACKENDS
from helpers import COSTS, DTYPES, STRENGTHS, WEIGHTS, clouds, randn, rho, some_of, unequal
from torch import Tensor
from torch.testing import assert_close

import otloss
from otloss import method as methods

STOPS = [{"n_iters": 1}, {"n_iters": 4}, {"tol": 0.3}, {"tol": 1e-3}, {"tol": 1e-6}]


def exact(c: object, cost: str, eps: float, strength: object) -> Tensor:
    """The value, by brute force in float64."""
    a, b = c.weights()
    b = b * (a.sum() / b.sum()) if strength is None else b  # totals agree to rounding only
    return oracle.solution(oracle.cost(c.x, c.y, cost), a, b, eps, rho(strength)).value


@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")  # the gap holds all the same
@some_of(
    "backend, cost, weights, strength, dtype, stop",
    BACKENDS, COSTS, WEIGHTS, [None, *STRENGTHS], DTYPES, STOPS,
)  # fmt: skip
def test_the_error_of_the_value_is_within_the_gap(
    backend, cost, weights, strength, dtype, stop, rng
):
    c = clouds(rng, 12, 9, 3, weights=weights)
    c = unequal(c, 2.0, strength).to(backend.device).to(dtype)
    result = c.solve(0.3, cost=cost, unbalanced=strength, method=backend.method, **stop)
    gap, truth = result.duality_gap, exact(c.double(), cost, 0.3, strength)
    assert gap >= 0
    # the oracle's own rounding; its Newton steps end there
    slack = 1e-12 * max(1.0, abs(float(truth)))
    assert abs(float(result.value) - float(truth)) <= gap + slack
    if stop.get("tol", 1) <= 1e-3:  # and it is small where the solve converged
        assert gap <= 0.05 * max(1.0, abs(float(truth)))


def direct(C: Tensor, c: object, f: Tensor, g: Tensor, eps: float, strength: object) -> float:
    """Primal minus dual as they stand, of the plan rounded to the target marginals."""
    rho_x, rho_y = rho(strength)
    P, (hard_x, hard_y) = oracle.plan(C, f, g, c.a, c.b, eps), map(math.isinf, (rho_x, rho_y))
    A, B = oracle.target_marginal(c.a, f, rho_x), oracle.target_marginal(c.b, g, rho_y)
    if hard_x:
        B = B * (A.sum() / B.sum())
    elif hard_y:
        A = A * (B.sum() / A.sum())
    else:
        total = (A.sum() * B.sum()).sqrt()
        A, B = A * total / A.sum(), B * total / B.sum()
    Q = P * (A / P.sum(1)).clamp(max=1)[:, None]
    Q = Q * (B / Q.sum(0)).clamp(max=1)
    u, v = (A - Q.sum(1)).clamp(min=0), (B - Q.sum(0)).clamp(min=0)
    Q = Q + u[:, None] * v / v.sum()

    # The mass terms of the two KL, which balanced plans have in common, cancel.
    plans = [Q] if hard_x or hard_y else [Q, P]
    best = min(oracle.primal(C, plan, c.a, c.b, eps, (rho_x, rho_y)) for plan in plans)
    return float(best - oracle.dual(C, f, g, c.a, c.b, eps, (rho_x, rho_y)))


@pytest.mark.parametrize("strength", [None, *STRENGTHS])
def test_it_is_primal_minus_dual(strength, rng):
    c = clouds(rng, 9, 8, 2, weights="random")
    c = unequal(c, 0.4, strength)
    C = oracle.cost(c.x, c.y, "sqeuclidean")
    result = otloss.solve(C, 0.5, a=c.a, b=c.b, unbalanced=strength, n_iters=1)
    expected = direct(C, c, *result.potentials, 0.5, strength)
    assert result.duality_gap == pytest.approx(expected, rel=1e-9, abs=1e-13)
    assert result.duality_gap > 1e-6


@pytest.mark.parametrize("strength", [None, 0.7])
@pytest.mark.parametrize("method", ["dense", "streamed"])
def test_batches_blocks_and_given_costs(method, strength, rng, monkeypatch):
    """The same of one problem of a batch, of its cost matrix, and in blocks of a few rows."""
    c = clouds(rng, 20, 9, 2, weights="padded", batch=3)
    options = {"unbalanced": strength, "n_iters": 2}
    batch = c.solve(0.5, method=method, **options)
    gap = batch.duality_gap
    assert gap.shape == (3,)
    for k in range(3):
        one = c.item(k)
        C = otloss.cost_matrix(one.x, one.y)
        alone = otloss.solve(C, 0.5, a=one.a, b=one.b, **options).duality_gap
        assert alone == pytest.approx(float(gap[k]), rel=1e-9, abs=1e-14)
    monkeypatch.setattr(methods, "BLOCK_BYTES", 8 * 9 * 3 * 4)
    assert_close(batch.duality_gap, gap, rtol=1e-9, atol=1e-14)


def test_padding_and_a_plan_that_underflows(rng):
    c = clouds(rng, 6, 5, 2, weights="padded")
    c.x[c.a == 0], c.y[c.b == 0] = math.nan, math.inf
    assert 0 <= c.solve(0.3, n_iters=3).duality_gap < math.inf
    # exp((f + g - C) / eps) is 0 in places where the feasible plan has mass
    x, y = 5 * randn(rng, 12, 2), 5 * randn(rng, 12, 2) + 30
    far, near = (otloss.solve_sample(x, y, 0.1, **stop) for stop in ({"n_iters": 1}, {"tol": 1e-6}))
    assert float(far.plan.min()) == 0
    assert far.duality_gap > 10 * near.duality_gap
    assert abs(float(far.value - near.value)) <= far.duality_gap + near.duality_gap


def test_memory_of_a_streamed_solve(rng):
    """Blocks of rows: never n x m."""
    x, y = randn(rng, 3000, 2).float(), randn(rng, 3000, 2).float()
    result = otloss.solve_sample(x, y, 0.5, method="streamed")
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        assert result.duality_gap < 1e-2
    assert largest <= methods.BLOCK_BYTES // 8 + 3000
