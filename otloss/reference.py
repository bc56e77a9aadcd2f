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
    "envelope_backward",
    "full_precision",
    "plan",
    "softmin",
    "solve",
    "solve_points",
]

OPERATIONS = (
    "cost",
    "cost_backward",
    "solve",
    "envelope_backward",
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


def _without_padding(points: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Points of weight 0 moved to 0: what is there, NaN included, must not matter."""
    if not weights:
        return points
    return [torch.where(w.unsqueeze(-1) > 0, x, 0.0) for x, w in zip(points, weights, strict=True)]


def _unit(x: Tensor) -> Tensor:
    squared = x.square().sum(-1, keepdim=True)
    positive = squared != 0  # NaN stays
    return torch.where(positive, x / torch.where(positive, squared, 1.0).sqrt(), 0.0)


def cost(points: list[Tensor], weights: list[Tensor], pairs: list[int], kind: int) -> list[Tensor]:
    points = _without_padding(points, weights)
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
        leaves = [x.detach().requires_grad_() for x in _without_padding(points, weights)]
        total = points[0].new_zeros(())
        for (i, j), G in zip(as_pairs(pairs), grad_costs, strict=True):
            total = total + (cost_between(leaves[i], leaves[j], kind) * G).sum()
        grads = torch.autograd.grad(total, [leaves[c] for c in wanted], allow_unused=True)
    return [
        torch.zeros_like(points[c]) if grad is None else grad
        for c, grad in zip(wanted, grads, strict=True)
    ]


# -------------------------------------------------------------------------------------- solve


def softmin(eps: float, C: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """T(g)_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)."""
    return -eps * torch.logsumexp(b.log().unsqueeze(-2) + (g.unsqueeze(-2) - C) / eps, dim=-1)


def plan(eps: float, C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps); exactly 0 where a weight is 0."""
    exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - C) / eps
    weight = a.unsqueeze(-1) * b.unsqueeze(-2)
    return weight * torch.where(weight > 0, exponent, 0.0).exp()


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
        counted = (a.unsqueeze(-1) > 0) & (b.unsqueeze(-2) > 0)
        max_cost = torch.where(counted, C, 0.0).abs().amax((-2, -1))
        steps: list[Tensor] = []
        if not bool(max_cost.isfinite().all()):
            f, g = torch.full_like(f, math.nan), torch.full_like(g, math.nan)
            iterations, error = 0, torch.full_like(max_cost, math.nan)
        elif n_iters >= 0:
            f, g, error, steps = _fixed(C, a, b, g, eps, n_iters)
            iterations = n_iters
        elif i == j:
            f, error, iterations = _symmetric(C, a, f, eps, tol, max_iters)
            g = f
        else:
            f, g, error, iterations = _annealed(
                C, a, b, g, eps, tol, max_iters, 0.0 if init else float(max_cost.max())
            )
        if objective == TRANSPORT:
            value = (plan(eps, C, f, g, a, b) * torch.where(counted, C, 0.0)).sum((-2, -1))
        else:
            value = (a * f).sum(-1) + (b * g).sum(-1)
        loss = loss + coefficients[p] * value
        count = torch.full_like(error, iterations)
        statuses.append(torch.stack([count, error, (error <= tol).to(error), max_cost], dim=-1))
        all_f.append(f.clone())
        all_g.append(g.clone())
        if trace:
            traces.append(torch.stack(steps, dim=1))
    return loss, torch.stack(statuses).double(), all_f, all_g, traces


def _update(eps: float, C: Tensor, g: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """The row update, with the potential of points of weight 0 kept at 0."""
    return torch.where(a > 0, softmin(eps, C, g, b), 0.0)


def _marginal_error(old: Tensor, new: Tensor, weight: Tensor, eps: float) -> Tensor:
    """L1 marginal error over the mass: the marginal before an update is w exp((old - new)/eps)."""
    ratio = ((old - new) / eps).clamp(max=80).exp()
    return (weight * (ratio - 1).abs()).sum(-1) / weight.sum(-1)


def _fixed(
    C: Tensor, a: Tensor, b: Tensor, g: Tensor, eps: float, n_iters: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
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


# ------------------------------------------------------------------------- the same from points


def solve_points(
    points: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    init: list[Tensor],
    kind: int,
    eps: float,
    rho_x: float,
    rho_y: float,
    tol: float,
    max_iters: int,
    n_iters: int,
    objective: int,
    trace: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    costs = cost(points, weights, pairs, kind)
    return solve(
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


def envelope_backward_points(
    grad_loss: Tensor,
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
    costs = cost(points, weights, pairs, kind)
    grad_costs, _, _ = envelope_backward(
        grad_loss, costs, weights, pairs, coefficients, f, g, eps, 0, [1] * len(costs), False
    )
    return cost_backward(grad_costs, costs, points, weights, pairs, kind, wanted)
