"""The operations of ``otloss/ops.py`` in plain torch, with the same arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from otloss.costs import NAMED, without_padding
from otloss.reference.arguments import Arguments, as_pairs, each_problem, read
from otloss.reference.engine import Clouds
from otloss.reference.gradients import (
    implicit_gradient,
    quotient,
    transport_terms,
    value_terms,
    weight_gradients,
)
from otloss.reference.marginals import (
    TRANSPORT,
    Marginals,
    clamped,
    column_weights,
    counted,
    damping,
    plan,
    semidual,
    softmin,
    total,
    value,
)
from otloss.reference.solver import fixed_iterations, solve_batch

OPERATIONS = (
    "cost",
    "cost_backward",
    "solve",
    "envelope_backward",
    "unrolled_backward",
    "implicit_backward",
    "extend",
    "plan_gap",
    "plan_product",
)


TINY = 1e-300  # what is smaller counts as 0
# Terms of a loss that is smaller, over their size, are made again in double.
CANCELLED = 1e-3
DIVERGENCE = [0, 1, 0, 0, 1, 1]  # pairs


def cost(points: list[Tensor], weights: list[Tensor], pairs: list[int], kind: int) -> list[Tensor]:
    points = without_padding(points, weights)
    return [_pair_cost(points[i], points[j], i == j, kind) for i, j in as_pairs(pairs)]


def _matrices(problem: Arguments) -> list[Tensor]:
    return problem.costs or cost(problem.points, problem.weights, problem.pairs, problem.kind)


def _pair_cost(x: Tensor, y: Tensor, same: bool, kind: int) -> Tensor:
    C = NAMED[kind].between(x, y)
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
    """By matrix products; differentiable."""
    points = without_padding(points, weights)
    totals = [torch.zeros_like(x) for x in points]
    for (i, j), C, W in zip(as_pairs(pairs), costs, grad_costs, strict=True):
        of_x, of_y = NAMED[kind].gradient(W, C, points[i], points[j])
        totals[i] = totals[i] + of_x
        totals[j] = totals[j] + of_y
    return [totals[c] for c in wanted]


@each_problem(0)
def solve(*arguments: Any) -> tuple[Any, ...]:
    problem, (init, tol, max_iters, n_iters, trace, dense, *_) = read(arguments)
    costs, weights, coefficients = _matrices(problem), problem.weights, problem.coefficients
    eps, tol, objective = problem.eps.item(), tol.item(), problem.objective
    points = without_padding(problem.points, weights) if problem.points else []
    statuses, terms, all_f, all_g, traces = [], [], [], [], []
    for p, i, j, marginals in problem.numbered_pairs():
        C, a, b = costs[p], weights[i], weights[j]
        if marginals.balanced:
            b = column_weights(a, b)
        start = init[2 * p : 2 * p + 2]
        max_cost = counted(C, a, b).abs().amax((-2, -1))
        if n_iters >= 0:
            g = start[1] if start else torch.zeros_like(b)
            f, g, error, steps = fixed_iterations(C, a, b, g, eps, n_iters, marginals)
            f, g = (torch.where(max_cost.isfinite()[:, None], v, math.nan) for v in (f, g))
            sweeps, converged = torch.full_like(error, n_iters), error <= tol
            traces += [torch.stack(steps, dim=1)] if trace else []
        else:
            clouds = Clouds(NAMED[problem.kind], points[i], points[j], a, b) if points else None
            same = i == j or (clouds is not None and clouds.equal and marginals.x == marginals.y)
            f, g, error, sweeps, converged = solve_batch(
                C, a, b, marginals, same, eps, tol, max_iters, start, clouds
            )
        terms.append(coefficients[p] * value(eps, C, f, g, a, b, objective, marginals))
        statuses.append(torch.stack([sweeps, error, converged, max_cost], dim=-1))
        all_f.append(f.clone())
        all_g.append(g.clone())
    made = costs if dense and not problem.costs else []
    status, dtype = torch.stack(statuses), costs[0].dtype

    def refined() -> Tensor:
        every = torch.stack(terms)
        close = every.sum(0).abs() < CANCELLED * every.abs().sum(0)
        in_double = points and n_iters < 0 and objective != TRANSPORT and dtype == torch.float32
        if not (in_double and bool(close.any())):
            return every
        return torch.where(close, _in_double(problem, points, all_g), every)

    every = refined()
    if n_iters < 0 and objective != TRANSPORT and problem.pairs == DIVERGENCE:
        again = (clamped(every.sum(0), every.abs().sum(0), dtype) < 0) & status[0, :, 2].bool()
        if bool(again.any()):
            _solve_again(problem, costs[0], again, tol, max_iters, status, terms, all_f, all_g)
            every = refined()
            if points:  # a named cost, for which what is negative still is rounding
                every[0] = torch.where(again, every[0].maximum(-every[1:].sum(0)), every[0])
    loss = clamped(every.sum(0), every.abs().sum(0), dtype).to(dtype)
    return loss, torch.cat([status, every.unsqueeze(-1)], dim=-1), all_f, all_g, traces, made, []


def _solve_again(
    problem: Arguments,
    C: Tensor,
    again: Tensor,
    tol: float,
    max_iters: int,
    status: Tensor,
    terms: list[Tensor],
    f: list[Tensor],
    g: list[Tensor],
) -> None:
    """The pair of a divergence, of the chosen entries, from the potentials of the clouds against
    themselves: ``solve_negative_again`` of csrc/cpu/solve/solve.cpp."""
    eps, (a, b), marginals = problem.eps.item(), problem.weights, problem.numbered_pairs()[0][-1]
    b = column_weights(a, b) if marginals.balanced else b
    C, a, b = C[again], a[again], b[again]
    start = [f[1][again], f[2][again]]
    f[0][again], g[0][again], error, sweeps, converged = solve_batch(
        C, a, b, marginals, False, eps, tol, max_iters, start
    )
    sweeps = sweeps + status[0, again, 0]
    status[0, again, :3] = torch.stack([sweeps, error, converged], -1)
    found = value(eps, C, f[0][again], g[0][again], a, b, problem.objective, marginals)
    terms[0][again] = problem.coefficients[0] * found


def _in_double(problem: Arguments, points: list[Tensor], g: list[Tensor]) -> Tensor:
    """The terms of the loss from a last row update of g, and from costs, in double.

    The value is that of the semidual at g, which g's rounding enters to second order.
    """
    eps, terms = problem.eps.item(), []
    points, weights = [x.double() for x in points], [w.double() for w in problem.weights]
    weights = [
        w * (total(v) / w.sum(-1, True)) for w, v in zip(weights, problem.weights, strict=True)
    ]
    for p, i, j, marginals in problem.numbered_pairs():
        a, b = weights[i], weights[j]
        if marginals.balanced:
            b = column_weights(a, b)
        C = counted(_pair_cost(points[i], points[j], i == j, problem.kind), a, b)
        terms.append(problem.coefficients[p] * semidual(eps, C, g[p].double(), a, b, marginals))
    return torch.stack(terms)


OfPair = Callable[[int, Tensor, Tensor, Marginals], tuple[Tensor, Tensor, Tensor]]


def _gradients(
    problem: Arguments,
    costs: list[Tensor],
    of_pair: OfPair,
    want_costs: list[int],
    want_points: list[int],
    want_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """What is wanted, from ``of_pair(p, a, b, marginals)``: gradients of C, a and b of pair p."""
    found = [
        of_pair(p, problem.weights[i], problem.weights[j], marginals)
        for p, i, j, marginals in problem.numbered_pairs()
    ]
    grad_C = [of_C for of_C, _, _ in found]
    grad_points: list[Tensor] = []
    if want_points:
        clouds = (problem.points, problem.weights, problem.pairs, problem.kind)
        grad_points = cost_backward(grad_C, costs, *clouds, want_points)
    return (
        [grad_C[p] for p in want_costs],
        grad_points,
        [of_a for _, of_a, _ in found] if want_weights else [],
        [of_b for _, _, of_b in found] if want_weights else [],
    )


@each_problem(1)
def envelope_backward(
    grad_loss: Tensor, *arguments: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    problem, (f, g, want_costs, want_points, want_weights, *_) = read(arguments)
    eps, with_plans = problem.eps.item(), bool(want_costs or want_points)
    costs = _matrices(problem) if with_plans else []

    def of_pair(
        p: int, a: Tensor, b: Tensor, marginals: Marginals
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale = problem.scale(grad_loss, p)
        P = plan(eps, costs[p], f[p], g[p], a, b) if with_plans else a.new_zeros(1, 1, 1)
        on = scale if problem.objective != TRANSPORT else torch.zeros_like(scale)
        of_a, of_b = weight_gradients(eps, f[p], g[p], a, b, marginals)
        grad_a = torch.where(a > 0, on[:, None] * of_a, 0.0)
        grad_b = torch.where(b > 0, on[:, None] * of_b, 0.0)
        return scale[:, None, None] * P, grad_a, grad_b

    return _gradients(problem, costs, of_pair, want_costs, want_points, want_weights)


@each_problem(3)
def unrolled_backward(
    grad_loss: Tensor, grad_f: list[Tensor], grad_g: list[Tensor], *arguments: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The adjoint of the iterations, from their potentials, last to first.

    An iteration is f = p T(g'), g = q T(f), p and q the dampings. With
    S_ij = a_i exp((f_i + g_j / q - C_ij) / eps), whose columns sum to 1, and
    R_ij = b_j exp((f_i / p + g'_j - C_ij) / eps), whose rows do,
    dg_j = q sum_i S_ij (dC_ij - df_i - eps da_i / a_i) and
    df_i = p sum_j R_ij (dC_ij - dg'_j - eps db_j / b_j).
    """
    problem, (init, traces, *wanted) = read(arguments)
    eps, costs = problem.eps.item(), _matrices(problem)

    def of_pair(
        p: int, a: Tensor, b: Tensor, marginals: Marginals
    ) -> tuple[Tensor, Tensor, Tensor]:
        trace, scale = traces[p], problem.scale(grad_loss, p)
        damp_f, damp_g = damping(marginals.x, eps), damping(marginals.y, eps)
        C, n, L = counted(costs[p], a, b), a.shape[-1], trace.shape[1]
        f, g = trace[:, -1, :n], trace[:, -1, n:]
        if problem.objective == TRANSPORT:
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
        return C_bar, torch.where(a > 0, a_bar, 0.0), torch.where(b > 0, b_bar, 0.0)

    return _gradients(problem, costs, of_pair, *wanted)


@each_problem(3)
def implicit_backward(
    grad_loss: Tensor, grad_f: list[Tensor], grad_g: list[Tensor], *arguments: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    problem, (f, g, *wanted) = read(arguments)
    eps, costs, pairs = problem.eps.item(), _matrices(problem), as_pairs(problem.pairs)

    def of_pair(
        p: int, a: Tensor, b: Tensor, marginals: Marginals
    ) -> tuple[Tensor, Tensor, Tensor]:
        return implicit_gradient(
            problem.scale(grad_loss, p),
            grad_f[p] if grad_f else torch.zeros_like(a),
            grad_g[p] if grad_g else torch.zeros_like(b),
            costs[p],
            a,
            b,
            f[p],
            g[p],
            eps,
            problem.objective,
            pairs[p][0] == pairs[p][1],
            marginals,
        )

    # A direct solve: no iterations, no residual.
    status = grad_loss.new_zeros(len(costs), grad_loss.shape[-1], 2, dtype=torch.float64)
    return *_gradients(problem, costs, of_pair, *wanted), status


def plan_gap(*arguments: Any) -> tuple[list[Tensor], ...]:
    """Row and column sums of the plan P, and (KL(P'|P), 0), P' as in ``otloss/duality_gap.py``."""
    problem, given = read(arguments)
    found = []
    for (i, j), C, f, g, A, B in zip(
        as_pairs(problem.pairs), _matrices(problem), *given, strict=True
    ):
        P = plan(problem.eps.item(), C, f, g, problem.weights[i], problem.weights[j])
        r, c = P.sum(-1), P.sum(-2)
        Q = P * (A / r.clamp(min=TINY)).clamp(max=1).unsqueeze(-1)
        missing = (B - Q.sum(-2)).clamp(min=0)
        Q = Q * (B / Q.sum(-2).clamp(min=TINY)).clamp(max=1).unsqueeze(-2)
        share = missing / missing.sum(-1, keepdim=True).clamp(min=TINY)
        Q = Q + (A - Q.sum(-1)).clamp(min=0).unsqueeze(-1) * share.unsqueeze(-2)
        entries = torch.where(Q > 0, Q * (Q.clamp(min=TINY) / P.clamp(min=TINY)).log(), 0.0)
        kl = (entries - Q + P).sum((-2, -1))
        found.append((r, c, torch.stack([kl, torch.zeros_like(kl)], -1)))
    return tuple(map(list, zip(*found, strict=True)))


def extend(*arguments: Any) -> list[Tensor]:
    """softmin over y of the costs less g, at every x."""
    problem, (g,) = read(arguments)
    parts = zip(as_pairs(problem.pairs), _matrices(problem), g, strict=True)
    return [softmin(problem.eps.item(), C, v, problem.weights[j]) for (_, j), C, v in parts]


def plan_product(*arguments: Any) -> list[Tensor]:
    problem, potentials_and_v = read(arguments)
    parts = zip(as_pairs(problem.pairs), _matrices(problem), *potentials_and_v, strict=True)
    return [
        plan(problem.eps.item(), C, f, g, problem.weights[i], problem.weights[j]).to(v) @ v
        for (i, j), C, f, g, v in parts
    ]
