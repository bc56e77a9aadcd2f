"""The solves behind losses and results of densities on a grid, and their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from otloss import _check, ops
from otloss._options import Options
from otloss.autograd import refuse_higher_order
from otloss.autograd.grid import Grid, GridPotentials, GridValue, extended, softmin, transport
from otloss.combination import Combination
from otloss.eps import Scale, ScaledValue
from otloss.first_use import first_use
from otloss.problem import Problem
from otloss.reference import grid as reference
from otloss.reference.arguments import as_pairs
from otloss.reference.gradients import weight_gradients
from otloss.reference.marginals import centred, clamped, damping, marginals_of, value
from otloss.reference.semidual import column_ratio, marginal_error
from otloss.run import Solved, report
from otloss.totals import at_given_totals, at_unit_totals

__all__ = ["solve_densities"]

_LEARNT = (
    "the derivative in eps of a grid is available for the regularized value at a tolerance, and "
    "once: detach eps"
)


def solve_densities(
    problem: Problem,
    grid: Grid,
    spacing: list[float],
    combination: Combination,
    options: Options,
    init: list[Tensor],
) -> Solved:
    first_use(problem.weights[0])
    learnt = options.learns_eps()
    if learnt and (options.objective == "transport" or options.n_iters >= 0):
        raise NotImplementedError(_LEARNT)
    of_eps, options = options.eps, options._replace(eps=grid.eps)
    unit, totals = at_unit_totals(problem, options)
    init = totals.start(init, combination.pairs) if totals and init else init
    run = _iterations if options.n_iters >= 0 else _solution
    solved = run(unit, grid, spacing, combination, options, init)
    if totals is None:
        solved.loss = solved.loss.sum(0)
    solved = at_given_totals(solved, problem, totals, combination, options)
    report(problem, (), options, solved)
    if not learnt:
        return solved
    t = of_eps.to(solved.loss.device) / grid.eps
    pairs, coefficients, _ = combination
    with torch.no_grad():  # see otloss/eps.py
        fixed = Scale(t, True, options).penalties(solved, problem, pairs, coefficients)
        for p, (i, j) in enumerate(as_pairs(pairs)):
            sides = solved.f[p], solved.g[p], problem.weights[i], problem.weights[j]
            fixed = fixed + coefficients[p] * transport(grid, *sides)
    f, g = (tuple(refuse_higher_order(list(v), [t], _LEARNT)) for v in (solved.f, solved.g))
    return replace(solved, loss=ScaledValue.apply(solved.loss, t, fixed), f=f, g=g)


def _solution(
    problem: Problem,
    grid: Grid,
    spacing: list[float],
    combination: Combination,
    o: Options,
    init: list[Tensor],
) -> Solved:
    """The terms (P, B) of a loss, differentiable by the conditions of optimality."""
    pairs, weights = combination.pairs, problem.weights
    where: Any = reference if grid.plain else ops
    numbers = ops.number(o.eps), ops.penalties(o.rho_x, o.rho_y)

    def solve(chosen: list[int], start: list[Tensor]) -> Any:
        return where.grid_solve(
            grid.axes, spacing, [w.detach().contiguous() for w in weights], chosen, *numbers,
            [v.contiguous() for v in start], ops.number(o.tol), o.max_iters,
        )  # fmt: skip

    status, all_f, all_g = solve(pairs, init)
    coefficients = status.new_tensor(combination.coefficients).unsqueeze(-1)
    transports = o.objective == "transport"
    if combination.debiased and not transports and _check.readable(status):
        terms = coefficients * status[..., ops.TERM]
        # The potentials of both densities with themselves are better ones where S is negative.
        if bool((clamped(terms.sum(0), terms.abs().sum(0), terms.dtype) < 0).any()):
            again, f, g = solve(pairs[:2], [all_f[1], all_g[2]])
            again[..., ops.ITERATIONS] += status[:1, :, ops.ITERATIONS]
            status[0], all_f[0], all_g[0] = again[0], f[0], g[0]
    values: list[Tensor] = []
    some_f: list[Tensor] = []
    some_g: list[Tensor] = []
    for p, (i, j) in enumerate(as_pairs(pairs)):
        a, b, marginals = weights[i], weights[j], marginals_of(o.rho_x, o.rho_y, i, j)
        b = b.view_as(b) if i == j else b  # a traced node takes no tensor twice
        f, g, term = all_f[p], all_g[p], status[p, :, ops.TERM]
        if marginals.balanced:
            f, g = centred(f, g, a.detach(), b.detach())
        moves = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
        if moves:
            f, g = GridPotentials.apply(grid, marginals, a, b, f, g)
        if moves or transports:
            full = extended(grid, f, g, a, b, marginals)
        if transports:
            term = transport(grid, *full, a, b)
        elif moves:
            term = GridValue.apply(term, *weight_gradients(o.eps, *full, a, b, marginals), a, b)
        values.append(term)
        some_f.append(f)
        some_g.append(g)
    terms = coefficients * torch.stack(values)
    status[..., ops.TERM] = terms.detach()
    return Solved(terms, status, tuple(some_f), tuple(some_g))


def _iterations(
    problem: Problem,
    grid: Grid,
    spacing: list[float],
    combination: Combination,
    o: Options,
    init: list[Tensor],
) -> Solved:
    """The same after a number of iterations, differentiable by each of them."""
    rows, terms, all_f, all_g = [], [], [], []
    most = sum(float(C.abs().amax()) for C in grid.axes)
    for p, (i, j) in enumerate(as_pairs(combination.pairs)):
        a, b = problem.weights[i], problem.weights[j]
        marginals = marginals_of(o.rho_x, o.rho_y, i, j)
        g = init[2 * p + 1] if init else torch.zeros_like(b)
        for _ in range(o.n_iters):
            before = g
            f = damping(marginals.x, o.eps) * softmin(grid, g, b)
            t = softmin(grid.transposed, f, a)
            g = damping(marginals.y, o.eps) * t
        if o.objective == "transport":
            term = transport(grid, f, g, a, b)
        else:
            term = value(o.eps, f, f, g, a, b, 0, marginals)
        term = combination.coefficients[p] * term
        ratio = column_ratio(before.detach(), t.detach(), o.eps, marginals.y)
        error = marginal_error(b.detach(), ratio)
        fixed = [torch.full_like(error, v) for v in (o.n_iters, most)]
        reached = (error <= o.tol).to(error)
        rows.append(torch.stack([fixed[0], error, reached, fixed[1], term.detach()], -1))
        terms.append(term)
        all_f.append(f)
        all_g.append(g)
    return Solved(torch.stack(terms), torch.stack(rows), tuple(all_f), tuple(all_g))
