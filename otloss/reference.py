"""Every operation in plain torch: slow, obvious, for any device and dtype.

These functions define what the kernels compute. They take the same arguments as the operations in
``otloss/ops.py`` and serve ``method="reference"``, pure-Python installs and the tests.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "OPERATIONS",
    "Marginals",
    "as_pairs",
    "cost",
    "cost_backward",
    "cost_between",
    "cost_gradient",
    "damping",
    "dual",
    "envelope_backward",
    "fixed_iterations",
    "full_precision",
    "implicit_backward",
    "implicit_backward_points",
    "implicit_gradient",
    "marginals_of",
    "plan",
    "share",
    "soft_mean",
    "softmin",
    "solve",
    "solve_points",
    "unrolled_backward",
    "unrolled_backward_points",
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
    "unrolled_backward_points",
    "implicit_backward_points",
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


# ---------------------------------------------------------------------------------- marginals


class Marginals(NamedTuple):
    """How the plan of a pair is held to its weights: rho KL(P 1 | a), infinite for P 1 = a."""

    x: float
    y: float
    balanced: bool  # every marginal of the call is a constraint


BALANCED = Marginals(math.inf, math.inf, True)


def marginals_of(rho_x: float, rho_y: float, i: int, j: int) -> Marginals:
    """Of the pair (i, j): cloud 0 is held by rho_x, every other by rho_y, by themselves too."""
    rho = (rho_x, rho_y)
    return Marginals(rho[i > 0], rho[j > 0], math.isinf(rho_x) and math.isinf(rho_y))


def damping(rho: float, eps: float) -> float:
    """The factor of a softmin in the update of a potential; 1 for a constraint."""
    return 1 / (1 + eps / rho)


def dual(f: Tensor, rho: float) -> Tensor:
    """rho (1 - exp(-f / rho)), what a point of weight 1 adds to the dual; f for a constraint."""
    return f if math.isinf(rho) else -rho * torch.expm1(-f / rho)


def share(f: Tensor, rho: float) -> Tensor:
    """exp(-f / rho), the part of a point's weight that the plan takes; 1 for a constraint."""
    return torch.ones_like(f) if math.isinf(rho) else (-f / rho).exp()


def soft_mean(f: Tensor, w: Tensor, rho: float) -> Tensor:
    """-rho log(<w, exp(-f / rho)> / <w, 1>), (B, 1); the mean for a constraint."""
    mass = w.sum(-1, True)
    if math.isinf(rho):
        return (w * f).sum(-1, True) / mass
    least = torch.where(w > 0, f, math.inf).amin(-1, True)
    raised = torch.where(w > 0, f - least, 0.0)
    lost = (w * torch.expm1(-raised / rho)).sum(-1, True) / mass
    exact = (w * (-raised / rho).exp()).sum(-1, True) / mass
    return least - rho * torch.where(lost > -0.5, torch.log1p(lost), exact.log())


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
    eps: float,
    C: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    objective: int,
    marginals: Marginals,
) -> Tensor:
    """The dual, or <P, C> for the transport objective; (B,).

    After an update of g the plan has the column sums b share(g).
    """
    if objective == TRANSPORT:
        return (plan(eps, C, f, g, a, b) * _counted(C, a, b)).sum((-2, -1))
    terms = (a * dual(f, marginals.x)).sum(-1) + (b * dual(g, marginals.y)).sum(-1)
    if marginals.balanced:
        return terms
    return terms - eps * ((b * share(g, marginals.y)).sum(-1) - a.sum(-1) * b.sum(-1))


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
        C, a, b, marginals = costs[p], weights[i], weights[j], marginals_of(rho_x, rho_y, i, j)
        if marginals.balanced:
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
            f, g, error, steps = fixed_iterations(C, a, b, g, eps, n_iters, marginals)
            iterations = n_iters
        elif i == j:
            f, error, iterations = _symmetric(C, a, f, eps, tol, max_iters, marginals.x)
            g = f
        else:
            scale = 0.0 if init else float(max_cost.max())
            f, g, error, iterations = _annealed(C, a, b, g, eps, tol, max_iters, scale, marginals)
        loss = loss + coefficients[p] * value(eps, C, f, g, a, b, objective, marginals)
        count = torch.full_like(error, iterations)
        statuses.append(torch.stack([count, error, (error <= tol).to(error), max_cost], dim=-1))
        all_f.append(f.clone())
        all_g.append(g.clone())
        if trace:
            steps = steps or [torch.cat([f, g], dim=-1)] * n_iters
            traces.append(torch.stack(steps, dim=1))
    return loss, torch.stack(statuses).double(), all_f, all_g, traces


def _softmin(eps: float, C: Tensor, g: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """The softmin over rows, 0 for points of weight 0: their potential is kept there."""
    return torch.where(a > 0, softmin(eps, C, g, b), 0.0)


def _marginal_error(g: Tensor, update: Tensor, b: Tensor, eps: float, rho: float) -> Tensor:
    """L1 distance of a marginal of the plan to the one that is asked for, over the latter's mass.

    The plan has b exp((g - update) / eps), where the softmin ``update`` follows on g. Asked for is
    b share(g).
    """
    asked = b * share(torch.where(b > 0, g - soft_mean(g, b, rho), 0.0), rho)
    ratio = ((g - update) / eps + g / rho).clamp(max=80).exp()
    return (asked * (ratio - 1).abs()).sum(-1) / asked.sum(-1)


def fixed_iterations(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    eps: float,
    n_iters: int,
    marginals: Marginals = BALANCED,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """``n_iters`` updates of f, then g, from g: f, g, the error, and [f g] of each iteration.

    Differentiable by autograd to any order, at the memory of every iteration.
    """
    C = _counted(C, a, b)
    f, error, steps = torch.zeros_like(a), torch.full_like(a[..., 0], math.nan), []
    for _ in range(n_iters):
        f = damping(marginals.x, eps) * _softmin(eps, C, g, b, a)
        update = _softmin(eps, C.mT, f, a, b)
        error = _marginal_error(g, update, b, eps, marginals.y)
        g = damping(marginals.y, eps) * update
        steps.append(torch.cat([f, g], dim=-1))
    return f, g, error, steps


def _symmetric(
    C: Tensor, a: Tensor, f: Tensor, eps: float, tol: float, max_iters: int, rho: float
) -> tuple[Tensor, Tensor, int]:
    """One potential, f = damping T(f), by relaxed iterations that contract whatever eps."""
    iterations, factor = 0, damping(rho, eps)
    if not bool(f.any()):
        f = _softmin(eps, C, f, a, a)
        mean = (a * f).sum(-1, True) / a.sum(-1, True)
        f = torch.where(a > 0, factor * (f - factor / (1 + factor) * mean), 0.0)
        iterations = 1
    while True:
        update = _softmin(eps, C, f, a, a)
        iterations += 1
        error = _marginal_error(f, update, a, eps, rho)
        step = factor * update - f
        if bool((error <= tol).all()) or iterations >= max_iters:
            return f + step / (1 + factor), error, iterations
        f = f + 2 / (2 + factor) * step


def _annealed(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    eps: float,
    tol: float,
    max_iters: int,
    scale: float,
    marginals: Marginals,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Gauss-Seidel iterations while eps halves from the largest cost down to its value."""
    iterations, step_eps = 0, max(eps, scale)
    while True:
        f, g = _update_rows(step_eps, C, a, b, g, marginals)
        update = _softmin(step_eps, C.mT, f, a, b)
        error = _marginal_error(g, update, b, step_eps, marginals.y)
        g = damping(marginals.y, step_eps) * update
        iterations += 1
        if step_eps == eps and (bool((error <= tol).all()) or iterations >= max_iters):
            return f, g, error, iterations
        if step_eps > eps and bool((error <= max(tol, 0.1)).all()):
            step_eps = max(eps, step_eps / 2)
        if iterations + 1 >= max_iters:
            step_eps = eps


def _update_rows(
    eps: float, C: Tensor, a: Tensor, b: Tensor, g: Tensor, marginals: Marginals
) -> tuple[Tensor, Tensor]:
    """The best f and the best translation of g together: f of g - t, and g - t.

    Without the translation a large rho takes some rho / eps iterations to find the total mass
    (Séjourné, Vialard, Peyré 2022). Between constraints there is nothing to find.
    """
    update, factor = _softmin(eps, C, g, b, a), damping(marginals.x, eps)
    if math.isinf(marginals.x) and math.isinf(marginals.y):
        return update, g
    excess = (a.sum(-1, True) / b.sum(-1, True)).log()
    excess = excess - soft_mean(factor * update, a, marginals.x) / marginals.x
    excess = excess + soft_mean(g, b, marginals.y) / marginals.y
    t = excess / (1 / marginals.y + factor / marginals.x)
    return torch.where(a > 0, factor * (update + t), 0.0), torch.where(b > 0, g - t, 0.0)


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
            of_a, of_b = _weight_gradients(eps, f[p], g[p], a, b, marginals_of(rho_x, rho_y, i, j))
            grad_a.append(torch.where(a > 0, on[:, None] * of_a, 0.0))
            grad_b.append(torch.where(b > 0, on[:, None] * of_b, 0.0))
        else:
            grad_a.append(empty)
            grad_b.append(empty)
    return grad_costs, grad_a, grad_b


def _weight_gradients(
    eps: float, f: Tensor, g: Tensor, a: Tensor, b: Tensor, marginals: Marginals
) -> tuple[Tensor, Tensor]:
    """dOT/da and dOT/db at the solution, where the plan has the row sums a share(f).

    Of a balanced problem they are f + t and g - t; the one with <a, f + t> = <b, g - t>.
    """
    mass_a, mass_b = a.sum(-1, True), b.sum(-1, True)
    if marginals.balanced:
        shift = ((b * g).sum(-1, True) - (a * f).sum(-1, True)) / (2 * mass_a)
        return f + shift, g - shift
    of_a = dual(f, marginals.x) + eps * (mass_b - share(f, marginals.x))
    of_b = dual(g, marginals.y) + eps * (mass_a - share(g, marginals.y))
    return of_a, of_b


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


def _value_terms(
    scale: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float, marginals: Marginals
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scale * value, the regularized one, differentiated with respect to f, g, a, b."""
    share_g, of_a, of_b = share(g, marginals.y), dual(f, marginals.x), dual(g, marginals.y)
    if not marginals.balanced:
        of_a = of_a + eps * b.sum(-1, True)
        of_b = of_b + eps * (a.sum(-1, True) - share_g)
    of_f = a * share(f, marginals.x)
    of_g = b * share_g / damping(marginals.y, eps)
    scale = scale[:, None]
    return scale * of_f, scale * of_g, scale * of_a, scale * of_b


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
        C, n, L = _counted(costs[p], a, b), a.shape[-1], trace.shape[1]
        f, g = trace[:, -1, :n], trace[:, -1, n:]
        if objective == TRANSPORT:
            P = plan(eps, C, f, g, a, b)
            C_bar, f_bar, g_bar, a_bar, b_bar = _transport_terms(scale, P, C, a, b, eps)
        else:
            C_bar = torch.zeros_like(C)
            f_bar, g_bar, a_bar, b_bar = _value_terms(scale, f, g, a, b, eps, marginals)
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
    marginals: Marginals,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scale * value + <f_bar, f> + <g_bar, g> with respect to C, a, b; differentiable.

    At the solution, with r and c the plan's marginals over the dampings, df and dg obey
    [diag(r) P; P' diag(c)] (df, dg) = (sum_j P (dC - eps db / b), sum_i P (dC - eps da / a)).
    A cloud against itself has one potential. In a balanced problem f and g stand for the pair with
    <a, f> = <b, g>, and of the weight gradients, defined up to (t, -t), it returns the one with
    <a, a_bar> = <b, b_bar>.
    """
    dtype = C.dtype
    scale, f_bar, g_bar, C, a, b, f, g = (t.double() for t in (scale, f_bar, g_bar, C, a, b, f, g))
    mass = a.sum(-1, True) + b.sum(-1, True)
    if marginals.balanced:
        shift = ((b * g).sum(-1, True) - (a * f).sum(-1, True)) / mass
        f, g = f + shift, g - shift
    f, g = torch.where(a > 0, f, 0.0), torch.where(b > 0, g, 0.0)
    if same:
        f = g = 0.5 * (f + g)
    C = _counted(C, a, b)
    P = plan(eps, C, f, g, a, b)
    f_bar, g_bar = torch.where(a > 0, f_bar, 0.0), torch.where(b > 0, g_bar, 0.0)
    if objective == TRANSPORT:
        C_bar, f_direct, g_direct, a_bar, b_bar = _transport_terms(scale, P, C, a, b, eps)
        f_bar, g_bar = f_bar + f_direct, g_bar + g_direct
    else:
        C_bar = scale[:, None, None] * P
        of_a, of_b = _weight_gradients(eps, f, g, a, b, marginals)
        a_bar, b_bar = scale[:, None] * of_a, scale[:, None] * of_b
    if marginals.balanced:
        gauge = (f_bar.sum(-1, True) - g_bar.sum(-1, True)) / mass
        f_bar, g_bar = f_bar - gauge * a, g_bar + gauge * b
        a_bar, b_bar = a_bar - gauge * f, b_bar + gauge * g
    r, c = P.sum(-1) / damping(marginals.x, eps), P.sum(-2) / damping(marginals.y, eps)
    padding = torch.diag_embed((b <= 0).to(b))  # so that no row of the system is empty
    if same:
        half = 0.5 * (f_bar + g_bar)
        alpha = beta = _solve_linear(torch.diag_embed(r) + P + padding, half)
    else:
        row = P / torch.where(a > 0, r, 1.0).unsqueeze(-1)
        schur = torch.diag_embed(c) - P.mT @ row + padding
        if marginals.balanced:  # constants are its null space
            schur = schur + b.unsqueeze(-1) * b.unsqueeze(-2)
        beta = _solve_linear(schur, g_bar - (row.mT @ f_bar.unsqueeze(-1)).squeeze(-1))
        alpha = _quotient(f_bar - (P @ beta.unsqueeze(-1)).squeeze(-1), r)
    C_bar = C_bar + P * (alpha.unsqueeze(-1) + beta.unsqueeze(-2))
    a_bar = a_bar - eps * _quotient((P @ beta.unsqueeze(-1)).squeeze(-1), a)
    b_bar = b_bar - eps * _quotient((P.mT @ alpha.unsqueeze(-1)).squeeze(-1), b)
    if marginals.balanced:
        t = ((b * b_bar).sum(-1, True) - (a * a_bar).sum(-1, True)) / mass
        a_bar, b_bar = a_bar + t, b_bar - t
    a_bar, b_bar = torch.where(a > 0, a_bar, 0.0), torch.where(b > 0, b_bar, 0.0)
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
