"""Every operation in plain torch: slow, obvious, for any device and dtype.

These functions define what the kernels compute. They take the same arguments as the operations in
``otloss/ops.py`` and serve ``method="reference"``, pure-Python installs and the tests.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "OPERATIONS",
    "as_pairs",
    "cost",
    "cost_backward",
    "cost_between",
    "cost_gradient",
    "envelope_backward",
    "fixed_iterations",
    "full_precision",
    "implicit_backward",
    "implicit_gradient",
    "plan",
    "softmin",
    "solve",
    "solve_points",
    "unrolled_backward",
    "value",
    "without_padding",
]

OPERATIONS = (
    "cost",
    "cost_backward",
    "solve",
    "envelope_backward",
    "unrolled_backward",
    "implicit_backward",
    "solve_points",
    "envelope_backward_points",
)

TRANSPORT = 1  # the objective's number, see csrc/kernels.h


def as_pairs(pairs: list[int]) -> list[tuple[int, int]]:
    """``[i0, j0, i1, j1, ...]`` as ``[(i0, j0), (i1, j1), ...]``."""
    return list(zip(pairs[::2], pairs[1::2], strict=True))


# -------------------------------------------------------------------------------------- costs


def cost_between(x: Tensor, y: Tensor, kind: int) -> Tensor:
    """C (B, n, m) between x (B, n, d) and y (B, m, d), from differences; differentiable.

    The square root and the norms have gradient 0 where they are 0.
    """
    if kind == 2:
        with full_precision(x):
            return 1 - _unit(x) @ _unit(y).mT
    squared = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)
    if kind == 0:
        return squared
    positive = squared != 0  # NaN stays
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def full_precision(t: Tensor) -> AbstractContextManager[Any]:
    """Where matrix products keep the dtype of ``t``, under autocast too."""
    kind = t.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def without_padding(points: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Points of weight 0 moved to 0: what is there, NaN included, must not matter."""
    if not weights:
        return points
    return [torch.where(w.unsqueeze(-1) > 0, x, 0.0) for x, w in zip(points, weights, strict=True)]


def _unit(x: Tensor) -> Tensor:
    squared = x.square().sum(-1, keepdim=True)
    positive = squared != 0  # NaN stays
    return torch.where(positive, x / torch.where(positive, squared, 1.0).sqrt(), 0.0)


def cost(points: list[Tensor], weights: list[Tensor], pairs: list[int], kind: int) -> list[Tensor]:
    points = without_padding(points, weights)
    return [_pair_cost(points[i], points[j], i == j, kind) for i, j in as_pairs(pairs)]


def _pair_cost(x: Tensor, y: Tensor, same: bool, kind: int) -> Tensor:
    C = cost_between(x, y, kind)
    if same:  # a point is at distance exactly 0 from itself, unless it has no direction
        directed = x.ne(0).any(-1) if kind == 2 else torch.ones_like(x[..., 0], dtype=torch.bool)
        C = torch.where(torch.diag_embed(directed), 0.0, C)
    return C


def cost_backward(
    grad_costs: list[Tensor],
    costs: list[Tensor],
    points: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    kind: int,
    wanted: list[int],
) -> list[Tensor]:
    with torch.enable_grad(), full_precision(points[0]):
        leaves = [x.detach().requires_grad_() for x in without_padding(points, weights)]
        total = points[0].new_zeros(())
        for (i, j), G in zip(as_pairs(pairs), grad_costs, strict=True):
            total = total + (cost_between(leaves[i], leaves[j], kind) * G).sum()
        grads = torch.autograd.grad(total, [leaves[c] for c in wanted], allow_unused=True)
    return [
        torch.zeros_like(points[c]) if grad is None else grad
        for c, grad in zip(wanted, grads, strict=True)
    ]


def cost_gradient(W: Tensor, C: Tensor, x: Tensor, y: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """sum_ij W_ij c(x_i, y_j) differentiated in x and y, by matrix products; differentiable.

    C is the cost itself; only the euclidean gradient depends on it.
    """
    if kind == 2:
        return _tangent(W, x, y), _tangent(W.mT, y, x)
    if kind == 0:
        V = 2 * W
    else:
        counted = (C > 0) & (W != 0)
        V = torch.where(counted, W / torch.where(counted, C, 1.0), 0.0)
    grad_x = x * V.sum(-1).unsqueeze(-1) - V @ y
    grad_y = y * V.sum(-2).unsqueeze(-1) - V.mT @ x
    return grad_x, grad_y


def _tangent(W: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The cosine cost's gradient in x: (<Wy, x^> x^ - Wy) / |x| with y and x^ of norm 1."""
    unit, image = _unit(x), W @ _unit(y)
    squared = x.square().sum(-1, keepdim=True)
    positive = squared > 0
    tangent = (image * unit).sum(-1, keepdim=True) * unit - image
    return torch.where(positive, tangent / torch.where(positive, squared, 1.0).sqrt(), 0.0)


# -------------------------------------------------------------------------------------- solve


def softmin(eps: float, C: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """T(g)_i = -eps log sum_j b_j exp((g_j - C_ij) / eps); differentiable, 0 for b_j = 0."""
    positive = b > 0
    log_b = torch.where(positive, torch.where(positive, b, 1.0).log(), -math.inf)
    return -eps * torch.logsumexp(log_b.unsqueeze(-2) + (g.unsqueeze(-2) - C) / eps, dim=-1)


def plan(eps: float, C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps); exactly 0 where a weight is 0."""
    exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - C) / eps
    weight = a.unsqueeze(-1) * b.unsqueeze(-2)
    return weight * torch.where(weight > 0, exponent, 0.0).exp()


def _counted(C: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """C with 0 in place of whatever stands in rows and columns of weight 0."""
    return torch.where((a.unsqueeze(-1) > 0) & (b.unsqueeze(-2) > 0), C, 0.0)


def value(
    eps: float, C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, objective: int
) -> Tensor:
    """<a, f> + <b, g>, or <P, C> for the transport objective; (B,)."""
    if objective == TRANSPORT:
        return (plan(eps, C, f, g, a, b) * _counted(C, a, b)).sum((-2, -1))
    return (a * f).sum(-1) + (b * g).sum(-1)


def solve(
    costs: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    init: list[Tensor],
    eps: float,
    rho_x: float,
    rho_y: float,
    tol: float,
    max_iters: int,
    n_iters: int,
    objective: int,
    trace: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    loss = torch.zeros_like(costs[0][:, 0, 0])
    statuses, all_f, all_g, traces = [], [], [], []
    for p, (i, j) in enumerate(as_pairs(pairs)):
        C, a, b = costs[p], weights[i], weights[j]
        b = b * (a.sum(-1, True) / b.sum(-1, True))  # totals may differ by rounding
        f, g = (
            (init[2 * p], init[2 * p + 1]) if init else (torch.zeros_like(a), torch.zeros_like(b))
        )
        max_cost = _counted(C, a, b).abs().amax((-2, -1))
        steps: list[Tensor] = []
        if not bool(max_cost.isfinite().all()):
            f, g = torch.full_like(f, math.nan), torch.full_like(g, math.nan)
            iterations, error = 0, torch.full_like(max_cost, math.nan)
        elif n_iters >= 0:
            f, g, error, steps = fixed_iterations(C, a, b, g, eps, n_iters)
            iterations = n_iters
        elif i == j:
            f, error, iterations = _symmetric(C, a, f, eps, tol, max_iters)
            g = f
        else:
            f, g, error, iterations = _annealed(
                C, a, b, g, eps, tol, max_iters, 0.0 if init else float(max_cost.max())
            )
        loss = loss + coefficients[p] * value(eps, C, f, g, a, b, objective)
        count = torch.full_like(error, iterations)
        statuses.append(torch.stack([count, error, (error <= tol).to(error), max_cost], dim=-1))
        all_f.append(f.clone())
        all_g.append(g.clone())
        if trace:
            steps = steps or [torch.cat([f, g], dim=-1)] * n_iters
            traces.append(torch.stack(steps, dim=1))
    return loss, torch.stack(statuses).double(), all_f, all_g, traces


def _update(eps: float, C: Tensor, g: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """The row update, with the potential of points of weight 0 kept at 0."""
    return torch.where(a > 0, softmin(eps, C, g, b), 0.0)


def _marginal_error(old: Tensor, new: Tensor, weight: Tensor, eps: float) -> Tensor:
    """L1 marginal error over the mass: the marginal before an update is w exp((old - new)/eps)."""
    ratio = ((old - new) / eps).clamp(max=80).exp()
    return (weight * (ratio - 1).abs()).sum(-1) / weight.sum(-1)


def fixed_iterations(
    C: Tensor, a: Tensor, b: Tensor, g: Tensor, eps: float, n_iters: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """``n_iters`` updates of f, then g, from g: f, g, the error, and [f g] of each iteration.

    Differentiable by autograd to any order, at the memory of every iteration.
    """
    C = _counted(C, a, b)
    f, error, steps = torch.zeros_like(a), torch.full_like(a[..., 0], math.nan), []
    for _ in range(n_iters):
        f = _update(eps, C, g, b, a)
        updated = _update(eps, C.mT, f, a, b)
        error = _marginal_error(g, updated, b, eps)
        g = updated
        steps.append(torch.cat([f, g], dim=-1))
    return f, g, error, steps


def _symmetric(
    C: Tensor, a: Tensor, f: Tensor, eps: float, tol: float, max_iters: int
) -> tuple[Tensor, Tensor, int]:
    iterations = 0
    if not bool(f.any()):
        f = _update(eps, C, f, a, a)
        f = torch.where(a > 0, f - 0.5 * (a * f).sum(-1, True) / a.sum(-1, True), 0.0)
        iterations = 1
    while True:
        updated = _update(eps, C, f, a, a)
        iterations += 1
        error = _marginal_error(f, updated, a, eps)
        if bool((error <= tol).all()) or iterations >= max_iters:
            return 0.5 * (f + updated), error, iterations
        f = f + 2 / 3 * (updated - f)


def _annealed(
    C: Tensor, a: Tensor, b: Tensor, g: Tensor, eps: float, tol: float, max_iters: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Gauss-Seidel iterations while eps halves from the largest cost down to its value."""
    iterations, step_eps = 0, max(eps, scale)
    while True:
        f = _update(step_eps, C, g, b, a)
        updated = _update(step_eps, C.mT, f, a, b)
        error = _marginal_error(g, updated, b, step_eps)
        g = updated
        iterations += 1
        if step_eps == eps and (bool((error <= tol).all()) or iterations >= max_iters):
            return f, g, error, iterations
        if step_eps > eps and bool((error <= max(tol, 0.1)).all()):
            step_eps = max(eps, step_eps / 2)
        if iterations + 1 >= max_iters:
            step_eps = eps


# ----------------------------------------------------------------------------------- backward


def envelope_backward(
    grad_loss: Tensor,
    costs: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    f: list[Tensor],
    g: list[Tensor],
    eps: float,
    objective: int,
    want_cost: list[int],
    want_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    grad_costs, grad_a, grad_b = [], [], []
    for p, (i, j) in enumerate(as_pairs(pairs)):
        a, b, scale = weights[i], weights[j], coefficients[p] * grad_loss
        empty = a.new_empty(0)
        if want_cost[p]:
            grad_costs.append(scale[:, None, None] * plan(eps, costs[p], f[p], g[p], a, b))
        else:
            grad_costs.append(empty)
        if want_weights:
            on = scale if objective != TRANSPORT else torch.zeros_like(scale)
            shift = ((b * g[p]).sum(-1) - (a * f[p]).sum(-1)) / (2 * a.sum(-1))
            grad_a.append(torch.where(a > 0, on[:, None] * (f[p] + shift[:, None]), 0.0))
            grad_b.append(torch.where(b > 0, on[:, None] * (g[p] - shift[:, None]), 0.0))
        else:
            grad_a.append(empty)
            grad_b.append(empty)
    return grad_costs, grad_a, grad_b


def _quotient(numerator: Tensor, weight: Tensor) -> Tensor:
    """numerator / weight, and 0 for padding."""
    positive = weight > 0
    return torch.where(positive, numerator / torch.where(positive, weight, 1.0), 0.0)


def _transport_terms(
    scale: Tensor, P: Tensor, C: Tensor, a: Tensor, b: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scale <P, C> differentiated with respect to C, f, g, a, b, each on its own."""
    weighted = scale[:, None, None] * P * C
    row, column = weighted.sum(-1), weighted.sum(-2)
    grad_C = scale[:, None, None] * P - weighted / eps
    return grad_C, row / eps, column / eps, _quotient(row, a), _quotient(column, b)


def unrolled_backward(
    grad_loss: Tensor,
    grad_f: list[Tensor],
    grad_g: list[Tensor],
    costs: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    init: list[Tensor],
    traces: list[Tensor],
    eps: float,
    objective: int,
    want_cost: list[int],
    want_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The adjoint of the iterations, from their potentials, last to first.

    An iteration is f = T(g'), g = T(f). With S_ij = a_i exp((f_i + g_j - C_ij) / eps), whose
    columns sum to 1, and R_ij = b_j exp((f_i + g'_j - C_ij) / eps), whose rows do,
    dg_j = sum_i S_ij (dC_ij - df_i - eps da_i / a_i) and
    df_i = sum_j R_ij (dC_ij - dg'_j - eps db_j / b_j).
    """
    results: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for p, (i, j) in enumerate(as_pairs(pairs)):
        a, b, trace, scale = weights[i], weights[j], traces[p], coefficients[p] * grad_loss
        C, n, L = _counted(costs[p], a, b), a.shape[-1], trace.shape[1]
        f, g = trace[:, -1, :n], trace[:, -1, n:]
        if objective == TRANSPORT:
            P = plan(eps, C, f, g, a, b)
            C_bar, f_bar, g_bar, a_bar, b_bar = _transport_terms(scale, P, C, a, b, eps)
        else:
            C_bar, f_bar, g_bar = torch.zeros_like(C), scale[:, None] * a, scale[:, None] * b
            a_bar, b_bar = scale[:, None] * f, scale[:, None] * g
        if grad_f:
            f_bar = f_bar + torch.where(a > 0, grad_f[p], 0.0)
            g_bar = g_bar + torch.where(b > 0, grad_g[p], 0.0)
        for step in reversed(range(L)):
            f, g = trace[:, step, :n], trace[:, step, n:]
            start = init[2 * p + 1] if init else torch.zeros_like(b)
            before = trace[:, step - 1, n:] if step else torch.where(b > 0, start, 0.0)
            S = plan(eps, C, f, g, a, (b > 0).to(b)) * g_bar.unsqueeze(-2)
            u = S.sum(-1)
            f_bar = f_bar - u
            R = plan(eps, C, f, before, (a > 0).to(a), b) * f_bar.unsqueeze(-1)
            v = R.sum(-2)
            C_bar = C_bar + S + R
            a_bar = a_bar - eps * _quotient(u, a)
            b_bar = b_bar - eps * _quotient(v, b)
            f_bar, g_bar = torch.zeros_like(a), -v
        empty = a.new_empty(0)
        results[0].append(C_bar if want_cost[p] else empty)
        results[1].append(torch.where(a > 0, a_bar, 0.0) if want_weights else empty)
        results[2].append(torch.where(b > 0, b_bar, 0.0) if want_weights else empty)
    return results


def implicit_gradient(
    scale: Tensor,
    f_bar: Tensor,
    g_bar: Tensor,
    C: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    eps: float,
    objective: int,
    same: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scale * value + <f_bar, f> + <g_bar, g> with respect to C, a, b; differentiable.

    At the solution, with r and c the plan's marginals, df and dg obey
    [diag(r) P; P' diag(c)] (df, dg) = (sum_j P (dC - eps db / b), sum_i P (dC - eps da / a)).
    f and g stand for the pair with <a, f> = <b, g>, and a cloud against itself has one potential.
    Of the weight gradients, defined up to (t, -t), it returns the one with <a, a_bar> = <b, b_bar>.
    """
    dtype = C.dtype
    scale, f_bar, g_bar, C, a, b, f, g = (t.double() for t in (scale, f_bar, g_bar, C, a, b, f, g))
    mass = a.sum(-1, True) + b.sum(-1, True)
    shift = ((b * g).sum(-1, True) - (a * f).sum(-1, True)) / mass
    f, g = torch.where(a > 0, f + shift, 0.0), torch.where(b > 0, g - shift, 0.0)
    if same:
        f = g = 0.5 * (f + g)
    C = _counted(C, a, b)
    P = plan(eps, C, f, g, a, b)
    f_bar, g_bar = torch.where(a > 0, f_bar, 0.0), torch.where(b > 0, g_bar, 0.0)
    if objective == TRANSPORT:
        C_bar, f_direct, g_direct, a_bar, b_bar = _transport_terms(scale, P, C, a, b, eps)
        f_bar, g_bar = f_bar + f_direct, g_bar + g_direct
    else:
        C_bar, a_bar, b_bar = scale[:, None, None] * P, scale[:, None] * f, scale[:, None] * g
    gauge = (f_bar.sum(-1, True) - g_bar.sum(-1, True)) / mass
    f_bar, g_bar = f_bar - gauge * a, g_bar + gauge * b
    a_bar, b_bar = a_bar - gauge * f, b_bar + gauge * g
    r, c = P.sum(-1), P.sum(-2)
    padding = torch.diag_embed((b <= 0).to(b))  # so that no row of the system is empty
    if same:
        half = 0.5 * (f_bar + g_bar)
        alpha = beta = _solve_linear(torch.diag_embed(r) + P + padding, half)
    else:
        row = P / torch.where(a > 0, r, 1.0).unsqueeze(-1)
        schur = torch.diag_embed(c) - P.mT @ row + padding + b.unsqueeze(-1) * b.unsqueeze(-2)
        beta = _solve_linear(schur, g_bar - (row.mT @ f_bar.unsqueeze(-1)).squeeze(-1))
        alpha = _quotient(f_bar - (P @ beta.unsqueeze(-1)).squeeze(-1), r)
    C_bar = C_bar + P * (alpha.unsqueeze(-1) + beta.unsqueeze(-2))
    a_bar = a_bar - eps * _quotient((P @ beta.unsqueeze(-1)).squeeze(-1), a)
    b_bar = b_bar - eps * _quotient((P.mT @ alpha.unsqueeze(-1)).squeeze(-1), b)
    t = ((b * b_bar).sum(-1, True) - (a * a_bar).sum(-1, True)) / mass
    a_bar, b_bar = torch.where(a > 0, a_bar + t, 0.0), torch.where(b > 0, b_bar - t, 0.0)
    return C_bar.to(dtype), a_bar.to(dtype), b_bar.to(dtype)


def _solve_linear(matrix: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_ex(matrix, right.unsqueeze(-1)).result.squeeze(-1)


def implicit_backward(
    grad_loss: Tensor,
    grad_f: list[Tensor],
    grad_g: list[Tensor],
    costs: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    f: list[Tensor],
    g: list[Tensor],
    eps: float,
    objective: int,
    want_cost: list[int],
    want_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    results: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for p, (i, j) in enumerate(as_pairs(pairs)):
        a, b = weights[i], weights[j]
        grads = implicit_gradient(
            coefficients[p] * grad_loss,
            grad_f[p] if grad_f else torch.zeros_like(a),
            grad_g[p] if grad_g else torch.zeros_like(b),
            costs[p],
            a,
            b,
            f[p],
            g[p],
            eps,
            objective,
            i == j,
        )
        wanted = (bool(want_cost[p]), want_weights, want_weights)
        for result, grad, want in zip(results, grads, wanted, strict=True):
            result.append(grad if want else a.new_empty(0))
    # A direct solve: no iterations, no residual.
    status = grad_loss.new_zeros(len(costs), grad_loss.shape[0], 2, dtype=torch.float64)
    return *results, status


# ------------------------------------------------------------------------- the same from points


def solve_points(
    points: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    init: list[Tensor],
    kind: int,
    dense: bool,
    eps: float,
    rho_x: float,
    rho_y: float,
    tol: float,
    max_iters: int,
    n_iters: int,
    objective: int,
    trace: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    costs = cost(points, weights, pairs, kind)
    solved = solve(
        costs,
        weights,
        pairs,
        coefficients,
        init,
        eps,
        rho_x,
        rho_y,
        tol,
        max_iters,
        n_iters,
        objective,
        trace,
    )
    return *solved, costs if dense else []


def envelope_backward_points(
    grad_loss: Tensor,
    costs: list[Tensor],
    points: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    f: list[Tensor],
    g: list[Tensor],
    kind: int,
    eps: float,
    wanted: list[int],
) -> list[Tensor]:
    costs = costs or cost(points, weights, pairs, kind)
    grad_costs, _, _ = envelope_backward(
        grad_loss, costs, weights, pairs, coefficients, f, g, eps, 0, [1] * len(costs), False
    )
    return cost_backward(grad_costs, costs, points, weights, pairs, kind, wanted)
