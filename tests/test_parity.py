"""The kernels and the plain-torch reference against the float64 brute force of oracle.py.

How exact a solve is: it stops at a marginal error `tol`. The value is then right to eps tol and
rounding (to tol times the cost where points lighter than tol may still be far off), the gradient of
the points (the plan) to some tol / sqrt(gap), the gradient of the weights (the potentials) to
tol / gap, where 1 - gap is the contraction of one iteration; a point whose own weight is below tol
is not controlled, so the gradient of very unequal weights is compared in the norm of the weights.
In float32 the exponent (f + g - C) / eps is rounded to 6e-8 C / eps, which bounds the tol that can
be reached.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import oracle
import pytest
import torch
from backends import BACKENDS
from helpers import (
    COSTS,
    DTYPES,
    LAYOUTS,
    STRENGTHS,
    WEIGHTS,
    Clouds,
    close,
    clouds,
    name,
    pick,
    rand,
    randn,
    relaid,
    rho,
    scaled,
    some_of,
    unequal,
)
from torch import Tensor
from torch.testing import assert_close

import otloss

EPS = (0.01, 0.2, 5.0)  # of the mean cost
OBJECTIVES = ("regularized", "transport")
HELD = {"tol": 1e-10, "max_iters": 20_000, "backward": "envelope"}


@dataclass(frozen=True)
class Tolerance:
    solver: float  # tol= of the solve
    value: float  # of the mean cost
    points: float  # gradient of x, y: of its norm
    weights: float  # gradient of a, b


def tolerance(dtype: torch.dtype, relative_eps: float, gap: float) -> Tolerance:
    sharp = relative_eps < 0.1
    if dtype == torch.float64:
        tol = 1e-7 if sharp else 1e-9
        value, points, weights = 1e-10, 1e-9, 1e-6
    else:
        tol = 1e-4 if sharp else 5e-6
        value, points, weights = 3e-6, 5e-5, 2e-3
    return Tolerance(
        tol, value + 5 * relative_eps * tol, points + 15 * tol / gap**0.5, weights + 30 * tol / gap
    )


def mean_cost(c: Clouds, cost: str) -> float:
    """Of the points of positive weight; at least 0.1, for clouds that are nearly one point."""
    a, b = c.weights()
    return max(0.1, float((a[:, None] * b * oracle.cost(c.x, c.y, cost)).detach().sum()))


def near_pair_error(c: Clouds, dtype: torch.dtype) -> float:
    """The kernels form sum_j w_ij (x_i - y_j) / |x_i - y_j| from sums of w / |x - y| times points,
    which loses the digits of two points that are much nearer to each other than to the centre."""
    weighted = [(c.x, c.a), (c.y, c.b)]
    points = torch.cat([x if w is None else x[w > 0] for x, w in weighted]).detach()
    distance = torch.pdist(points)
    nearest = float(distance[distance > 0].min()) if bool((distance > 0).any()) else 1.0
    return torch.finfo(dtype).eps * float((points - points.mean(0)).norm(dim=-1).max()) / nearest


def assert_gradients(
    got: Sequence[Tensor], expected: list[Tensor], c: Clouds, tol: Tolerance, cost: str
) -> None:
    """In the norm of each gradient, but not less than a tenth of the weights': in one dimension the
    gradient of the cosine cost is 0. Cosine's gradient goes with 1 / |x|, which is taken out."""
    for index, (grad, truth) in enumerate(zip(got, expected, strict=True)):
        grad, count = grad.cpu(), (c.x, c.y)[index % 2].shape[0]
        w = (c.a, c.b)[index % 2]
        floor = 0.1 * (count**-0.5 if w is None else float(w.detach().norm()))
        if index >= 2 and bool(w.max() > 1e3 * w.min()):
            grad, truth = grad.double() * w, truth * w
        if index < 2 and cost == "cosine":
            norm = (c.x, c.y)[index].norm(dim=-1, keepdim=True)
            grad, truth = grad.double() * norm, truth * norm
        scale = max(float(truth.detach().norm()), floor)
        close(grad, truth, tol.points if index < 2 else tol.weights, scale)


@some_of(
    "backend, cost, weights, relative_eps, d, dtype",
    BACKENDS, COSTS, WEIGHTS, EPS, [1, 3, 64, 784], DTYPES, whole=3,
)  # fmt: skip
def test_divergence(backend, cost, weights, relative_eps, d, dtype, rng):
    """Value and gradients in x, y, a, b of the default loss, everywhere."""
    c = clouds(rng, pick(rng, 1, 20), pick(rng, 1, 20), d, weights=weights, dtype=dtype)
    c, method = c.to(backend.device), backend.method
    exact = c.double().require_grad()
    eps = relative_eps * mean_cost(exact, cost)
    gap = oracle.solve(oracle.cost(exact.x, exact.y, cost), *exact.weights(), eps).gap
    # Clusters that exchange next to nothing: no method finds their potentials in float64.
    if gap < 1e-6:
        pytest.skip(f"ill-conditioned draw: gap {gap:.1e}")
    tol = tolerance(dtype, relative_eps, gap)
    if weights == "wide":  # mass that is misplaced may be so at the largest cost
        largest = float(oracle.cost(exact.x, exact.y, cost).detach().max())
        tol = replace(tol, value=tol.value + tol.solver * largest / mean_cost(exact, cost))
    if cost == "euclidean":
        tol = replace(tol, points=tol.points + near_pair_error(exact, dtype))
    c.require_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", otloss.ConvergenceWarning)
        loss = c.loss(eps, cost=cost, tol=tol.solver, max_iters=20_000, method=method)
    # Weights over decades leave float32 at its rounding, which it says.
    assert all(dtype == torch.float32 and "resolves" in str(w.message) for w in caught)
    truth = oracle.loss(exact.x, exact.y, eps, exact.a, exact.b, cost_name=cost)
    assert loss.dtype == dtype
    close(loss, truth.value, tol.value, mean_cost(exact, cost))
    assert_gradients(c.grads(loss), truth.grads(*exact.inputs()), exact, tol, cost)


@some_of(
    "backend, mode, cost, objective, debiased",
    BACKENDS, ["envelope", "implicit", "unrolled"], COSTS, OBJECTIVES, [True, False], whole=3,
)  # fmt: skip
def test_objectives(backend, mode, cost, objective, debiased, rng):
    """Both objectives, with and without debiasing. Envelope holds the plan of the transport
    objective constant; the others go through the optimality conditions or the iterations."""
    c = clouds(rng, pick(rng, 2, 20), pick(rng, 2, 20), 3, weights="random").to(backend.device)
    exact = c.double().require_grad()
    eps, n_iters = 0.2 * mean_cost(exact, cost), 4 if mode == "unrolled" else None
    options = {"objective": objective, "debiased": debiased, "n_iters": n_iters}
    call = {"cost": cost, "method": backend.method, **HELD, "backward": mode, **options}
    loss = c.require_grad().loss(eps, **call)
    options |= {"cost_name": cost, "backward": "implicit" if mode == "implicit" else "envelope"}
    truth = oracle.loss(exact.x, exact.y, eps, exact.a, exact.b, **options)
    close(loss, truth.value, 1e-8, mean_cost(exact, cost))
    got, expected = c.grads(loss), truth.grads(*exact.inputs())
    if mode == "implicit":  # weights keep their total: their gradient has a free constant
        got, expected = ([x, y, a - a.mean(), b - b.mean()] for x, y, a, b in (got, expected))
    assert_gradients(got, expected, exact, Tolerance(1e-10, 1e-8, 1e-7, 1e-6), cost)


@some_of(
    "backend, cost, objective, strength, debiased",
    BACKENDS, COSTS, OBJECTIVES, STRENGTHS, [True, False], whole=3,
)  # fmt: skip
def test_unbalanced(backend, cost, objective, strength, debiased, rng):
    """Soft marginals, on one side or both, and unequal totals: value and gradients."""
    weights, ratio = WEIGHTS[pick(rng, 0, 3)], 10 ** (4 * float(rand(rng, 1)) - 2)
    c = clouds(rng, pick(rng, 1, 15), pick(rng, 1, 15), 3, weights=weights)
    c = unequal(c, ratio).to(backend.device)
    exact = c.double().require_grad()
    unit = mean_cost(Clouds(exact.x, exact.y, exact.a, exact.b / exact.b.sum()), cost)
    eps, strength = (0.02, 0.2, 5.0)[pick(rng, 0, 2)] * unit, scaled(strength, unit)
    options = {"objective": objective, "debiased": debiased}
    call = {"cost": cost, "method": backend.method, "unbalanced": strength, **options, **HELD}
    loss = c.require_grad().loss(eps, **call)
    call = {"cost_name": cost, "rho": rho(strength), **options}
    truth = oracle.loss(exact.x, exact.y, eps, exact.a, exact.b, **call)
    size = unit * float(1 + exact.b.detach().sum())
    close(loss, truth.value, 1e-8, size)
    pairs = zip(c.grads(loss), truth.grads(*exact.inputs()), strict=True)
    for index, (grad, expected) in enumerate(pairs):
        grad, w = grad.cpu(), (exact.a, exact.b)[index % 2].detach()
        if index < 2 and cost == "cosine":
            norm = (exact.x, exact.y)[index].detach().norm(dim=-1, keepdim=True)
            grad, expected = grad * norm, expected * norm
        if index >= 2:  # a light point's own potential is not controlled
            grad, expected = grad * w / w.max(), expected * w / w.max()
        assert not grad[w == 0].any()
        close(grad, expected, 1e-5, floor=1e-4 * size)


@some_of("backend, strength", BACKENDS, STRENGTHS)
def test_unbalanced_in_float32(backend, strength, rng):
    c = clouds(rng, pick(rng, 5, 30), pick(rng, 5, 30), 3, weights="random", dtype=torch.float32)
    c = unequal(c, 3.0).to(backend.device)
    exact = c.double().require_grad()
    loss = c.require_grad().loss(1.0, unbalanced=strength, tol=1e-5, method=backend.method)
    truth = oracle.loss(exact.x, exact.y, 1.0, exact.a, exact.b, rho=rho(strength))
    close(loss, truth.value, 1e-5, float(truth.value.abs()) + 1)
    close(c.grads(loss), truth.grads(*exact.inputs()), 1e-4, floor=0.1)


@pytest.mark.parametrize("strength", STRENGTHS, ids=str)
def test_unbalanced_minimises_the_primal(strength, rng):
    """No plan does better, and a descent on plans themselves ends at the same value."""
    n, m, eps = 5, 4, 0.4
    C, c = 2 * rand(rng, n, m), unequal(clouds(rng, n, m, 1, weights="random"), 2.5)
    result = otloss.solve(C, eps, a=c.a, b=c.b, unbalanced=strength, tol=1e-12)
    logits = randn(rng, n, m).requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=2000, line_search_fn="strong_wolfe")
    optimiser.param_groups[0].update(tolerance_grad=1e-12, tolerance_change=1e-15)

    def primal() -> Tensor:
        P = logits.exp()
        if rho(strength)[0] == torch.inf:
            P = c.a[:, None] * logits.softmax(1)
        if rho(strength)[1] == torch.inf:
            P = c.b * logits.softmax(0)
        return oracle.primal(C, P, c.a, c.b, eps, rho(strength))

    def step() -> Tensor:
        optimiser.zero_grad()
        value = primal()
        value.backward()
        return value

    optimiser.step(step)
    assert_close(primal().detach(), result.value, rtol=1e-7, atol=1e-9)
    at_plan = oracle.primal(C, result.plan, c.a, c.b, eps, rho(strength))
    assert_close(at_plan, result.value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strength", [0.3, (2.0, 0.1)], ids=str)
def test_unbalanced_plans_of_pot(strength, rng):
    """Only the plan: POT's value of this problem is something else."""
    ot = pytest.importorskip("ot")
    C, c = 2 * rand(rng, 9, 7), unequal(clouds(rng, 9, 7, 1, weights="random"), 2.5)
    result = otloss.solve(C, 0.2, a=c.a, b=c.b, unbalanced=strength, tol=1e-11)
    plan = ot.unbalanced.sinkhorn_unbalanced(
        c.a, c.b, C, 0.2, strength, reg_type="kl", numItermax=100_000, stopThr=1e-14
    )
    assert_close(result.plan, plan, rtol=1e-6, atol=1e-10)


@some_of("backend, dtype, batch, layout", BACKENDS, DTYPES, [None, 3], LAYOUTS, whole=3)
def test_layouts(backend, dtype, batch, layout, rng):
    """Views give what their contiguous copies give; gradients arrive at the view."""
    n, m, d = pick(rng, 2, 12), pick(rng, 2, 12), pick(rng, 2, 6)
    c = clouds(rng, n, m, d, weights="random", batch=batch, dtype=dtype)
    c, method = c.to(backend.device).require_grad(), backend.method
    views = [relaid(t, layout) for t in c.inputs()]
    if layout == "expanded" and batch is None:  # a and b would lose their total
        views[2:] = c.inputs()[2:]
    assert layout == "contiguous" or not views[0].is_contiguous()
    plain = torch.contiguous_format
    copies = [v.detach().clone(memory_format=plain).requires_grad_() for v in views]
    losses = [Clouds(*given).loss(2.0, tol=1e-5, method=method).sum() for given in (views, copies)]
    assert_close(*losses, rtol=1e-6, atol=1e-6)
    assert_close(*map(torch.autograd.grad, losses, (views, copies)), rtol=1e-5, atol=1e-6)


@some_of("backend, dtype", BACKENDS, DTYPES)
def test_clouds_of_one_point_each(backend, dtype, rng):
    """Rounding makes the variance that they do not have negative, too."""
    for d in (1, 2, 5, 5, 5, 5):
        x, y = (randn(rng, 1, d, dtype=dtype).expand(n, d) for n in (7, 9))
        a, b = (rand(rng, n, dtype=dtype).softmax(0) for n in (7, 9))
        x, y, a, b = (t.to(backend.device) for t in (x, y, a, b))
        loss = otloss.sinkhorn_divergence(x, y, 0.5, a=a, b=b, method=backend.method)
        close(loss, (x[0] - y[0]).square().sum(), 1e-5, 1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cost_matrix_layouts_given_to_solve(layout, rng):
    C = randn(rng, 3, 7, 5).abs()
    view = relaid(C, layout)
    expected = otloss.solve(view.clone().contiguous(), 0.5, tol=1e-8).value
    assert_close(otloss.solve(view, 0.5, tol=1e-8).value, expected)


@some_of("backend, dtype", [name for name in BACKENDS if "streamed" not in name], DTYPES)
def test_given_cost_matrix(backend, dtype, rng):
    """solve(C): value, plan and the gradients in C, a and b. Costs may be negative."""
    n, m, eps = pick(rng, 2, 15), pick(rng, 2, 15), 0.3
    C = randn(rng, n, m)
    c = clouds(rng, n, m, 1, weights="random")
    inputs = [t.to(backend.device, dtype).requires_grad_() for t in (C, c.a, c.b)]
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    tol = 1e-9 if dtype == torch.float64 else 5e-6
    options = {"tol": tol, "max_iters": 10_000, "method": backend.method}
    result = otloss.solve(inputs[0], eps, a=inputs[1], b=inputs[2], **options)
    truth = oracle.term(exact[0], exact[1], exact[2], eps, "regularized", "envelope")
    solution = oracle.solve(exact[0], exact[1], exact[2], eps)
    close(result.value, truth.value, 10 * tol + 1e-6 * (dtype == torch.float32), 1.0)
    close(result.value_linear, solution.transport, 20 * tol, 1.0)
    close(result.plan, solution.P, 20 * tol)
    got = torch.autograd.grad(result.value, inputs)
    # By convention <a, f> = <b, g>, as in the oracle.
    for grad, expected, scale in zip(got, truth.grads(*exact), (20, 50, 50), strict=True):
        close(grad, expected, scale * tol / solution.gap, max(1.0, float(expected.norm())))


@some_of("backend, objective", BACKENDS, OBJECTIVES)
def test_minibatch_energy_distance(backend, objective, rng):
    """OT-GAN's six terms, each solved by the oracle."""
    x1, x2, y1, y2 = (randn(rng, n, 4).requires_grad_() for n in (6, 7, 5, 8))
    eps, options = 0.1, {"tol": 1e-10, "max_iters": 20_000, "method": backend.method}
    given = (x.to(backend.device) for x in (x1, x2, y1, y2))
    loss = otloss.minibatch_energy_distance(*given, eps, objective=objective, **options)

    def term(x: Tensor, y: Tensor) -> oracle.Loss:
        return oracle.loss(x, y, eps, cost_name="cosine", objective=objective, debiased=False)

    across = [(1.0, term(x, y)) for x in (x1, x2) for y in (y1, y2)]
    truth = oracle.combine([*across, (-2.0, term(x1, x2)), (-2.0, term(y1, y2))])
    close(loss, truth.value, 1e-8, 1.0)
    inputs = (x1, x2, y1, y2)
    close(torch.autograd.grad(loss, inputs), truth.grads(*inputs), 1e-6)


@some_of("backend, dtype", BACKENDS, [torch.float32, torch.float64])
def test_directions_of_short_vectors(backend, dtype, rng):
    """Cosines do not depend on lengths, though squares of these underflow; gradients grow."""
    short = 2.0**-80 if dtype == torch.float32 else 2.0**-600
    points = [randn(rng, n, 4).to(backend.device, dtype) for n in (6, 7)]
    options = {"cost": "cosine", "method": backend.method, "tol": 1e-5}

    def at(scale: float) -> list[Tensor]:
        x, y = ((scale * z).requires_grad_() for z in points)
        loss = otloss.sinkhorn_divergence(x, y, 0.5, **options)
        return [loss.detach(), *(scale * g for g in torch.autograd.grad(loss, (x, y)))]

    torch.testing.assert_close(at(short), at(1.0), rtol=1e-4, atol=1e-6)


@some_of("backend, weights, cost", BACKENDS, WEIGHTS, COSTS)
def test_energy_distance(backend, weights, cost, rng):
    c = clouds(rng, pick(rng, 2, 20), pick(rng, 2, 20), 3, weights=weights)
    c = c.to(backend.device).require_grad()
    loss, exact = c.energy(cost=cost, method=backend.method), c.double().require_grad()
    a, b = exact.weights()

    def mean(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return (p[:, None] * q * oracle.cost(x, y, cost)).sum()

    truth = mean(exact.x, exact.y, a, b)
    truth = truth - mean(exact.x, exact.x, a, a) / 2 - mean(exact.y, exact.y, b, b) / 2
    close(loss, truth, 1e-10, mean_cost(exact, cost))
    got = torch.autograd.grad(loss, c.inputs())
    expected = torch.autograd.grad(truth, exact.inputs())
    for index, (grad, true) in enumerate(zip(got, expected, strict=True)):
        grad, w = grad.cpu(), (exact.a, exact.b)[index % 2]
        if index >= 2:  # nothing flows to the weight of a padding point
            true = torch.where(w > 0, true, 0.0)
            grad = torch.where(w > 0, grad, 0.0)
        close(grad, true, 1e-9, max(float(true.norm()), 0.01))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("d", [1, 2, 4, 5, 16, 17, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_cost_matrix(dtype, d, cost, rng):
    """Both ways of computing costs, by differences (small d) and by a product."""
    x, y = randn(rng, 13, d, dtype=dtype) + 10, randn(rng, 9, d, dtype=dtype) + 10
    C = otloss.cost_matrix(x, y, cost)
    # 10 is the offset that an expanded square would lose its digits to.
    exact = oracle.cost(x.double(), y.double(), cost)
    close(C, exact, 1e-13 if dtype == torch.float64 else 2e-6, d * 13)
