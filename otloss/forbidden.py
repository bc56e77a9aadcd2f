"""Forbidden pairs, whose cost is +infinity.

A solve gets a finite cost in their place, so high above the others that the plan underflows to 0
there. Every sum is then as if these pairs did not exist, and the solution is that of the problem
without them. The plan at forbidden pairs shows whether the cost was high enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from otloss import _check, ops
from otloss._options import Options
from otloss.eps import detached, of_rows
from otloss.problem import Problem
from otloss.reference.arguments import as_pairs
from otloss.reference.marginals import UNDERFLOW, Eps, of_entries, plan
from otloss.run import Solved

__all__ = ["solve_allowed"]

# How far above the other costs, tried in turn, in units of (eps + rho) * UNDERFLOW.
HEIGHTS = (2.0, 16.0, 256.0)
# Of iterations of a given number, above the first of these heights, in ranges of the other costs.
RANGES = (2.0, 8.0, 32.0, 128.0)

_NO_PLAN = (
    "no plan avoids the forbidden pairs, those of infinite cost: some mass has no way but through "
    "them. Allow more pairs, at a high cost, or let mass stay with unbalanced="
)

Solve = Callable[[Sequence[Tensor], bool], Solved]


def solve_allowed(
    problem: Problem, pairs: list[int], costs: Sequence[Tensor], options: Options, solve: Solve
) -> tuple[Sequence[Tensor], Solved]:
    """``solve(costs, potentials)`` of the costs (B, n, m) of all pairs, with finite ones in place
    of +infinity, which are returned too; ``potentials``: whether f and g are wanted.

    Raises where no plan avoids the forbidden pairs. Where data is not read the loss is NaN then.
    """
    if all(_check.readable(C) and C.detach().amax() != math.inf for C in costs):
        return costs, solve(costs, False)
    forbidden = [C.detach() == math.inf for C in costs]
    weights = problem.weights
    sides = [(weights[i].detach(), weights[j].detach()) for i, j in as_pairs(pairs)]
    rho = sum(r for r in (options.rho_x, options.rho_y) if math.isfinite(r))
    unit, eps = UNDERFLOW[weights[0].dtype], of_rows(detached(options).eps, weights[0])
    margin = unit * of_entries(eps)
    if _check.readable(costs[0]):
        for mask, (i, j), (a, b) in zip(forbidden, as_pairs(pairs), sides, strict=True):
            _check_ways(problem, mask, a, b, options.rho_y if i else options.rho_x, "row", i)
            _check_ways(problem, mask.mT, b, a, options.rho_y if j else options.rho_x, "column", j)
    if options.n_iters >= 0:
        height = HEIGHTS[0] * (margin + unit * rho)
        return _iterated(costs, forbidden, sides, height, eps, solve)
    if not _check.readable(costs[0]):
        finite = _lifted(costs, forbidden, HEIGHTS[1] * (margin + unit * rho))
        solved = solve(finite, True)
        return finite, _failed_where(_used(solved, finite, forbidden, margin), solved)
    share = None
    for height in HEIGHTS:
        finite = _lifted(costs, forbidden, height * (margin + unit * rho))
        solved = solve(finite, True)
        unsettled = solved.status[..., ops.CONVERGED] != 0  # one that did not converge says so
        unsettled = unsettled & _used(solved, finite, forbidden, margin)
        if not bool(unsettled.any()):
            return finite, solved
        # Mass without another way stays at forbidden pairs however high their cost; the share of
        # all other mass falls from one height to the next.
        last, share = share, _share(solved, finite, forbidden, sides, eps)
        lost = unsettled & (share > 3 * options.tol)
        if last is not None and bool((lost & (share > 0.5 * last)).any()):
            break
    else:
        if not bool(lost.any()):  # what is left there is below the tolerance
            return finite, solved
    raise ValueError(_NO_PLAN)


def _iterated(
    costs: Sequence[Tensor],
    forbidden: list[Tensor],
    sides: list[tuple[Tensor, Tensor]],
    height: Eps,
    eps: Eps,
    solve: Solve,
) -> tuple[Sequence[Tensor], Solved]:
    """The same of a given number of iterations. The first ones may use a pair that the last one
    does not: their costs are right if higher ones change nothing."""
    last, readable = None, _check.readable(costs[0])
    for ranges in RANGES if readable else RANGES[1:3]:
        finite = _lifted(costs, forbidden, height, ranges)
        solved = solve(finite, True)
        if last is not None:
            moved = _moved(last, solved, forbidden, sides, eps)
            if not readable:
                return finite, _failed_where(moved, solved)
            if not bool(moved.any()):
                return finite, solved
        last = solved
    raise ValueError(_NO_PLAN)


def _moved(
    one: Solved,
    other: Solved,
    forbidden: list[Tensor],
    sides: list[tuple[Tensor, Tensor]],
    eps: Eps,
) -> Tensor:
    """In which problems potentials differ by more than rounding, (P, B), at points that have an
    allowed pair."""
    moved = []
    for p, (mask, (a, b)) in enumerate(zip(forbidden, sides, strict=True)):
        ways = ~mask & (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2)
        differ = torch.zeros_like(a[:, 0], dtype=torch.bool)
        for u, v, there in (
            (one.f[p], other.f[p], ways.any(-1)),
            (one.g[p], other.g[p], ways.any(-2)),
        ):
            apart, size = (torch.where(there, t.detach().abs(), 0.0) for t in (u - v, u))
            rounding = 64 * torch.finfo(a.dtype).eps * (size.amax(-1, True) + eps)
            differ = differ | (apart > rounding).any(-1)
        moved.append(differ)
    return torch.stack(moved)


def _lifted(
    costs: Sequence[Tensor], forbidden: list[Tensor], height: Eps, ranges: float = 0.0
) -> list[Tensor]:
    """The costs with forbidden ones ``height``, and ``ranges`` of theirs, above the largest of the
    others."""
    lifted = []
    for C, mask in zip(costs, forbidden, strict=True):
        top = torch.where(mask, -math.inf, C.detach()).amax((-2, -1), keepdim=True)
        least = torch.where(mask, math.inf, C.detach()).amin((-2, -1), keepdim=True)
        span = torch.where(least <= top, top - least, 0.0)
        top = torch.where(least <= top, top, 0.0)  # else all are forbidden
        lifted.append(torch.where(mask, top.abs() + height + ranges * span, C))
    return lifted


def _used(solved: Solved, costs: list[Tensor], forbidden: list[Tensor], margin: Eps) -> Tensor:
    """In which problems the plan is not 0 at a forbidden pair, (P, B)."""
    used = []
    for f, g, C, mask in zip(solved.f, solved.g, costs, forbidden, strict=True):
        above = f.detach().unsqueeze(-1) + g.detach().unsqueeze(-2) - C.detach() + margin
        used.append((mask & (above > 0)).flatten(1).any(1))
    return torch.stack(used)


def _share(
    solved: Solved,
    costs: list[Tensor],
    forbidden: list[Tensor],
    sides: list[tuple[Tensor, Tensor]],
    eps: Eps,
) -> Tensor:
    """How much of the plan is at forbidden pairs, (P, B): where no other plan is possible, the part
    that stays however high these are."""
    shares = []
    for f, g, C, mask, (a, b) in zip(solved.f, solved.g, costs, forbidden, sides, strict=True):
        P = plan(eps, C.detach(), f.detach(), g.detach(), a, b)
        shares.append((P * mask).sum((-2, -1)) / P.sum((-2, -1)))
    return torch.stack(shares)


def _failed_where(used: Tensor, solved: Solved) -> Solved:
    """Not converged, and with a loss of NaN, where a forbidden pair is used."""
    of_problem = used.any(0) if solved.loss.dim() else used.any()
    loss = torch.where(of_problem, math.nan, solved.loss)
    status = solved.status.clone()
    status[..., ops.CONVERGED] *= ~used
    return replace(solved, loss=loss, status=status)


def _check_ways(
    problem: Problem, mask: Tensor, a: Tensor, b: Tensor, rho: float, side: str, cloud: int
) -> None:
    """Raises if a row of positive weight, which must be moved, has no pair that is allowed."""
    closed = (mask | (b.unsqueeze(-2) == 0)).all(-1) & (a > 0)
    if math.isfinite(rho) or not bool(closed.any()):
        return
    if problem.points:
        _check.finite(problem.names[cloud], problem.points[cloud])
    where = closed.nonzero()[0].tolist()
    place = ", ".join(map(str, where if problem.batched else where[1:]))
    raise ValueError(
        f"all costs of {side} {place} are infinite, so that none of its pairs is allowed, and its "
        f"weight {a[tuple(where)].item():.3g} must go somewhere. Allow a pair, set the weight to "
        "0, or let mass stay with unbalanced="
    )
