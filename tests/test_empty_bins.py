"""Weights of 0: an empty bin has a one-sided derivative, padding has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import BACKENDS, CPU
from helpers import COSTS, STRENGTHS, Clouds, close, clouds, randn, some_of
from torch import Tensor

import otloss

EXACT = {"tol": 1e-13, "max_iters": 20_000}
MODES: dict[str, dict[str, Any]] = {
    "envelope": {**EXACT, "backward": "envelope"},
    "implicit": {**EXACT, "backward": "implicit"},
    "unrolled": {"n_iters": 5, "backward": "unrolled"},
}
LOSSES = ["sinkhorn_loss", "sinkhorn_divergence"]


def with_bins(rng: torch.Generator, *, batch: int | None = None) -> Clouds:
    """Histograms with two empty bins each, among the other points."""
    c = clouds(rng, 9, 8, 2, weights="random", batch=batch)
    for x, w in ((c.x, c.a), (c.y, c.b)):
        x[..., 2, :], x[..., 5, :] = x[..., :2, :].mean(-2), x[..., 3:5, :].mean(-2)
        w[..., 2] = w[..., 5] = 0
        w /= w.sum(-1, keepdim=True)
    return c


def moves(c: Clouds) -> tuple[Tensor, Tensor]:
    """Changes of the weights that fill empty bins and keep the totals."""
    change = [torch.zeros_like(w) for w in (c.a, c.b)]
    for v, size in zip(change, (1.0, 0.5), strict=True):
        v[..., 2], v[..., 5], v[..., 0], v[..., 4] = size, 1.0, -1.0, -size
    return change[0], change[1]


def one_sided(function: Callable[[Tensor, Tensor], Tensor], c: Clouds, h: float = 2e-6) -> float:
    """Its derivative along ``moves``, of fourth order in h."""
    u, v = moves(c)
    with torch.no_grad():
        values = [float(function(c.a + k * h * u, c.b + k * h * v)) for k in range(5)]
    factors = (-25 / 12, 4.0, -3.0, 4 / 3, -1 / 4)
    return sum(f * value for f, value in zip(factors, values, strict=True)) / h


def by_autograd(function: Callable[[Tensor, Tensor], Tensor], c: Clouds) -> float:
    a, b = c.a.clone().requires_grad_(), c.b.clone().requires_grad_()
    grads = torch.autograd.grad(function(a, b), (a, b))
    return float(sum((g * v).sum() for g, v in zip(grads, moves(c), strict=True)))


def check(function: Callable[[Tensor, Tensor], Tensor], c: Clouds, tol: float = 4e-8) -> None:
    expected = one_sided(function, c)
    assert by_autograd(function, c) == pytest.approx(expected, abs=tol, rel=tol)


def cost_of(u: Tensor, v: Tensor) -> Tensor:
    return (u.unsqueeze(-2) - v.unsqueeze(-3)).square().sum(-1)


# ----------------------------------------------------------------------------------- of values


@some_of(
    "backend, mode, objective, strength, loss",
    BACKENDS, [*MODES], ["regularized", "transport"], [None, *STRENGTHS], LOSSES, whole=3,
)  # fmt: skip
def test_losses(backend, mode, objective, strength, loss, rng):
    if mode == "envelope":  # of the transport objective it is another gradient
        objective = "regularized"
    c = with_bins(rng).to(backend.device)
    options = {"objective": objective, "unbalanced": strength, "method": backend.method}

    def value(a: Tensor, b: Tensor) -> Tensor:
        return getattr(otloss, loss)(c.x, c.y, 1.0, a=a, b=b, **options, **MODES[mode])

    check(value, c)


@pytest.mark.parametrize("method", CPU)
def test_beside_a_point_that_is_too_far(method, rng):
    """Soft marginals leave its mass where it is: the plan takes nothing of it."""
    c = with_bins(rng)
    c.x[1] = 100
    options = {"objective": "transport", "unbalanced": 0.5, "method": method, **MODES["implicit"]}
    check(lambda a, b: otloss.sinkhorn_divergence(c.x, c.y, 0.5, a=a, b=b, **options), c)


def test_known_number():
    """Mass that comes to an empty bin: the value rises, as differences say."""
    rng = torch.Generator().manual_seed(0)
    x, y = randn(rng, 12, 3), randn(rng, 9, 3) + 0.5
    x[3] = x[0] + 1.0
    a, b = torch.full((12,), 1 / 11).double(), torch.full((9,), 1 / 9).double()
    a[3] = 0
    weights = a.clone().requires_grad_()
    loss = otloss.sinkhorn_loss(x, y, 0.3, a=weights, b=b, tol=1e-12)
    (grad,) = torch.autograd.grad(loss, weights)
    move = torch.zeros(12).double()
    move[3], move[0] = 1, -1
    with torch.no_grad():
        low, middle, high = (
            float(otloss.sinkhorn_loss(x, y, 0.3, a=a + h * move, b=b, tol=1e-12))
            for h in (0.0, 1e-5, 2e-5)
        )
    assert float(grad @ move) == pytest.approx((-3 * low + 4 * middle - high) / 2e-5, rel=1e-6)


@some_of("backend, mode", ["dense", "reference"], [*MODES])
@pytest.mark.parametrize("symmetric", [True, False])
def test_cost_functions(backend, mode, symmetric, rng):
    c = with_bins(rng)
    method = "dense" if backend.method == "streamed" else backend.method
    # W near 1 and eps of the costs' size: shorter differences would be needed elsewhere.
    W = torch.eye(2).double()
    if not symmetric:
        W = W + 0.3 * randn(rng, 2, 2)

    def value(a: Tensor, b: Tensor) -> Tensor:
        return otloss.sinkhorn_divergence(
            c.x, c.y, 4.0, a=a, b=b, cost=lambda u, v: cost_of(u, v @ W),
            method=method, **MODES[mode],
        )  # fmt: skip

    check(value, c)


@some_of("backend, cost", BACKENDS, [*COSTS, cost_of])
def test_energy_distance(backend, cost, rng):
    """Twice in the weights, in which it is bilinear."""
    if callable(cost) and (backend.emulated or backend.method == "streamed"):
        cost = "euclidean"  # of a function there is no kernel
    c = with_bins(rng).to(backend.device)

    def value(a: Tensor, b: Tensor, x: Tensor = c.x) -> Tensor:
        return otloss.energy_distance(x, c.y, a=a, b=b, cost=cost, method=backend.method)

    def slope(a: Tensor, b: Tensor, x: Tensor = c.x) -> Tensor:
        if not a.requires_grad:
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        with torch.enable_grad():
            grads = torch.autograd.grad(value(a, b, x), (a, b), create_graph=True)
        return sum((g * v).sum() for g, v in zip(grads, moves(c), strict=True))

    check(value, c)
    check(slope, c)
    x = c.x.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="empty bins"):
        torch.autograd.grad(slope(c.a, c.b, x), x)


@some_of("backend, how, n_iters", CPU, ["samples", "matrix", "function"], [None, 4])
@pytest.mark.parametrize("strength", [None, (0.5, 2.0)], ids=str)
def test_results(backend, how, n_iters, strength, rng):
    """Any function of the value, the plan and what is read from it."""
    c = with_bins(rng)
    u, v, W = randn(rng, 9), randn(rng, 8), randn(rng, 9, 8)
    options = {"unbalanced": strength, "method": backend.method, "n_iters": n_iters, **EXACT}
    if backend.method == "streamed":
        how = "samples"
    if how == "function":
        options["cost"] = cost_of

    def value(a: Tensor, b: Tensor) -> Tensor:
        if how == "matrix":
            r = otloss.solve(cost_of(c.x, c.y), 0.5, a=a, b=b, **options)
        else:
            r = otloss.solve_sample(c.x, c.y, 0.5, a=a, b=b, **options)
        f, g = r.potentials
        of_places = (u * f)[c.a > 0].sum() + (v * g)[c.b > 0].sum()  # 0 at weight 0, then not
        row, column = r.marginals
        of_plan = (W * r.plan).sum() + (W * r.plan.square()).sum() + u @ row + v @ column
        return r.value + of_places + of_plan + u @ r.apply(v) + r.value_linear

    check(value, c, 5e-7)


# ------------------------------------------------------------------------ padding, other devices


@some_of("backend, mode", CPU, [*MODES])
def test_padding_and_empty_bins_in_a_batch(backend, mode, rng):
    """Each problem on its own: what is padding in one is an empty bin in another."""
    c = with_bins(rng, batch=3)
    c.x[0, 2], c.x[1, 5], c.y[2, 2:6:3] = math.nan, math.inf, math.nan
    c.x[2, 5] = 1e200  # so far that its cost overflows
    c.require_grad()
    options = {"method": backend.method, **MODES[mode]}
    loss = otloss.sinkhorn_divergence(c.x, c.y, 0.5, a=c.a, b=c.b, **options)
    grads = torch.autograd.grad(loss.sum(), c.inputs())
    for k in range(3):
        one = c.item(k).require_grad()
        alone = otloss.sinkhorn_divergence(one.x, one.y, 0.5, a=one.a, b=one.b, **options)
        for grad, expected in zip(grads, torch.autograd.grad(alone, one.inputs()), strict=True):
            torch.testing.assert_close(grad[k], expected, rtol=1e-6, atol=1e-8)
    empty_a, empty_b = grads[2][:, [2, 5]] != 0, grads[3][:, [2, 5]] != 0
    assert empty_a.tolist() == [[False, True], [True, False], [True, False]]
    assert empty_b.tolist() == [[True, True], [True, True], [False, False]]


@some_of("backend, mode, objective", CPU, [*MODES], ["regularized", "transport"])
def test_where_data_is_not_read(backend, mode, objective, rng, monkeypatch):
    """As on a GPU or in a compiled graph, where all rows are computed."""
    c = with_bins(rng)
    c.x[5] = math.nan

    def grads() -> Any:
        leaves = Clouds(c.x, c.y, c.a, c.b).double().require_grad()
        loss = otloss.sinkhorn_divergence(
            leaves.x, leaves.y, 0.5, a=leaves.a, b=leaves.b, objective=objective,
            method=backend.method, **MODES[mode],
        )  # fmt: skip
        return torch.autograd.grad(loss, leaves.inputs())

    expected = grads()
    monkeypatch.setattr("otloss._check.readable", lambda t: False)
    for grad, truth in zip(grads(), expected, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", [*MODES])
def test_far_bins_cost_near_ones_nothing(mode, rng):
    """In float32, where the far one moves the centre of the clouds."""
    c = with_bins(rng)
    c.x[5] = 1e6
    options = {**MODES[mode], **({} if mode == "unrolled" else {"tol": 1e-5})}
    grads = []
    for dtype in (torch.float32, torch.float64):
        x, y, a, b = (t.detach().to(dtype) for t in c.inputs())
        a.requires_grad_()
        loss = otloss.sinkhorn_loss(x, y, 0.5, a=a, b=b, **options)
        grads.append(torch.autograd.grad(loss, a)[0])
        grads.append(torch.autograd.grad(otloss.energy_distance(x, y, a=a, b=b), a)[0])
    near = torch.arange(9) != 5
    for grad, truth in zip(grads[:2], grads[2:], strict=True):
        close(grad[near], truth[near], 1e-4)
        assert float(grad[5]) == pytest.approx(float(truth[5]), rel=1e-4, abs=1.0)


@pytest.mark.parametrize("options", [{}, {"unbalanced": 1.0}, {"n_iters": 3}], ids=str)
@pytest.mark.parametrize("method", CPU)
def test_nothing_of_a_result_depends_on_padding(method, options, rng):
    x, y, a = randn(rng, 6, 2), randn(rng, 5, 2), torch.full((6,), 0.2).double()
    x[1], a[1] = math.nan, 0.0
    for t in (x, a):
        t.requires_grad_()
    result = otloss.solve_sample(x, y, 0.5, a=a, method=method, **options)
    read = (
        result.value, result.value_linear, result.plan, *result.marginals, *result.potentials,
        result.barycentric_map(), result.apply(y),
    )  # fmt: skip
    for tensor in read:
        for grad in torch.autograd.grad(tensor.sum(), [x, a], retain_graph=True):
            assert bool((grad[1] == 0).all())
            assert bool(grad.isfinite().all())


@pytest.mark.parametrize("content", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["dense", "reference"])
def test_padding_of_a_cost_matrix(method, content, rng):
    c = with_bins(rng).require_grad()
    C = cost_of(c.x, c.y).detach()
    C[2], C[:, 5] = content, content
    result = otloss.solve(C, 0.5, a=c.a, b=c.b, method=method)
    read = result.value + result.plan.square().sum() + result.value_linear
    for grad, hidden, empty in zip(
        torch.autograd.grad(read, (c.a, c.b)), (2, 5), (5, 2), strict=True
    ):
        assert float(grad[hidden]) == 0
        assert math.isfinite(float(grad[empty]))
        assert float(grad[empty]) != 0


# ------------------------------------------------------------------------------ second derivatives


@pytest.mark.parametrize(
    "options", [EXACT, {"objective": "transport", **EXACT}, {"n_iters": 3}], ids=str
)
@pytest.mark.parametrize("method", CPU)
def test_second_derivatives(method, options, rng, monkeypatch):
    """Not in weights of empty bins; where data is not read NaN says so."""
    c = with_bins(rng).require_grad()

    def grads() -> Any:
        loss = otloss.sinkhorn_divergence(c.x, c.y, 0.5, a=c.a, b=c.b, method=method, **options)
        return torch.autograd.grad(loss, (c.x, c.a), create_graph=True)

    of_x, of_a = grads()
    counted = c.a > 0
    (expected,) = torch.autograd.grad(
        of_x.square().sum() + of_a[counted].sum(), c.x, retain_graph=True
    )
    assert bool(expected.isfinite().all())
    with pytest.raises(NotImplementedError, match=r"empty bins.*NaN"):
        torch.autograd.grad(of_x.square().sum(), c.a, retain_graph=True)
    with pytest.raises(NotImplementedError, match=r"empty bins.*NaN"):
        torch.autograd.grad(of_a.sum(), c.x)
    monkeypatch.setattr("otloss._check.readable", lambda t: False)
    of_x, of_a = grads()
    (twice,) = torch.autograd.grad(
        of_x.square().sum() + of_a[counted].sum(), c.x, retain_graph=True
    )
    torch.testing.assert_close(twice, expected)
    (twice,) = torch.autograd.grad(of_x.square().sum(), c.a, retain_graph=True)
    assert bool(twice[~counted].isnan().all())
    (twice,) = torch.autograd.grad(of_a.sum(), c.x)
    assert bool(twice[counted].isnan().all())


def test_second_derivatives_beside_padding(rng):
    """Those of the problem without it, and 0."""
    c = with_bins(rng)
    c.x[c.a == 0], c.y[c.b == 0] = math.nan, math.nan
    bare = Clouds(c.x[c.a > 0], c.y[c.b > 0], c.a[c.a > 0], c.b[c.b > 0])
    found = []
    for clouds_of in (c.double().require_grad(), bare.double().require_grad()):
        x, y, a, b = clouds_of.inputs()
        loss = otloss.sinkhorn_divergence(x, y, 0.5, a=a, b=b, **EXACT)
        first = torch.autograd.grad(loss, (x, a), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, a)))
    for grad, truth in zip(*found, strict=True):
        torch.testing.assert_close(grad[c.a > 0], truth, rtol=1e-6, atol=1e-8)
        assert not bool(grad[c.a == 0].any())
