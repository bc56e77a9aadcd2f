"""Gradients of every mode against finite differences, autograd through the definition and each
other; second derivatives; what the graph keeps and refuses."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from backends import BACKENDS
from helpers import (
    COSTS,
    DTYPES,
    METHODS,
    STRENGTHS,
    Clouds,
    close,
    clouds,
    name,
    randn,
    simplex,
    some_of,
)
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.testing import assert_close

import otloss

OBJECTIVES = ("regularized", "transport")
MODES = ("auto", "envelope", "implicit", "unrolled")
# Solved until rounding, so that finite differences see the optimum and not the stopping test.
TIGHT: dict[str, Any] = {"tol": 1e-12, "max_iters": 20_000}
# Central differences of a smooth function in float64: a relative error of about 1e-9.
CHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-6}
TWICE = {"atol": 1e-5, "rtol": 1e-4, "fast_mode": True}


def leaves_of(rng: torch.Generator, n: int, m: int, d: int = 2, device: str = "cpu") -> Any:
    """x, y and free parameters of the weights."""
    shapes = ((n, d), (m, d), (n,), (m,))
    return tuple(randn(rng, *shape).to(device).requires_grad_() for shape in shapes)


def weighted(leaves: tuple[Tensor, ...], strength: Any = None) -> Clouds:
    """Where a marginal is soft nothing ties the totals: every weight is free."""
    x, y, p, q = leaves
    return Clouds(x, y, *((simplex(p), simplex(q)) if strength is None else (p.exp(), q.exp())))


def solver_of(mode: str, n_iters: int) -> dict[str, Any]:
    return {"backward": mode, **({"n_iters": n_iters} if mode == "unrolled" else TIGHT)}


def relative(left: Any, right: Any) -> float:
    scale = max(float(r.detach().norm()) for r in right)
    return max(float((p - q).detach().norm()) for p, q in zip(left, right, strict=True)) / scale


# --------------------------------------------------------------------------------- all the modes


@some_of(
    "method, debiased, mode, objective, cost, strength",
    METHODS, [True, False], MODES, OBJECTIVES, COSTS, [None, *STRENGTHS[1:]], whole=3,
)  # fmt: skip
def test_first_and_second_order(method, debiased, mode, objective, cost, strength, rng):
    sizes = (3, 2) if method == "reference" else (5, 4)  # which takes long
    leaves, eps = leaves_of(rng, *sizes), 0.3 if cost == "cosine" else 1.0
    options = {"cost": cost, "objective": objective, "unbalanced": strength, "method": method}
    options |= solver_of(mode, n_iters=3)

    def call(*leaves: Tensor) -> Tensor:
        return weighted(leaves, strength).loss(eps, debiased=debiased, **options)

    if mode != "envelope" or objective == "regularized":  # else the plan is held constant
        assert gradcheck(call, leaves, **CHECK)
    if cost != "euclidean" or strength is None:
        assert gradgradcheck(call, leaves, **TWICE)


@some_of("backend, cost, objective, strength", BACKENDS, COSTS, OBJECTIVES, [None, *STRENGTHS])
def test_modes_agree_at_convergence(backend, cost, objective, strength, rng):
    leaves = leaves_of(rng, 12, 9, 3, backend.device)
    eps = 0.7 * float(otloss.cost_matrix(*leaves[:2], cost).detach().mean())  # they get there
    options = {"cost": cost, "objective": objective, "unbalanced": strength}

    def gradient(mode: str) -> tuple[Tensor, ...]:
        call = {
            **options,
            "method": backend.method,
            **solver_of(mode, 600 if strength is None else 300),
        }
        return grad(weighted(leaves, strength).loss(eps, **call), leaves)

    implicit = gradient("implicit")
    assert relative(gradient("auto"), implicit) == 0
    if not isinstance(strength, tuple) or None not in strength:  # else iterations take long
        assert relative(gradient("unrolled"), implicit) < 1e-6
    if objective == "regularized":
        assert relative(gradient("envelope"), implicit) < 1e-9


@pytest.mark.parametrize("mode", ["unrolled", "implicit"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_and_padding(mode, objective, rng):
    """Problems of a batch do not see each other, nor what stands in points of weight 0."""
    options = {"objective": objective, **solver_of(mode, n_iters=4)}
    sizes, n, m = ((6, 5), (4, 7), (7, 3)), 8, 9
    x, y = torch.full((3, n, 2), math.nan).double(), torch.full((3, m, 2), math.inf).double()
    batch, alone = Clouds(x, y, torch.zeros(3, n).double(), torch.zeros(3, m).double()), []
    for k, (p, q) in enumerate(sizes):
        one = clouds(rng, p, q, 2, weights="random")
        for whole, part in zip(batch.inputs(), one.inputs(), strict=True):
            whole[k, : len(part)] = part
        one.require_grad()
        alone.append(one.grads((k + 1) * one.loss(1.0, **options)))
    loss = batch.require_grad().loss(1.0, **options)
    grads = batch.grads(loss @ torch.arange(1.0, 4).double())
    for k, sizes_k in enumerate(sizes):
        for found, expected, size in zip(grads, alone[k], sizes_k * 2, strict=True):
            assert relative([found[k, :size]], [expected]) < 1e-9
            assert not found[k, size:].any()


@pytest.mark.parametrize("strength", [None, *STRENGTHS], ids=str)
def test_results_are_differentiable_through_the_solution(strength, rng):
    """Finite differences on the solved problem, twice. Soft potentials need no convention."""
    leaves, x_new = leaves_of(rng, 5, 4), randn(rng, 2, 2)

    def outputs(*leaves: Tensor) -> Tensor:
        r = weighted(leaves, strength).solve(1.0, unbalanced=strength, **TIGHT)
        (f, g), (row, column) = r.potentials, r.marginals
        parts = (
            r.value + 3 * r.value_linear + f.sin().sum() + g.cos().sum(),
            (r.plan.square() * torch.arange(4)).sum() + row.square().sum() + column.norm(),
            r.barycentric_map().square().sum() + r.extend(x_new).square().sum(),
        )
        return torch.stack(parts)

    assert gradcheck(outputs, leaves, atol=1e-6, rtol=1e-4)
    assert gradgradcheck(lambda *leaves: outputs(*leaves)[:2], leaves, **TWICE)


@pytest.mark.parametrize("mode", ["implicit", "unrolled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gradients_through_plans_and_potentials(dtype, mode, rng):
    """Any function of f, g and P: differences of potentials, the plan, what it does to vectors."""
    n, m, eps = 6, 5, 0.5
    c = clouds(rng, n, m, 1, weights="random")
    inputs = [t.to(dtype).requires_grad_() for t in (randn(rng, n, m).abs(), c.a, c.b)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    u, v, W = randn(rng, n), randn(rng, m), randn(rng, n, m)
    u, v = u - u.mean(), v - v.mean()  # blind to the constant of the potentials

    def readout(f: Tensor, g: Tensor, P: Tensor) -> Tensor:
        return (u.to(f) * f).sum() + (v.to(g) * g).sum() + (W.to(P) * P).sum()

    options = solver_of(mode, n_iters=4)
    if dtype == torch.float32 and mode == "implicit":
        options["tol"] = 1e-6
    result = otloss.solve(inputs[0], eps, a=inputs[1], b=inputs[2], **options)
    got = grad(readout(*result.potentials, result.plan), inputs)
    if mode == "unrolled":
        f, g = oracle.iterate(*exact, eps, 4)[-1]
    else:
        f, g = oracle.differentiable_potentials(*exact, eps)
    truth = grad(readout(f, g, oracle.plan(exact[0], f, g, *exact[1:], eps)), exact)
    if mode == "implicit":  # weights keep their total: their gradient has a free constant
        got, truth = ([C, *(w - w.mean() for w in of_weights)] for C, *of_weights in (got, truth))
    close(got, truth, 1e-6 if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("mode", ["unrolled", "implicit"])
def test_minibatch_energy_distance(mode, rng):
    four, options = [randn(rng, 6, 3).requires_grad_() for _ in range(4)], solver_of(mode, 5)

    def call(*tensors: Tensor, **kw: Any) -> Tensor:
        return otloss.minibatch_energy_distance(*tensors, 0.3, **kw)

    assert gradcheck(lambda *four: call(*four, **{**options, "backward": "auto"}), four, **CHECK)
    default, held = (grad(call(*four, **kw), four) for kw in (TIGHT, solver_of("envelope", 0)))
    assert relative(default, held) == 0


@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float32, 2e-5), (torch.float64, 1e-10)], ids=name
)
@pytest.mark.parametrize("cost", COSTS)
def test_rows_that_do_not_fill_their_cache_lines(cost, dtype, tol, rng):
    """Stored rows start on cache lines: what lies between them counts nowhere, in no mode."""
    modes = [{"backward": "unrolled"}, {"backward": "implicit", "objective": "transport"}, {}]
    for mode, (n, m, d) in zip(modes, [(193, 250, 20), (250, 193, 3), (200, 193, 64)], strict=True):
        c = clouds(rng, n, m, d, dtype=dtype)
        options = {**mode, "cost": cost, "n_iters": 3}
        eps, found = 0.3 * float(otloss.cost_matrix(c.x, c.y, cost).mean()), []
        for given, method in ((c, "dense"), (c.double(), "reference")):
            value = given.require_grad().loss(eps, method=method, **options)
            found.append((value, *given.grads(value)))
        close(*found, tol, floor=1e-3 * eps)


# -------------------------------------------------------------------------------------- unrolled


@pytest.mark.parametrize("n", [1, 2, 5, 16, 35])
@pytest.mark.parametrize("m", [1, 3, 8, 16, 41])
def test_unrolled_at_every_block_shape(n, m, rng):
    inputs = [t.requires_grad_() for t in (randn(rng, n, m).abs(), randn(rng, n), randn(rng, m))]
    v, found = torch.linspace(-1, 2, m, dtype=torch.float64), []
    C, (a, b) = inputs[0], map(simplex, inputs[1:])
    result = otloss.solve(C, 0.5, a=a, b=b, n_iters=3)
    for f, g in (result.potentials, oracle.iterate(C, a, b, 0.5, 3)[-1]):
        found.append(grad(f.square().sum() + (g * v).sum(), inputs, retain_graph=True))
    assert relative(*found) < 1e-10


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-4), (torch.float64, 1e-9)], ids=name)
def test_unrolled_from_a_cold_start_at_small_eps(dtype, tol, rng):
    """exp((g' - g) / eps) overflows in the first iteration."""
    c, eps = clouds(rng, 30, 26, 3, weights="random"), 0.05
    exact = [t.requires_grad_() for t in (4 * oracle.cost(c.x, c.y, "sqeuclidean"), c.a, c.b)]
    truth = oracle.unrolled_term(*exact, eps, "regularized", 3).grads(*exact)
    given = [t.detach().to(dtype).requires_grad_() for t in exact]
    value = otloss.solve(given[0], eps, a=given[1], b=given[2], n_iters=3).value
    close(grad(value, given), truth, tol)


@pytest.mark.parametrize("method", ["dense", "reference"])
def test_unrolled_from_given_potentials(method, rng):
    C, f0, g0 = randn(rng, 9, 6).abs().requires_grad_(), randn(rng, 9), randn(rng, 6)
    a, b = (torch.full((k,), 1 / k, dtype=torch.float64) for k in (9, 6))
    f = oracle.softmin(C, g0, b, 1.0)
    expected = grad((a * f).sum() + (b * oracle.softmin(C.T, f, a, 1.0)).sum(), C)
    value = otloss.solve(C, 1.0, n_iters=1, init=(f0, g0), method=method).value
    assert relative(grad(value, C), expected) < 1e-10


def test_unrolled_stopped_early_is_not_the_envelope(rng):
    c = clouds(rng, 20, 20, 3).require_grad()
    modes = ("unrolled", "envelope")
    found = [c.grads(c.loss(0.3, debiased=False, n_iters=2, backward=mode)) for mode in modes]
    assert relative(*found) > 1e-3


# ------------------------------------------------------------------------ without a solve


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("shape", [(4, 3, 2), (3, 5, 20)], ids=str)
def test_cost_matrix(shape, cost, rng):
    n, m, d = shape
    x, y, batch = (randn(rng, *s).requires_grad_() for s in ((n, d), (m, d), (2, n, d)))

    def matrix(x: Tensor, y: Tensor) -> Tensor:
        return otloss.cost_matrix(x, y, cost)

    assert gradcheck(matrix, (x, y), **CHECK)
    assert gradgradcheck(matrix, (x, y), fast_mode=d > 2)
    assert gradcheck(lambda x: matrix(x, x).triu(1), (x,), **CHECK)
    assert gradcheck(lambda b: matrix(b, b.flip(1) + 1), (batch,), **CHECK)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cost", COSTS)
def test_energy_distance(cost, method, rng):
    c = clouds(rng, 5, 4, 2, weights="random").require_grad()

    def energy(*tensors: Tensor) -> Tensor:
        return Clouds(*tensors).energy(cost=cost, method=method)

    assert gradcheck(energy, c.inputs(), **CHECK)
    assert gradgradcheck(energy, c.inputs(), fast_mode=method != "dense")


# ------------------------------------------------------------------------------ what a graph does


def test_the_incoming_gradient_scales_and_selects(rng):
    """A batch's losses enter a sum with any weights, 0 included."""
    c = clouds(rng, 5, 4, 2, batch=3).require_grad()
    loss, factor = c.loss(0.5), torch.tensor([2.0, 0.0, -3.0], dtype=torch.float64)
    each = [grad(loss[k], c.x, retain_graph=True)[0] for k in range(3)]
    (found,) = grad(loss, c.x, factor)
    assert_close(found, sum(w * g for w, g in zip(factor, each, strict=True)))
    assert not each[0][1].any()  # the problems of a batch do not touch


def test_x_is_y_collects_both_sides(rng):
    """One tensor in both roles: its gradient is the sum of what two copies get."""
    x, left, right = (t.requires_grad_() for t in randn(rng, 1, 6, 2).repeat(3, 1, 1).unbind())
    (found,) = grad(otloss.sinkhorn_loss(x, x, 0.5, tol=1e-9), x)
    apart = grad(otloss.sinkhorn_loss(left, right, 0.5, tol=1e-9), (left, right))
    assert_close(found, apart[0] + apart[1], rtol=1e-6, atol=1e-9)


def test_only_what_is_asked_for(rng):
    c = clouds(rng, 5, 4, 2, weights="random")
    c.y.requires_grad_()
    c.loss(0.5).backward()
    assert [t.grad is None for t in c.inputs()] == [True, False, True, True]


def test_no_graph_without_gradients(rng):
    c = clouds(rng, 5, 4, 2)
    assert not c.loss(0.5).requires_grad
    c.require_grad()
    with torch.no_grad():
        loss, result, energy = c.loss(0.5), c.solve(0.5), c.energy()
    for t in (loss, energy, result.value, result.plan, *result.potentials):
        assert not t.requires_grad
        assert t.grad_fn is None
    with torch.inference_mode():
        assert c.loss(0.5).is_inference()


def test_backward_twice_and_retained(rng):
    c = clouds(rng, 5, 4, 2).require_grad()
    loss = c.loss(0.5)
    loss.backward(retain_graph=True)
    first = c.x.grad.clone()
    loss.backward()
    assert_close(c.x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_changing_an_input_in_place_is_noticed(rng):
    x, y = randn(rng, 5, 2).requires_grad_(), randn(rng, 4, 2)
    loss = otloss.sinkhorn_divergence(x, y, 0.5)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weight_gradients_follow_the_convention(rng):
    """dOT/da = f - eps/2 and dOT/db = g - eps/2 with <a, f> = <b, g>, so neither side holds the
    constant; for any total mass."""
    c = clouds(rng, 6, 5, 2, weights="random")
    for total in (1.0, 3.0):
        d = Clouds(c.x, c.y, total * c.a, total * c.b).require_grad()
        result = d.solve(0.5, tol=1e-10)
        f, g = grad(result.value, (d.a, d.b))
        assert_close(f, result.potentials[0] - 0.25)
        assert_close(g, result.potentials[1] - 0.25)
        assert_close((d.a * result.potentials[0]).sum(), result.value / 2)


@pytest.mark.parametrize("kw", [{}, {"n_iters": 3}, {"objective": "transport"}])
def test_first_order_in_a_graph(kw, rng):
    c = clouds(rng, 7, 5, 3).require_grad()
    loss = c.loss(1.0, **kw)
    assert_close(
        *(grad(loss, c.inputs(), create_graph=kept) for kept in (True, False)), rtol=0, atol=0
    )


def test_third_order_of_iterations(rng):
    """Also where the weights are computed from the points."""
    x, y = randn(rng, 4, 2).requires_grad_(), randn(rng, 3, 2)

    def slope(x: Tensor) -> Tensor:
        loss = otloss.sinkhorn_loss(x, y, 1.0, a=x.sum(-1).softmax(0), n_iters=2)
        return grad(loss, x, create_graph=True)[0]

    assert gradgradcheck(slope, x)


def test_third_order_is_refused(rng):
    c = clouds(rng, 7, 5, 3).require_grad()
    (first,) = grad(c.loss(1.0, debiased=False), c.x, create_graph=True)
    (second,) = grad(first.square().sum(), c.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        grad(second.sum(), c.x)


def test_envelope_has_no_gradient_of_potentials(rng):
    result = clouds(rng, 7, 5, 3).require_grad().solve(1.0, backward="envelope")
    with pytest.raises(NotImplementedError, match='"implicit"'):
        result.potentials[0].sum().backward()


@pytest.mark.parametrize("kw", [{"n_iters": 2}, {"objective": "transport"}, {}], ids=str)
def test_second_derivatives_past_the_budget_are_refused(kw, rng, monkeypatch):
    monkeypatch.setattr(otloss.method, "dense_budget", 100)
    c = clouds(rng, 7, 5, 3).require_grad()
    loss = c.loss(1.0, method="streamed", **kw)
    (only,) = grad(loss, c.x, retain_graph=True)
    (first,) = grad(loss, c.x, create_graph=True)
    assert torch.equal(first, only)
    with pytest.raises(NotImplementedError, match='method="dense"'):
        first.sum().backward()


def test_a_nearly_singular_system_stays_finite():
    """Two far pairs at tiny eps: mass that cannot move leaves differences undetermined."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float32)
    C = (x - x.T).square().requires_grad_()
    result = otloss.solve(C, 0.011, backward="implicit")
    result.potentials[0].square().sum().backward()
    assert bool(C.grad.isfinite().all())


@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")  # of the singular system
def test_clusters_that_exchange_nothing():
    """The linear system is singular to rounding; gradients and second derivatives are not."""
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)
        cluster = torch.tensor([0.0, 0, 0, 100, 100, 100, -100, -100]).double()[:, None]
        x, y = (randn(rng, 8, 2) + cluster for _ in range(2))
        x.requires_grad_()
        grads = []
        for method in ("reference", "dense"):
            options: dict[str, Any] = {"objective": "transport", "method": method, "tol": 1e-9}
            loss = otloss.sinkhorn_loss(x, y, 0.1, **options)
            grads.append(grad(loss, x, create_graph=True)[0])
        assert relative(grads[:1], grads[1:]) < 1e-6
        assert all(grad(t[0, 0], x)[0].isfinite().all() for t in grads)


@pytest.mark.parametrize("method", ["dense", "streamed"])
def test_a_system_of_rounding_warns_of_nothing(method):
    """Marginals that are constraints depend on no point: all of the right-hand side cancels."""
    x, y = (randn(torch.Generator().manual_seed(k), n, 2) for k, n in ((3, 60), (4, 50)))
    result = otloss.solve_sample(
        x.requires_grad_(), y, 0.005, tol=1e-9, max_iters=20_000, method=method
    )
    found = torch.autograd.grad((result.marginals[0] * y[0, 0] * x.detach()[:, 0]).sum(), x)
    assert float(found[0].abs().max()) < 1e-10


@some_of("backend", [name for name in BACKENDS if name != "reference"])  # which has no iterations
def test_the_result_tells_how_the_linear_system_went(backend, rng):
    c = clouds(rng, 6, 5, 2, batch=2).to(backend.device).require_grad()
    options = {"tol": 1e-10, "max_iters": 10_000, "method": backend.method}
    result = c.solve(0.5, **options)
    result.value.sum().backward(retain_graph=True)
    assert result.linear_system is None  # the gradient of the value needs none
    result.plan.square().sum().backward()
    iterations, residual = result.linear_system
    assert iterations.shape == residual.shape == (2,)
    assert bool((iterations > 0).all() and (residual <= 1e-6).all())
    single = c.item(0).require_grad().solve(0.5, objective="transport", method=backend.method)
    single.value.backward()
    iterations, residual = single.linear_system
    assert isinstance(iterations, int)
    assert 0 <= residual <= 1e-6
