"""The operations of ``otloss/ops.py`` in plain torch, with the same arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from otloss.costs import NAMED, cost_between, full_precision, without_padding
from otloss.reference.engine import Clouds
from otloss.reference.gradients import (
    implicit_gradient,
    quotient,
    transport_terms,
    value_terms,
    weight_gradients,
)
from otloss.reference.marginals import TRANSPORT, counted, damping, marginals_of, plan, value
from otloss.reference.solver import fixed_iterations, solve_batch

OPERATIONS = (
    "cost",
    "cost_backward",
    "solve",
    "envelope_backward",
    "unrolled_backward",
    "implicit_backward",
    "solve_points",
    "envelope_backward_points",
    "unrolled_backward_points",
    "implicit_backward_points",
)


def as_pairs(pairs: list[int]) -> list[tuple[int, int]]:
    """``[i0, j0, i1, j1, ...]`` as ``[(i0, j0), (i1, j1), ...]``."""
    return list(zip(pairs[::2], pairs[1::2], strict=True))


def cost(points: list[Tensor], weights: list[Tensor], pairs: list[int], kind: int) -> list[Tensor]:
    points = without_padding(points, weights)
    return [_pair_cost(points[i], points[j], i == j, kind) for i, j in as_pairs(pairs)]


def _pair_cost(x: Tensor, y: Tensor, same: bool, kind: int) -> Tensor:
    C = cost_between(x, y, kind)
    if same:
        C = torch.where(torch.diag_embed(NAMED[kind].is_zero_to_itself(x)), 0.0, C)
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
    points: Sequence[Tensor] = (),
    kind: int = 0,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """``points`` and the number of the cost, if they are known, give the solver a start."""
    loss = torch.zeros_like(costs[0][:, 0, 0])
    statuses, all_f, all_g, traces = [], [], [], []
    for p, (i, j) in enumerate(as_pairs(pairs)):
        C, a, b, marginals = costs[p], weights[i], weights[j], marginals_of(rho_x, rho_y, i, j)
        if marginals.balanced:
            b = b * (a.sum(-1, True) / b.sum(-1, True))  # totals may differ by rounding
        start = init[2 * p : 2 * p + 2]
        max_cost = counted(C, a, b).abs().amax((-2, -1))
        if n_iters >= 0:
            g = start[1] if start else torch.zeros_like(b)
            f, g, error, steps = fixed_iterations(C, a, b, g, eps, n_iters, marginals)
            f, g = (torch.where(max_cost.isfinite()[:, None], v, math.nan) for v in (f, g))
            sweeps = torch.full_like(error, n_iters)
            traces += [torch.stack(steps, dim=1)] if trace else []
        else:
            clouds = Clouds(NAMED[kind], points[i], points[j], a, b) if points else None
            f, g, error, sweeps = solve_batch(
                C, a, b, marginals, i == j, eps, tol, max_iters, start, clouds
            )
        loss = loss + coefficients[p] * value(eps, C, f, g, a, b, objective, marginals)
        statuses.append(torch.stack([sweeps, error, error <= tol, max_cost], dim=-1))
        all_f.append(f.clone())
        all_g.append(g.clone())
    return loss, torch.stack(statuses).double(), all_f, all_g, traces


def envelope_backward(
    grad_loss: Tensor,
    costs: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    f: list[Tensor],
    g: list[Tensor],
    eps: float,
    rho_x: float,
    rho_y: float,
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
            of_a, of_b = weight_gradients(eps, f[p], g[p], a, b, marginals_of(rho_x, rho_y, i, j))
            grad_a.append(torch.where(a > 0, on[:, None] * of_a, 0.0))
            grad_b.append(torch.where(b > 0, on[:, None] * of_b, 0.0))
        else:
            grad_a.append(empty)
            grad_b.append(empty)
    return grad_costs, grad_a, grad_b


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
    rho_x: float,
    rho_y: float,
    objective: int,
    want_cost: list[int],
    want_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The adjoint of the iterations, from their potentials, last to first.

    An iteration is f = p T(g'), g = q T(f), p and q the dampings. With
    S_ij = a_i exp((f_i + g_j / q - C_ij) / eps), whose columns sum to 1, and
    R_ij = b_j exp((f_i / p + g'_j - C_ij) / eps), whose rows do,
    dg_j = q sum_i S_ij (dC_ij - df_i - eps da_i / a_i) and
    df_i = p sum_j R_ij (dC_ij - dg'_j - eps db_j / b_j).
    """
    results: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for p, (i, j) in enumerate(as_pairs(pairs)):
        a, b, trace, scale = weights[i], weights[j], traces[p], coefficients[p] * grad_loss
        marginals = marginals_of(rho_x, rho_y, i, j)
        damp_f, damp_g = damping(marginals.x, eps), damping(marginals.y, eps)
        C, n, L = counted(costs[p], a, b), a.shape[-1], trace.shape[1]
        f, g = trace[:, -1, :n], trace[:, -1, n:]
        if objective == TRANSPORT:
            P = plan(eps, C, f, g, a, b)
            C_bar, f_bar, g_bar, a_bar, b_bar = transport_terms(scale, P, C, a, b, eps)
        else:
            C_bar = torch.zeros_like(C)
            f_bar, g_bar, a_bar, b_bar = value_terms(scale, f, g, a, b, eps, marginals)
        if grad_f:
            f_bar = f_bar + torch.where(a > 0, grad_f[p], 0.0)
            g_bar = g_bar + torch.where(b > 0, grad_g[p], 0.0)
        for step in reversed(range(L)):
            f, g = trace[:, step, :n], trace[:, step, n:]
            start = init[2 * p + 1] if init else torch.zeros_like(b)
            before = trace[:, step - 1, n:] if step else torch.where(b > 0, start, 0.0)
            S = plan(eps, C, f, g / damp_g, a, (b > 0).to(b)) * damp_g * g_bar.unsqueeze(-2)
            u = S.sum(-1)
            f_bar = f_bar - u
            R = plan(eps, C, f / damp_f, before, (a > 0).to(a), b) * damp_f * f_bar.unsqueeze(-1)
            v = R.sum(-2)
            C_bar = C_bar + S + R
            a_bar = a_bar - eps * quotient(u, a)
            b_bar = b_bar - eps * quotient(v, b)
            f_bar, g_bar = torch.zeros_like(a), -v
        empty = a.new_empty(0)
        results[0].append(C_bar if want_cost[p] else empty)
        results[1].append(torch.where(a > 0, a_bar, 0.0) if want_weights else empty)
        results[2].append(torch.where(b > 0, b_bar, 0.0) if want_weights else empty)
    return results


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
    rho_x: float,
    rho_y: float,
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
            marginals_of(rho_x, rho_y, i, j),
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
    tf32: bool = False,
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
        without_padding(points, weights),
        kind,
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
    tf32: bool = False,
) -> list[Tensor]:
    costs = costs or cost(points, weights, pairs, kind)
    unread = math.inf  # rho: the plan does not depend on it
    grad_costs, _, _ = envelope_backward(
        grad_loss, costs, weights, pairs, coefficients, f, g, eps, unread, unread, 0,
        [1] * len(costs), False,
    )  # fmt: skip
    return cost_backward(grad_costs, costs, points, weights, pairs, kind, wanted)


def unrolled_backward_points(
    grad_loss: Tensor,
    grad_f: list[Tensor],
    grad_g: list[Tensor],
    points: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    init: list[Tensor],
    traces: list[Tensor],
    kind: int,
    eps: float,
    rho_x: float,
    rho_y: float,
    objective: int,
    wanted: list[int],
    want_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    costs = cost(points, weights, pairs, kind)
    grad_costs, grad_a, grad_b = unrolled_backward(
        grad_loss, grad_f, grad_g, costs, weights, pairs, coefficients, init, traces, eps,
        rho_x, rho_y, objective, [1] * len(costs), want_weights,
    )  # fmt: skip
    grads = cost_backward(grad_costs, costs, points, weights, pairs, kind, wanted)
    return grads, grad_a, grad_b


def implicit_backward_points(
    grad_loss: Tensor,
    grad_f: list[Tensor],
    grad_g: list[Tensor],
    points: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    f: list[Tensor],
    g: list[Tensor],
    kind: int,
    eps: float,
    rho_x: float,
    rho_y: float,
    objective: int,
    wanted: list[int],
    want_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    costs = cost(points, weights, pairs, kind)
    grad_costs, grad_a, grad_b, status = implicit_backward(
        grad_loss, grad_f, grad_g, costs, weights, pairs, coefficients, f, g, eps, rho_x, rho_y,
        objective, [1] * len(costs), want_weights,
    )  # fmt: skip
    grads = cost_backward(grad_costs, costs, points, weights, pairs, kind, wanted)
    return grads, grad_a, grad_b, status
