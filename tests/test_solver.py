"""The reference solver is the documented method: it takes the sweeps that the kernels take."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import (
    COSTS,
    STRENGTHS,
    WEIGHTS,
    Clouds,
    Strength,
    clouds,
    pick,
    randn,
    scaled,
    solved,
    some_of,
    unequal,
)
from torch.testing import assert_close

import otloss
from otloss import ops, reference
from otloss.costs import NAMED

RELATIVE_EPS = (1.0, 0.1, 0.01, 0.003)  # of the median cost: no stages, and one to four


@pytest.fixture(autouse=True)
def without_newton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one rule that the reference leaves out."""
    monkeypatch.setenv("OTLOSS_NEWTON", "0")


def assert_same_path(c: Clouds, eps: float, **options: object) -> None:
    """Of the sweeps that are compared; later ones of a long solve differ, since rounding decides
    whether a step is taken."""
    options = {"tol": 1e-8, "max_iters": 24, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otloss.ConvergenceWarning)
        plain, native = (
            otloss.solve_sample(c.x, c.y, eps, a=c.a, b=c.b, method=method, **options)
            for method in ("reference", "dense")
        )
    assert plain.n_iters == native.n_iters
    unit = float(native.potentials[0].abs().max() + native.potentials[1].abs().max())
    assert_close(plain.potentials, native.potentials, rtol=1e-6, atol=1e-6 * unit)


@some_of(
    "cost, weights, strength, relative_eps",
    COSTS, WEIGHTS, [None, *STRENGTHS, 1e4], RELATIVE_EPS, whole=3,
)  # fmt: skip
def test_two_clouds(cost, weights, strength, relative_eps, rng):
    c = clouds(rng, pick(rng, 20, 80), pick(rng, 20, 80), pick(rng, 2, 70), weights=weights)
    y = c.y if c.b is None else c.y[c.b > 0]
    unit = 1.0 if cost == "cosine" else max(0.1, float(otloss.cost_matrix(y, y, cost).median()))
    if strength is not None and not isinstance(strength, tuple):
        c = unequal(c, 1.7)
    unbalanced: Strength | None = None if strength is None else scaled(strength, unit)
    assert_same_path(c, relative_eps * unit, cost=cost, unbalanced=unbalanced)


@pytest.mark.parametrize("dims", [2, 3, 30])
def test_start_at_the_gaussian_potential(dims, rng):
    """Of many points it takes less time than a sweep, and is tried first."""
    c = clouds(rng, 300, 280, dims, weights="random")
    for eps in (0.05 * dims, 0.5 * dims, 5.0 * dims):
        assert_same_path(c, eps)


@pytest.mark.parametrize("max_iters", [1, 2, 3, 5, 9, 17, 24])
def test_limits_of_sweeps(max_iters, rng):
    assert_same_path(clouds(rng, 40, 45, 2), 0.05, max_iters=max_iters)


def test_given_potentials(rng):
    c = clouds(rng, 40, 45, 2)
    near = otloss.solve_sample(c.x, c.y, 0.1, tol=1e-2)
    for init in (near, (randn(rng, 40), randn(rng, 45))):
        assert_same_path(c, 0.1, init=init)


@pytest.mark.parametrize("rho", [(float("inf"), float("inf")), (0.5, 0.5)], ids=str)
@pytest.mark.parametrize("kind", range(len(COSTS)))
def test_a_cloud_against_itself(kind, rho, rng):
    c = clouds(rng, 50, 30, 3, weights="padded", batch=3)
    points, weights = [c.x, c.y], [c.a, c.b]
    costs = ops.cost(points, weights, [0, 0, 1, 1], kind)
    problem = ops.problems(weights, [0, 0, 1, 1], [1.0, 1.0], 0.02, costs=costs, rho=rho)
    (_, plain, *_), (_, native, *_) = (
        solved(problem, module=module, tol=1e-9, max_iters=100) for module in (reference, ops)
    )
    assert_close(plain[..., ops.ITERATIONS], native[..., ops.ITERATIONS])


def random_images() -> torch.Tensor:
    """The costs, up to 151, of two clouds of 100 random images."""
    x, y = torch.rand(2, 100, 784, generator=torch.Generator().manual_seed(0))
    return otloss.cost_matrix(x, y)


def few_costs() -> torch.Tensor:
    return 20 * torch.rand(12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("costs", "eps", "tol"),
    [(random_images, 8e-5, 1e-3), (random_images, 1.5e-4, 1e-3), (few_costs, 4e-3, 1e-7)],
)
@pytest.mark.parametrize("method", ["dense", "reference"])
def test_below_what_float32_resolves(method, costs, eps, tol):
    """A solve that rounding keeps from its tolerance says so, and does not go on."""
    C = costs()
    with pytest.warns(
        otloss.ConvergenceWarning, match=r"float32 resolves no .*: use float64, an eps"
    ):
        result = otloss.solve(C, eps, tol=tol, max_iters=20_000, method=method)
    assert not result.converged
    assert result.n_iters < 100
    f, g = (v.double() for v in result.potentials)
    P = ((f[:, None] + g - C.double()) / eps).exp() / C.numel()
    error = max(float((P.sum(k) - 1 / len(C)).abs().sum()) for k in (0, 1))
    assert tol < error < 2 * otloss.last_status().marginal_error < 0.3
    assert otloss.solve(C, 1e4 * eps, tol=tol, method=method).converged


@pytest.mark.parametrize("eps", [3e-5, 1e-4, 2e-4])
@pytest.mark.parametrize("method", ["dense", "reference"])
def test_rounding_of_few_points(method, eps, rng):
    """It does not average out; an error near the tolerance is told from one within it."""
    count, tol, converged = 60 if method == "reference" else 600, 1e-3, 0
    for n, m in ((1, 1), (1, 4), (3, 2), (5, 9)):
        C = torch.rand(count, n, m, generator=rng)
        a, b = (torch.rand(count, k, generator=rng) ** 4 + 1e-6 for k in (n, m))
        a, b = (w / w.sum(-1, True) for w in (a, b))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", otloss.ConvergenceWarning)
            result = otloss.solve(C, eps, a=a, b=b, tol=tol, max_iters=50, method=method)
        f, g, a, b = (t.double() for t in (*result.potentials, a, b))
        b = b * (a.sum(-1, True) / b.sum(-1, True))
        P = a[..., None] * b[:, None] * ((f[..., None] + g[:, None] - C.double()) / eps).exp()
        off = [(P.sum(2) - a).abs().sum(-1), (P.sum(1) - b).abs().sum(-1)]
        error = torch.maximum(*off) / a.sum(-1)
        converged += int(result.converged.sum())
        assert bool((error[result.converged] < 1.1 * tol).all())
    assert converged > 0


@pytest.mark.parametrize("method", ["dense", "reference"])
def test_clusters_that_float32_hardly_sees_apart(method, rng):
    """What a sweep changes there is only rounding, until steps along the residual get long."""
    count = 40 if method == "reference" else 400
    apart = 3 * torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    x, y = (
        0.5 * randn(rng, count, n, 3, dtype=torch.float32) + apart.repeat(n // 2, 1) for n in (8, 4)
    )
    result = otloss.solve_sample(x, y, 0.5, tol=2e-5, max_iters=200, method=method)
    assert bool(result.converged.all())


@pytest.mark.parametrize("method", ["dense", "reference"])
def test_below_what_float32_resolves_of_one_cloud(method):
    x = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    with pytest.warns(otloss.ConvergenceWarning, match="float32 resolves no smaller"):
        otloss.sinkhorn_divergence(x, x, 0.1, tol=1e-8, method=method)
    assert otloss.last_status().n_iters < 40


@pytest.mark.parametrize("cost", NAMED, ids=lambda cost: cost.name)
def test_bounds_of_costs(cost, rng):
    x, y = randn(rng, 2, 20, 3) + 1, 5 * randn(rng, 2, 30, 3)
    C, bound = cost.between(x, y), cost.bound(x, y)
    largest = C.amax((1, 2))
    assert bool((largest <= bound).all() and (bound <= 4 * largest).all())
    y[1, 2] = torch.nan
    assert cost.bound(x, y).isnan().tolist() == [False, True]
