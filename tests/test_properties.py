"""What must hold for any input, searched by hypothesis."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from helpers import COSTS, Clouds, Strength, agree, clouds, scaled, unequal
from helpers import rho as rho_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import otloss

EXAMPLES = settings(max_examples=25)
TOL = 1e-9
# An error e of the marginals leaves eps * e in a value; eps is at most about 10 here.
SLACK = 1e-7

sizes, seeds = st.integers(1, 12), st.integers(0, 2**32 - 1)
# Not the reference: its plain iteration can need any number of passes to TOL.
costs, methods = st.sampled_from(COSTS), st.sampled_from(["dense", "streamed"])
epsilons = st.floats(0.1, 10.0)
kinds = st.sampled_from(["uniform", "random", "padded"])


@st.composite
def problems(draw: st.DrawFn) -> Clouds:
    rng = torch.Generator().manual_seed(draw(seeds))
    d = draw(st.sampled_from([1, 2, 3, 5, 17]))
    return clouds(rng, draw(sizes), draw(sizes), d, weights=draw(kinds))


def divergence(c: Clouds, eps: float, **options: object) -> Tensor:
    return c.loss(eps, tol=TOL, max_iters=50_000, **options)


def assert_equal(one: Clouds, other: Clouds, eps: float, **options: object) -> None:
    values = (divergence(c, eps, **options) for c in (one, other))
    assert_close(*values, rtol=1e-7, atol=SLACK)


@EXAMPLES
@given(problems(), epsilons, costs, methods)
def test_not_negative(c, eps, cost, method):
    """The kernels exp(-c / eps) of the three costs are positive definite."""
    assert divergence(c, eps, cost=cost, method=method) >= -SLACK


@EXAMPLES
@given(problems(), epsilons, costs, methods)
def test_zero_on_itself(c, eps, cost, method):
    same = Clouds(c.x, c.x.clone(), c.a, c.a)
    assert abs(divergence(same, eps, cost=cost, method=method)) <= SLACK


@EXAMPLES
@given(problems(), epsilons, costs, methods)
def test_symmetric(c, eps, cost, method):
    assert_equal(c, c.swapped(), eps, cost=cost, method=method)


@EXAMPLES
@given(problems(), epsilons, methods, st.sampled_from(["sqeuclidean", "euclidean"]), seeds)
def test_rigid_motions(c, eps, method, cost, seed):
    """Distances do not change when both clouds are turned and moved."""
    rng = torch.Generator().manual_seed(seed)
    d = c.x.shape[1]
    turn = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64)).Q
    shift = 10 * torch.randn(d, generator=rng, dtype=torch.float64)
    moved = Clouds(c.x @ turn + shift, c.y @ turn + shift, c.a, c.b)
    assert_equal(c, moved, eps, cost=cost, method=method)


@EXAMPLES
@given(problems(), epsilons, methods, st.floats(0.01, 100))
def test_cosine_ignores_lengths(c, eps, method, factor):
    stretched = Clouds(factor * c.x, c.y, c.a, c.b)
    assert_equal(c, stretched, eps, cost="cosine", method=method)


@EXAMPLES
@given(problems(), epsilons, costs, methods, seeds)
def test_order_does_not_matter(c, eps, cost, method, seed):
    """And gradients are permuted with their points."""
    order = torch.randperm(len(c.x), generator=torch.Generator().manual_seed(seed))
    x = c.x.requires_grad_()
    mixed = Clouds(x[order], c.y, None if c.a is None else c.a[order], c.b)
    losses = [divergence(t, eps, cost=cost, method=method) for t in (c, mixed)]
    assert_close(*losses, rtol=1e-7, atol=SLACK)
    grads = [torch.autograd.grad(loss, x) for loss in losses]
    assert_close(*grads, rtol=1e-5, atol=1e-6)


@EXAMPLES
@given(problems(), epsilons, methods, st.floats(1e-3, 1e3))
def test_scaling(c, eps, method, factor):
    """S(s x, s y; s^2 eps) = s^2 S(x, y; eps) for the squared distance, s for the distance."""
    scaled = Clouds(factor * c.x, factor * c.y, c.a, c.b)
    for cost, unit in (("sqeuclidean", factor**2), ("euclidean", factor)):
        one = divergence(c, eps, cost=cost, method=method)
        other = divergence(scaled, unit * eps, cost=cost, method=method)
        assert_close(other / unit, one, rtol=1e-7, atol=SLACK)


@EXAMPLES
@given(problems(), epsilons, costs, methods, seeds)
def test_splitting_a_point(c, eps, cost, method, seed):
    """A point in two halves is the same measure."""
    k, (a, b) = seed % len(c.x), c.weights()
    split = torch.cat([a, a[k : k + 1] / 2])
    split[k] /= 2
    whole = Clouds(c.x, c.y, a, b)
    halves = Clouds(torch.cat([c.x, c.x[k : k + 1]]), c.y, split, b)
    assert_equal(whole, halves, eps, cost=cost, method=method)


@EXAMPLES
@given(problems(), costs, methods)
def test_ot_grows_with_eps(c, cost, method):
    """OT_eps is a minimum of functions that grow with eps, and at most the mean cost."""
    losses = [
        divergence(c, eps, debiased=False, cost=cost, method=method) for eps in (0.3, 1.0, 4.0, 1e6)
    ]
    for less, more in pairwise(losses):
        assert less <= more + SLACK


@EXAMPLES
@given(problems(), epsilons, costs, methods)
def test_translation_has_no_gradient(c, eps, cost, method):
    """Moving both clouds together changes nothing, so all gradients add up to 0."""
    if cost == "cosine":
        return
    grads = c.require_grad().grads(divergence(c, eps, cost=cost, method=method))
    total = grads[0].sum(0) + grads[1].sum(0)
    scale = grads[0].abs().sum() + grads[1].abs().sum()
    assert float(total.abs().max()) <= 1e-8 + 1e-8 * float(scale)


@EXAMPLES
@given(problems(), epsilons, costs, methods)
def test_plan_is_a_coupling(c, eps, cost, method):
    result = c.solve(eps, cost=cost, tol=1e-8, max_iters=50_000, method=method)
    a, b = c.weights()
    assert bool((result.plan >= 0).all())
    assert float((result.plan.sum(1) - a).abs().sum()) <= 2e-8
    assert float((result.plan.sum(0) - b).abs().sum()) <= 2e-8


@st.composite
def soft_problems(draw: st.DrawFn) -> tuple[Clouds, float, Strength]:
    """Weights over 8 orders of magnitude, totals that differ by up to 1e3 either way, outliers."""
    seed = draw(seeds)
    rng = torch.Generator().manual_seed(seed)
    kind = draw(st.sampled_from(["uniform", "wide", "padded"]))
    ratio = 10 ** draw(st.floats(-3, 3))
    c = unequal(clouds(rng, draw(sizes), draw(sizes), 3, weights=kind), ratio)
    if draw(st.booleans()):
        c.x[0] += 100 * (c.a[0] > 0)
    unit = float((c.a[:, None] * c.b * otloss.cost_matrix(c.x, c.y).nan_to_num()).sum())
    unit = unit / float(c.a.sum() * c.b.sum())
    rho_x, rho_y = (unit * 10 ** draw(st.floats(-3, 6)) for _ in range(2))
    strength = draw(st.sampled_from([rho_x, (rho_x, rho_y), (None, rho_y), (rho_x, None)]))
    return c, unit * 10 ** draw(st.floats(-2, 2)), strength


@settings(max_examples=100)
@given(soft_problems(), methods)
def test_unbalanced_converges(problem, method):
    """And `converged` is the truth."""
    c, eps, strength = problem
    options = {"unbalanced": strength, "method": method}
    result = c.solve(eps, tol=1e-6, max_iters=5000, **options)
    assert result.converged
    assert result.value.isfinite()
    # The potentials are rounded where they are large: rho log(total / total).
    size = max(float(v.abs().max()) for v in result.potentials)
    assert result.marginal_error <= 2e-6 + 1e-15 * size / eps
    agree(c.solve(eps, n_iters=1, **options), result)


@EXAMPLES
@given(soft_problems(), costs, methods)
def test_unbalanced_not_negative(problem, cost, method):
    """Whatever the totals, and of different strength on the two sides too."""
    c, eps, strength = problem
    unit = 1.0 if cost == "sqeuclidean" else 0.1
    options = {"unbalanced": scaled(strength, unit), "cost": cost, "method": method}
    loss = c.loss(unit * eps, tol=1e-8, max_iters=5000, **options)
    largest = max(rho for rho in rho_pair(strength) if rho < math.inf)
    mass = float(c.a.sum() + c.b.sum())
    assert loss >= -1e-7 * mass * (eps * (1 + mass) + unit) - 1e-13 * largest * mass


@EXAMPLES
@given(problems(), epsilons, costs, methods, st.floats(1e-2, 1e3))
def test_unbalanced_zero_on_itself(c, eps, cost, method, strength):
    same = Clouds(c.x, c.x.clone(), c.a, c.a)
    assert abs(divergence(same, eps, cost=cost, method=method, unbalanced=strength)) <= SLACK


@EXAMPLES
@given(problems(), epsilons, methods, st.floats(1e-2, 1e3), st.floats(0.01, 100))
def test_unbalanced_swapped(c, eps, method, rho_x, rho_y):
    one = divergence(c, eps, method=method, unbalanced=(rho_x, rho_y))
    other = divergence(c.swapped(), eps, method=method, unbalanced=(rho_y, rho_x))
    assert_close(one, other, rtol=1e-7, atol=SLACK)
