"""Every gradient mode against autograd through a plain loop, finite differences and the others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends import BACKENDS
from helpers import COSTS, METHODS, STRENGTHS, randn, solved, some_of
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import otloss
from otloss import ops, reference

OBJECTIVES = ("regularized", "transport")
TIGHT: dict[str, Any] = {"tol": 1e-13, "max_iters": 20000}
EXACT = 1e-10
HARD = (math.inf, math.inf)  # rho_x, rho_y


def leaves_of(
    n: int = 7, m: int = 5, d: int = 3, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """x, y and logits of a, b, float64."""
    rng = torch.Generator().manual_seed(seed)
    tensors = (randn(rng, *shape) for shape in ((n, d), (m, d), (n,), (m,)))
    return tuple(t.to(device).requires_grad_() for t in tensors)


def eps_of(cost: str) -> float:
    return 0.3 if cost == "cosine" else 1.0


def relative(left: Any, right: Any) -> float:
    scale = max(float(r.detach().norm()) for r in right)
    return max(float((p - q).detach().norm()) for p, q in zip(left, right, strict=True)) / scale


def plain_loop(C: Tensor, a: Tensor, b: Tensor, eps: float, L: int) -> tuple[Tensor, Tensor]:
    """Sinkhorn as papers write it, from zero potentials."""
    g = torch.zeros_like(b)
    for _ in range(L):
        f = -eps * torch.logsumexp(b.log() + (g - C) / eps, dim=-1)
        g = -eps * torch.logsumexp(a.log() + (f - C.mT) / eps, dim=-1)
    return f, g


def plain_value(
    C: Tensor, a: Tensor, b: Tensor, eps: float, L: int, objective: str = "regularized"
) -> Tensor:
    f, g = plain_loop(C, a, b, eps, L)
    if objective == "regularized":
        return (a * f).sum() + (b * g).sum()
    P = a[:, None] * b * ((f[:, None] + g - C) / eps).exp()
    return (P * C).sum()


def cost_of(x: Tensor, y: Tensor, cost: str) -> Tensor:
    return reference.cost_between(x[None], y[None], COSTS.index(cost))[0]


# -------------------------------------------------------------------------------------- unrolled


@pytest.mark.parametrize("n", [1, 2, 5, 16, 35])
@pytest.mark.parametrize("m", [1, 3, 8, 16, 41])
def test_unrolled_at_every_block_shape(n, m):
    x, y, la, lb = leaves_of(n, m)
    C = cost_of(x.detach(), y.detach(), "sqeuclidean").requires_grad_()
    v = torch.linspace(-1, 2, m, dtype=torch.float64)
    leaves = (C, la, lb)
    f, g = plain_loop(C, la.softmax(0), lb.softmax(0), 0.5, 3)
    expected = torch.autograd.grad(f.square().sum() + (g * v).sum(), leaves)
    result = otloss.solve(C, 0.5, a=la.softmax(0), b=lb.softmax(0), n_iters=3)
    f, g = result.potentials
    found = torch.autograd.grad(f.square().sum() + (g * v).sum(), leaves)
    assert relative(found, expected) < EXACT


@pytest.mark.parametrize("strength", [0.5, (1e-2, 3.0), (None, 1e-3)], ids=str)
@pytest.mark.parametrize("eps", [0.5, 0.02])
def test_unrolled_of_points_that_are_not_transported(strength, eps):
    """exp(f / rho) overflows, and so may the factors of the columns."""
    x, y, a, b = soft_leaves(30, 26)
    C = 3 * cost_of(x.detach(), y.detach(), "sqeuclidean").requires_grad_()
    leaves, found = (C, a, b), []
    for method in ("dense", "reference"):
        r = otloss.solve(C, eps, a=a, b=b, unbalanced=strength, n_iters=3, method=method)
        f, g = r.potentials
        found.append(torch.autograd.grad(r.value + f.sin().sum() + g.square().sum(), leaves))
    for p, q in zip(*found, strict=True):
        assert relative([p], [q]) < 1e-9


@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=["float64", "float32"]
)
def test_unrolled_from_a_cold_start_at_small_eps(dtype, tol):
    """exp((g' - g) / eps) overflows in the first iteration."""
    x, y, la, lb = leaves_of(30, 26)
    C, eps = 4 * cost_of(x.detach(), y.detach(), "sqeuclidean"), 0.05
    a, b = la.detach().softmax(0), lb.detach().softmax(0)
    exact = [t.clone().requires_grad_() for t in (C, a, b)]
    expected = torch.autograd.grad(plain_value(*exact, eps, 3), exact)
    given = [t.to(dtype).requires_grad_() for t in (C, a, b)]
    value = otloss.solve(given[0], eps, a=given[1], b=given[2], n_iters=3).value
    found = torch.autograd.grad(value, given)
    for p, q in zip(found, expected, strict=True):
        assert relative([p.double()], [q]) < tol


@pytest.mark.parametrize("method", ["dense", "reference"])
def test_unrolled_from_given_potentials(method):
    x, y, _, _ = leaves_of(9, 6)
    C = cost_of(x.detach(), y.detach(), "sqeuclidean").requires_grad_()
    a, b = (torch.full((k,), 1 / k, dtype=torch.float64) for k in (9, 6))
    f0, g0 = torch.randn(9).double(), torch.randn(6).double()
    f = reference.softmin(1.0, C[None], g0[None], b[None])[0]
    g = reference.softmin(1.0, C.mT[None], f[None], a[None])[0]
    expected = torch.autograd.grad((a * f).sum() + (b * g).sum(), C)
    value = otloss.solve(C, 1.0, n_iters=1, init=(f0, g0), method=method).value
    assert relative(torch.autograd.grad(value, C), expected) < EXACT


def test_unrolled_stopped_early_is_not_the_envelope():
    x, y, _, _ = leaves_of(20, 20)
    kw: dict[str, Any] = {"n_iters": 2}
    early = torch.autograd.grad(otloss.sinkhorn_loss(x, y, 0.3, **kw), x)
    held = torch.autograd.grad(otloss.sinkhorn_loss(x, y, 0.3, backward="envelope", **kw), x)
    assert relative(early, held) > 1e-3


# --------------------------------------------------------------------------------- all the modes


@some_of("method, cost, objective", METHODS, COSTS, OBJECTIVES)
def test_modes_agree_at_convergence(method, cost, objective):
    leaves = leaves_of(12, 9)
    x, y, la, lb = leaves

    def gradient(backward: str, **kw: Any) -> tuple[Tensor, ...]:
        a, b = la.softmax(0), lb.softmax(0)
        loss = otloss.sinkhorn_divergence(
            x, y, eps_of(cost), a=a, b=b, cost=cost, objective=objective, backward=backward,
            method=method, **kw,
        )  # fmt: skip
        return torch.autograd.grad(loss, leaves)

    implicit = gradient("implicit", **TIGHT)
    assert relative(gradient("unrolled", n_iters=600), implicit) < 1e-6
    assert relative(gradient("auto", **TIGHT), implicit) == 0
    if objective == "regularized":
        assert relative(gradient("envelope", **TIGHT), implicit) < 1e-9


@some_of(
    "loss, mode, objective, cost",
    ["divergence", "loss"], ["unrolled", "implicit", "envelope"], OBJECTIVES, COSTS, whole=3,
)  # fmt: skip
def test_first_and_second_order(loss, mode, objective, cost):
    leaves = leaves_of(5, 4, 2)
    function = otloss.sinkhorn_divergence if loss == "divergence" else otloss.sinkhorn_loss
    kw: dict[str, Any] = {"n_iters": 3} if mode == "unrolled" else TIGHT

    def call(x: Tensor, y: Tensor, la: Tensor, lb: Tensor) -> Tensor:
        a, b = la.softmax(0), lb.softmax(0)
        return function(
            x, y, eps_of(cost), a=a, b=b, cost=cost, objective=objective, backward=mode, **kw
        )

    if mode != "envelope" or objective == "regularized":  # else the plan is held constant
        assert gradcheck(call, leaves, atol=1e-6, rtol=1e-4)
    assert gradgradcheck(call, leaves, atol=1e-5, rtol=1e-4, fast_mode=True)


def soft_leaves(n: int, m: int, d: int = 2, device: str = "cpu") -> tuple[Tensor, ...]:
    """x, y, a, b: all leaves, and totals that differ."""
    x, y, la, lb = leaves_of(n, m, d, device=device)
    a, b = la.detach().softmax(0), 2.5 * lb.detach().softmax(0)
    return x, y, a.requires_grad_(), b.requires_grad_()


FREE = [  # envelope holds the plan of the transport objective constant
    (mode, objective)
    for mode in ("unrolled", "implicit", "envelope")
    for objective in OBJECTIVES
    if (mode, objective) != ("envelope", "transport")
]


@some_of("which, cost, strength", FREE, COSTS, STRENGTHS[1:], whole=3)
def test_unbalanced_first_and_second_order(which, cost, strength):
    """Every weight is free: nothing ties the totals."""
    mode, objective = which
    kw: dict[str, Any] = {"n_iters": 2} if mode == "unrolled" else TIGHT

    def call(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return otloss.sinkhorn_divergence(
            x, y, eps_of(cost), a=a, b=b, cost=cost, objective=objective, backward=mode,
            unbalanced=strength, **kw,
        )  # fmt: skip

    leaves = soft_leaves(4, 3)
    assert gradcheck(call, leaves, atol=1e-6, rtol=1e-4)
    if cost != "euclidean":
        assert gradgradcheck(call, leaves, atol=1e-5, rtol=1e-4, fast_mode=True)


@some_of("backend, objective, strength", BACKENDS, OBJECTIVES, STRENGTHS)
def test_unbalanced_modes_agree_at_convergence(backend, objective, strength):
    leaves = soft_leaves(12, 9, device=backend.device)

    def gradient(backward: str, **kw: Any) -> tuple[Tensor, ...]:
        x, y, a, b = leaves
        loss = otloss.sinkhorn_divergence(
            x, y, 1.0, a=a, b=b, objective=objective, backward=backward, unbalanced=strength,
            method=backend.method, **kw,
        )  # fmt: skip
        return torch.autograd.grad(loss, leaves)

    implicit = gradient("implicit", **TIGHT)
    assert relative(gradient("auto", **TIGHT), implicit) == 0
    if strength != STRENGTHS[2] and strength != STRENGTHS[3]:
        assert relative(gradient("unrolled", n_iters=300), implicit) < 1e-6
    if objective == "regularized":
        assert relative(gradient("envelope", **TIGHT), implicit) < 1e-9


@pytest.mark.parametrize("strength", [None, *STRENGTHS], ids=str)
def test_results_are_differentiable_through_the_solution(strength):
    """Finite differences on the solved problem, twice. Soft potentials need no convention."""
    leaves = leaves_of(5, 4, 2) if strength is None else soft_leaves(4, 3)
    x_new = leaves_of(2, 1, 2, seed=5)[0].detach()

    def outputs(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if strength is None:
            a, b = a.softmax(0), b.softmax(0)
        r = otloss.solve_sample(x, y, 1.0, a=a, b=b, unbalanced=strength, **TIGHT)
        f, g = r.potentials
        row, column = r.marginals
        parts = (
            r.value + 3 * r.value_linear + f.sin().sum() + g.cos().sum(),
            (r.plan.square() * torch.arange(len(y))).sum() + row.square().sum() + column.norm(),
            r.barycentric_map().square().sum() + r.extend(x_new).square().sum(),
        )
        return torch.stack(parts)

    assert gradcheck(outputs, leaves, atol=1e-6, rtol=1e-4)
    assert gradgradcheck(
        lambda *leaves: outputs(*leaves)[:2], leaves, atol=1e-5, rtol=1e-4, fast_mode=True
    )


@pytest.mark.parametrize("kw", [{"n_iters": 5}, TIGHT], ids=["unrolled", "implicit"])
def test_minibatch_energy_distance(kw):
    four = [
        t.detach().requires_grad_() for t in (*leaves_of(6, 6, 3)[:2], *leaves_of(6, 6, 3, 1)[:2])
    ]

    def call(*tensors: Tensor) -> Tensor:
        return otloss.minibatch_energy_distance(*tensors, 0.3, backward="auto", **kw)

    assert gradcheck(call, four, atol=1e-6, rtol=1e-4)
    held = otloss.minibatch_energy_distance(*four, 0.3, **TIGHT)
    envelope = otloss.minibatch_energy_distance(*four, 0.3, backward="envelope", **TIGHT)
    pair = [torch.autograd.grad(loss, four) for loss in (held, envelope)]
    assert relative(*pair) == 0


@pytest.mark.parametrize("mode", ["unrolled", "implicit"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_and_padding(mode, objective):
    """Problems of a batch do not see each other, nor what stands in points of weight 0."""
    kw: dict[str, Any] = {"n_iters": 4} if mode == "unrolled" else TIGHT
    sizes, n, m = ((6, 5), (4, 7), (7, 3)), 8, 9
    x, y = torch.full((3, n, 2), math.nan).double(), torch.full((3, m, 2), math.inf).double()
    a, b = torch.zeros(3, n).double(), torch.zeros(3, m).double()
    alone = []
    for k, (p, q) in enumerate(sizes):
        one = [t.detach() for t in leaves_of(p, q, 2, k)]
        x[k, :p], y[k, :q], a[k, :p], b[k, :q] = *one[:2], one[2].softmax(0), one[3].softmax(0)
        one = [t.clone().requires_grad_() for t in (x[k, :p], y[k, :q], a[k, :p], b[k, :q])]
        loss = otloss.sinkhorn_divergence(
            *one[:2], 1.0, a=one[2], b=one[3], objective=objective, backward=mode, **kw
        )
        alone.append(torch.autograd.grad((k + 1) * loss, one))
    batch = [t.requires_grad_() for t in (x, y, a, b)]
    loss = otloss.sinkhorn_divergence(x, y, 1.0, a=a, b=b, objective=objective, backward=mode, **kw)
    grads = torch.autograd.grad(loss @ torch.arange(1.0, 4).double(), batch)
    for k, sizes_k in enumerate(sizes):
        for grad, expected, size in zip(grads, alone[k], sizes_k * 2, strict=True):
            assert relative([grad[k, :size]], [expected]) < 1e-9
            assert not grad[k, size:].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_implicit_in_float32(objective):
    x, y, la, lb = (t.detach() for t in leaves_of(60, 50, 3))

    def gradient(dtype: torch.dtype, tol: float) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, y, la, lb)]
        a, b = leaves[2].softmax(0), leaves[3].softmax(0)
        loss = otloss.sinkhorn_divergence(
            *leaves[:2], 0.5, a=a, b=b, objective=objective, backward="implicit", tol=tol,
            max_iters=20000,
        )  # fmt: skip
        return [grad.double() for grad in torch.autograd.grad(loss, leaves)]

    pairs = zip(gradient(torch.float32, 2e-6), gradient(torch.float64, 1e-13), strict=True)
    for found, expected in pairs:
        assert relative([found], [expected]) < 1e-3


# --------------------------------------------------------------------------------- the operations


def problem(
    dtype: torch.dtype, eps: float, objective: int, L: int, rho: tuple[float, float] = HARD
) -> tuple[Any, ...]:
    """Three pairs, one of a cloud with itself, with padding, and random gradients from outside."""
    make = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, k, 3, generator=make, dtype=dtype) for k in (21, 34))
    a, b = (torch.rand(2, k, generator=make, dtype=dtype) + 0.1 for k in (21, 34))
    a[:, :2] = 0
    b[0, -5:] = 0
    weights = [a / a.sum(-1, True), b / b.sum(-1, True)]
    pairs, coefficients = [0, 1, 0, 0, 1, 0], [1.0, -0.5, 2.0]
    costs = ops.cost([x, y], weights, pairs, 0)
    given = ops.problems(
        weights, pairs, coefficients, eps, costs=costs, rho=rho, objective=objective
    )
    loss, _, f, g, traces, _ = solved(given, tol=1e-12, max_iters=20000, n_iters=L, trace=L > 0)
    outside = [[torch.randn(t.shape, generator=make, dtype=dtype) for t in side] for side in (f, g)]
    return (torch.randn_like(loss), *outside), given, f, g, traces


@pytest.mark.parametrize("rho", [HARD, (1.0, 0.1), (math.inf, 3.0)])
@pytest.mark.parametrize("objective", [0, 1])
@pytest.mark.parametrize("eps", [1.0, 0.05])
def test_operations_agree_with_their_reference(eps, objective, rho):
    wanted = ([0, 1, 2], [], True)
    seeds, given, _, _, traces = problem(torch.float64, eps, objective, 5, rho)
    for outside in (seeds, (seeds[0], [], [])):
        arguments = (*outside, *given, [], traces, *wanted)
        found, expected = ops.unrolled_backward(*arguments), reference.unrolled_backward(*arguments)
        for p, q in zip(found, expected, strict=True):
            assert len(p) == len(q)
            assert not q or relative(p, q) < EXACT
    seeds, given, f, g, _ = problem(torch.float64, eps, objective, -1, rho)
    arguments = (*seeds, *given, f, g, *wanted)
    held = (seeds[0], *given, f, g, *wanted)
    torch.testing.assert_close(ops.envelope_backward(*held), reference.envelope_backward(*held))
    *found, status = ops.implicit_backward(*arguments)
    *expected, _ = reference.implicit_backward(*arguments)
    for p, q in zip(found, expected, strict=True):
        assert len(p) == len(q)
        assert not q or relative(p, q) < 1e-8  # a residual of 1e-13 times the system's condition
    assert status.shape == (3, 2, 2)
    assert bool((status[..., 0] > 0).all())
    assert float(status[..., 1].max()) < 1e-12


def test_operations_leave_out_what_is_not_wanted():
    seeds, given, _, _, traces = problem(torch.float64, 1.0, 1, 4)
    some = ops.unrolled_backward(*seeds, *given, [], traces, [1], [], False)
    assert [len(grads) for grads in some] == [1, 0, 0, 0]
    every = ops.unrolled_backward(*seeds, *given, [], traces, [0, 1, 2], [], True)
    torch.testing.assert_close(some[0][0], every[0][1])
    weights = ops.unrolled_backward(*seeds, *given, [], traces, [], [], True)
    assert not weights[0]
    torch.testing.assert_close(weights[2:], every[2:])


# -------------------------------------------------------------------------- graphs of the backward


@pytest.mark.parametrize("kw", [{}, {"n_iters": 3}, {"objective": "transport"}])
def test_first_order_in_a_graph(kw):
    x, y, _, _ = leaves_of()
    loss = otloss.sinkhorn_divergence(x, y, 1.0, **kw)
    (kept,) = torch.autograd.grad(loss, x, create_graph=True)
    (plain,) = torch.autograd.grad(otloss.sinkhorn_divergence(x, y, 1.0, **kw), x)
    torch.testing.assert_close(kept.detach(), plain)


def test_third_order_is_refused():
    x, y, _, _ = leaves_of()
    (first,) = torch.autograd.grad(otloss.sinkhorn_loss(x, y, 1.0), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad(second.sum(), x)


def test_energy_distance_and_cost_matrix_twice():
    x, y, la, lb = leaves_of(5, 4, 2)
    a, b = (w.detach().softmax(0).requires_grad_() for w in (la, lb))
    for cost in COSTS:
        assert gradgradcheck(lambda x, y, cost=cost: otloss.cost_matrix(x, y, cost), (x, y))
        assert gradgradcheck(
            lambda x, y, a, b, cost=cost: otloss.energy_distance(x, y, a=a, b=b, cost=cost),
            (x, y, a, b),
        )  # fmt: skip


def test_envelope_has_no_gradient_of_potentials():
    x, y, _, _ = leaves_of()
    result = otloss.solve_sample(x, y, 1.0, backward="envelope")
    with pytest.raises(NotImplementedError, match='"implicit"'):
        result.potentials[0].sum().backward()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kw", [{"n_iters": 4}, TIGHT], ids=["unrolled", "implicit"])
def test_streamed_second_derivatives_by_way_of_costs(objective, kw):
    leaves = leaves_of(9, 8)
    x, y, la, lb = leaves
    found = []
    for method in ("streamed", "dense"):
        a, b = la.softmax(0), lb.softmax(0)
        loss = otloss.sinkhorn_divergence(
            x, y, 1.0, a=a, b=b, objective=objective, method=method, **kw
        )
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        found.append((*first, *torch.autograd.grad(first[0].square().sum(), leaves)))
    assert relative(*found) < 1e-8


@pytest.mark.parametrize("kw", [{"n_iters": 2}, {"objective": "transport"}, {}], ids=str)
def test_second_derivatives_past_the_budget_are_refused(kw, monkeypatch):
    monkeypatch.setattr(otloss.method, "dense_budget", 100)
    x, y, _, _ = leaves_of()
    loss = otloss.sinkhorn_divergence(x, y, 1.0, method="streamed", **kw)
    (only,) = torch.autograd.grad(loss, x, retain_graph=True)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(first, only)
    with pytest.raises(NotImplementedError, match='method="dense"'):
        first.sum().backward()


def test_a_nearly_singular_system_stays_finite():
    """Two far pairs at tiny eps: mass that cannot move leaves differences undetermined."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float32)
    C = (x - x.T).square().requires_grad_()
    result = otloss.solve(C, 0.011, backward="implicit")
    result.potentials[0].square().sum().backward()
    assert C.grad is not None
    assert bool(C.grad.isfinite().all())


@some_of("backend", [name for name in BACKENDS if name != "reference"])  # which has no iterations
def test_the_result_tells_how_the_linear_system_went(backend, rng):
    x, y = (randn(rng, 2, n, 2).to(backend.device) for n in (6, 5))
    x.requires_grad_()
    options = {"tol": 1e-10, "max_iters": 10_000, "method": backend.method}
    result = otloss.solve_sample(x, y, 0.5, **options)
    result.value.sum().backward(retain_graph=True)
    assert result.linear_system is None  # the gradient of the value needs none
    result.plan.square().sum().backward()
    iterations, residual = result.linear_system
    assert iterations.shape == residual.shape == (2,)
    assert bool((iterations > 0).all() and (residual <= 1e-6).all())
    single = otloss.solve_sample(x[0], y[0], 0.5, objective="transport", method=backend.method)
    single.value.backward()
    iterations, residual = single.linear_system
    assert isinstance(iterations, int)
    assert 0 <= residual <= 1e-6
