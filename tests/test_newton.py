"""Newton's step in the CPU solver: it saves sweeps and changes nothing else."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, Clouds, Strength, agree, clouds, name, scaled, some_of, unequal
from torch.testing import assert_close

import otloss

STRENGTHS: list[Strength | None] = [None, 1e4, (None, 100.0), (100.0, None), 0.3]
MANY = 20_000


def without_newton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTLOSS_NEWTON", "0")


def solve(c: Clouds, eps: float, **options: object) -> otloss.OTResult:
    options = {"tol": 1e-9, "max_iters": MANY, "method": "dense", **options}
    return otloss.solve_sample(c.x, c.y, eps, a=c.a, b=c.b, **options)


def sums(result: otloss.OTResult, c: Clouds) -> torch.Tensor:
    """f_i + g_j where both points have weight."""
    f, g = result.potentials
    total = f[:, None] + g
    a = torch.ones(len(c.x)) if c.a is None else c.a
    b = torch.ones(len(c.y)) if c.b is None else c.b
    return torch.where((a > 0)[:, None] & (b > 0), total, 0)


@some_of("method, weights, strength", ["dense", "streamed"], ["uniform", "random", "padded"],
         STRENGTHS)  # fmt: skip
def test_same_solution_in_fewer_sweeps(method, weights, strength, rng, monkeypatch):
    """At an eps so small that each row has a few large entries; column counts that are multiples of
    nothing."""
    c = clouds(rng, 150, 133, 3, weights=weights)
    if strength is not None:
        c = unequal(c, 1.3 if not isinstance(strength, tuple) else 1.0)
    unit = float((c.y**2).sum(-1).median())
    eps = 3e-3 * unit
    options = {
        "method": method,
        "unbalanced": None if strength is None else scaled(strength, unit),
        "tol": 1e-8 if strength == 1e4 else 1e-9,  # some ten times what large potentials resolve
    }
    got = solve(c, eps, **options)
    without_newton(monkeypatch)
    expected = solve(c, eps, **options)
    assert got.converged
    assert expected.converged
    assert_close(sums(got, c), sums(expected, c), rtol=1e-6, atol=1e-2 * eps)
    agree(got, expected)
    assert got.duality_gap <= 1e-6 * unit
    # A strong penalty is nearly the balanced problem; a weak one needs few sweeps either way.
    assert got.n_iters <= (0.7 if strength != 0.3 else 1.1) * expected.n_iters + 2


def test_reaches_what_gradients_alone_do_not(rng, monkeypatch):
    """Without Newton's step a nearly discrete plan takes thousands of sweeps."""
    c = clouds(rng, 300, 300, 40)
    eps = 1e-2
    assert solve(c, eps, tol=1e-7, max_iters=600).converged
    without_newton(monkeypatch)
    with pytest.warns(otloss.ConvergenceWarning):
        solve(c, eps, tol=1e-7, max_iters=600)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("method", ["dense", "streamed"])
def test_rows_split_between_threads(method, dtype, rng, threads):
    """Entries are listed by each thread for its own rows; enough of them that products are, too."""
    c = clouds(rng, 1100, 900, 2, weights="random", dtype=dtype)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(solve(c, 0.01, method=method, tol=1e-4))
    assert all(r.converged for r in results)
    agree(*results)
    assert abs(results[0].n_iters - results[1].n_iters) <= 0.2 * results[0].n_iters


def test_warning_tells_the_sweeps(rng):
    """Readings that look for entries count, and never exceed what is allowed."""
    c = clouds(rng, 120, 110, 3)
    for most in range(1, 25):
        with pytest.warns(otloss.ConvergenceWarning):
            assert solve(c, 1e-3, tol=1e-12, max_iters=most).n_iters == most


@pytest.mark.parametrize("strength", [2.0, (None, 2.0), (2.0, None)], ids=str)
def test_outliers_that_the_plan_leaves_out(strength, rng):
    """Their part of the plan is far below what float32 can tell from 0."""
    for _ in range(20):
        c = clouds(rng, 100, 110, 2, dtype=torch.float32)
        (c.x if isinstance(strength, tuple) and strength[1] is None else c.y)[:6] += 50
        assert solve(c, 0.1, unbalanced=strength, tol=1e-3, max_iters=200).converged
