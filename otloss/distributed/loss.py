"""A sum over pairs of clouds that are spread over processes, and its gradient.

The ranks solve every problem together (``engine``). Then each has all potentials, so that the
gradients of its own points and weights need no exchange: where its points are columns of a cost
matrix, it makes that part of the matrix anew. A rank stores its rows of one matrix at a time; with
a cost function, of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from otloss import _check, ops
from otloss._options import Options
from otloss.autograd import refuse_higher_order
from otloss.combination import Combination
from otloss.costs import COSTS, degree, subtracted
from otloss.distributed.call import Call, agree
from otloss.distributed.engine import ShardedEngine
from otloss.distributed.ranks import Ranks
from otloss.reference.arguments import as_pairs
from otloss.reference.gradients import weight_gradients
from otloss.reference.marginals import (
    Marginals,
    clamped,
    counted,
    damping,
    marginals_of,
    softmin,
)
from otloss.run import Solved, report
from otloss.totals import at_given_totals

__all__ = ["combine"]


class Solution(NamedTuple):
    """Of one pair of clouds, the whole of both."""

    i: int
    j: int
    coefficient: float
    marginals: Marginals
    f: Tensor  # (B, n)
    g: Tensor  # (B, m)
    status: Tensor  # (B, 5) as in ``otloss.ops``

    def sides(self) -> list[tuple[int, int, Tensor, Tensor, float]]:
        """One cloud, the other, their potentials, and how often that is a side of the plan."""
        rows, columns = (self.i, self.j, self.f, self.g), (self.j, self.i, self.g, self.f)
        if self.i == self.j and torch.equal(self.f, self.g):
            return [(*rows, 2.0)]
        return [(*rows, 1.0), (*columns, 1.0)]


Solutions = tuple[Solution, ...]


@torch.compiler.disable(reason="a loss over several processes is not compiled")
def combine(
    clouds: dict[str, Any],
    given: dict[str, Any],
    combination: Combination,
    group: dist.ProcessGroup | None,
    check: Callable[[], Options],
) -> Tensor:
    """The sum over pairs of coefficient * OT(pair), as in ``otloss.combination``."""
    _check.no_transforms()  # in which torch could exchange nothing
    ranks = Ranks(group)
    with ranks.exchanging():
        call = agree(ranks, clouds, given, check)
        pairs = zip(as_pairs(combination.pairs), combination.coefficients, strict=True)
        solved = [_solve(call, i, j, coefficient) for (i, j), coefficient in pairs]
        if combination.debiased:
            _solve_negative_again(call, solved)
    solutions = tuple(solution for solution, _ in solved)
    costs = [C for _, C in solved if C is not None]
    points = [cloud.points for cloud in call.clouds]
    terms = _Terms.apply(call, solutions, *points, *call.unit.weights, *costs)
    status = torch.stack([s.status for s in solutions])
    problem, options = call.problem, call.options
    found = terms
    if not call.totals:
        dtype = problem.weights[0].dtype
        found = clamped(terms.sum(0), terms.detach().abs().sum(0), dtype).to(dtype)
        found = found if problem.batched else found[0]
    whole = at_given_totals(
        Solved(found, status, (), ()), problem, call.totals, combination, options
    )
    report(problem, (), options, whole)
    return whole.loss


def _solve(call: Call, i: int, j: int, coefficient: float) -> tuple[Solution, Tensor | None]:
    """A pair, and this rank's rows of its costs, with the graph of a cost function; named costs are
    not kept."""
    C, largest = _own_rows(call, i, j)
    _check_costs(call, C.detach(), float(largest.max()))
    marginals = marginals_of(call.options.rho_x, call.options.rho_y, i, j)
    f, g = (call.clouds[c].weights.clone() for c in (i, j))
    status = torch.zeros(len(largest), 5, dtype=torch.float64)
    status[:, ops.MAX_COST] = largest
    solution = Solution(i, j, coefficient, marginals, f, g, status)
    for k in range(len(largest)):
        _solve_entry(call, solution, C.detach(), k, ())
    return solution, None if call.named() else C


def _own_rows(call: Call, i: int, j: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of a pair's costs, (B, n_local, m), and the largest of all ranks, (B,)."""
    x, y, made = call.clouds[i], call.clouds[j], list[Tensor]()

    def fill(largest: Tensor) -> None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not call.named()):
            made.append(call.costs(x.points, y.whole, x.own_weights(), y.weights))
        C = made[0].detach()
        if C.numel():
            C = counted(C, x.own_weights(), y.weights) if call.problem.padded else C
            largest[:, call.ranks.rank] = torch.maximum(-C.amin((1, 2)), C.amax((1, 2)))

    largest = call.ranks.sum(x.whole.new_zeros(len(x.whole), call.ranks.count), fill)
    return made[0], largest.amax(-1)


@torch.no_grad()
def _solve_entry(
    call: Call, solution: Solution, C: Tensor, k: int, init: tuple[Tensor, ...]
) -> None:
    """Entry k of the batch, from f and g if given; its sweeps are added to those before."""
    (i, j, coefficient, marginals, f, g, status), options = solution, call.options
    x, y = call.clouds[i], call.clouds[j]
    clouds = call.between(x, y)
    points = clouds.item(k) if clouds else None
    engine = ShardedEngine(x.shard, C[k], x.weights[k], y.weights[k], marginals, points)
    if points:
        same = points.equal and marginals.x == marginals.y
    else:
        same = i == j and options.symmetric is True
    solved = engine.solve(same, options, init)
    f[k], g[k] = solved.f, solved.g
    status[k, ops.ITERATIONS] += solved.iterations
    status[k, ops.ERROR], status[k, ops.CONVERGED] = solved.error, float(solved.converged)
    status[k, ops.TERM] = coefficient * float(engine.value(options, solved.f, solved.g))


def _solve_negative_again(call: Call, solved: list[tuple[Solution, Tensor | None]]) -> None:
    """As in ``solve_negative_again`` of csrc/cpu/solve/solve.cpp: the pair of a divergence that is
    negative, from the potentials of the clouds against themselves."""
    (pair, costs), options = solved[0], call.options
    status = torch.stack([solution.status for solution, _ in solved])
    every, dtype = status[..., ops.TERM], pair.f.dtype
    again = clamped(every.sum(0), every.abs().sum(0), dtype) < 0
    again &= status[0, :, ops.CONVERGED] > 0
    metric = call.named() or options.symmetric is True
    applies = metric and options.n_iters < 0 and options.objective == "regularized"
    if not (applies and bool(again.any())):
        return
    C = _own_rows(call, pair.i, pair.j)[0] if costs is None else costs
    for k in again.nonzero()[:, 0].tolist():
        _solve_entry(call, pair, C.detach(), k, (solved[1][0].f[k], solved[2][0].g[k]))


def _check_costs(call: Call, C: Tensor, largest: float) -> None:
    """Raises, on every rank, where a problem cannot be solved."""

    def check() -> tuple[None, None]:
        for name, x in zip(call.problem.names, call.problem.points, strict=True):
            _check.finite(name, x)
        if not call.named():
            _check.finite("the rows of the cost matrix", C)
        return None, None

    if not math.isfinite(largest):
        call.ranks.agree(check)
        raise ValueError(f"costs overflow {C.dtype}: scale the data down")
    largest = max(largest, subtracted(call.options.cost))
    _check.resolution(call.options.eps, largest, C.dtype)
    points, weights = zip(*((cloud.whole, cloud.weights) for cloud in call.clouds), strict=True)
    whole = replace(call.problem, points=points, weights=weights)
    _check.distances(whole, degree(call.options.cost), largest)


# ------------------------------------------------------------------------------------ its gradient


class _Terms(torch.autograd.Function):
    """``(call, solutions, *points, *weights, *costs) -> terms``, coefficient * OT of each pair,
    (P, B) in float64, at fixed potentials.

    ``costs`` are the rows that a cost function has made here, or none. They carry gradients to its
    parameters, and to this rank's points in the rows.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, solutions: Solutions, *tensors: Tensor) -> Tensor:
        ctx.call, ctx.solutions = call, solutions
        ctx.save_for_backward(*tensors)
        terms = torch.stack([s.status[:, ops.TERM] for s in solutions])
        return terms.to(tensors[0].device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        call, solutions, wanted = ctx.call, ctx.solutions, iter(ctx.needs_input_grad[2:])
        clouds, seeds = call.clouds, grad.to(call.clouds[0].whole)
        of_points = _points_gradient if call.named() else _columns_gradient
        grads: list[Tensor | None] = []
        for of_tensor in (of_points, _weights_gradient):
            for c in range(len(clouds)):
                grads.append(of_tensor(call, solutions, seeds, c) if next(wanted) else None)
        for s, seed, C in zip(solutions, seeds, ctx.saved_tensors[len(grads) :], strict=False):
            x, y = clouds[s.i], clouds[s.j]
            weights, potentials = [x.own_weights(), y.weights], [x.shard.own(s.f), s.g]
            found = _plan_gradient(call, s, seed, C, weights, potentials) if next(wanted) else None
            grads.append(found)
        message = "second derivatives of distributed losses are not available"
        present = [g for g in grads if g is not None]
        kept = iter(refuse_higher_order(present, [*ctx.saved_tensors, grad], message))
        return None, None, *(None if g is None else next(kept) for g in grads)


def _points_gradient(call: Call, solutions: Solutions, seeds: Tensor, c: int) -> Tensor:
    """For named costs, which are symmetric: of every side that the cloud takes in a pair, this
    rank's points as rows."""
    cloud = call.clouds[c]
    if not cloud.shard.size:
        return torch.zeros_like(cloud.points)
    sides = [
        (other, factor * s.coefficient, seed, cloud.shard.own(u).contiguous(), v)
        for s, seed in zip(solutions, seeds, strict=True)
        for side, other, u, v, factor in s.sides()
        if side == c
    ]
    others, coefficients, own_seeds, f, g = (list(each) for each in zip(*sides, strict=True))
    x = [cloud.points.detach().contiguous(), *(other.whole for other in call.clouds)]
    w = [cloud.own_weights(), *(other.weights for other in call.clouds)]
    pairs = [side for other in others for side in (0, 1 + other)]
    kind = COSTS[str(call.options.cost)]
    problem = ops.problems(w, pairs, coefficients, call.options.eps, points=x, kind=kind)
    seed = torch.stack(own_seeds)
    _, (found,), *_ = ops.envelope_backward(seed, *problem, f, g, [], [0], False)
    return found


def _columns_gradient(call: Call, solutions: Solutions, seeds: Tensor, c: int) -> Tensor:
    """For a cost function: of the pairs in which this rank's points are columns."""
    cloud = call.clouds[c]
    total = torch.zeros_like(cloud.points)
    for s, seed in zip(solutions, seeds, strict=True):
        if s.j != c:
            continue
        x, y = call.clouds[s.i], cloud.points.detach().requires_grad_()
        weights = [x.weights, cloud.own_weights()]
        with torch.enable_grad():
            C = call.costs(x.whole, y, *weights)
        of_C = _plan_gradient(call, s, seed, C, weights, [s.f, cloud.shard.own(s.g)])
        if C.requires_grad:
            total += torch.autograd.grad(C, y, of_C, materialize_grads=True)[0]
    return total


def _plan_gradient(
    call: Call,
    solution: Solution,
    seed: Tensor,
    C: Tensor,
    weights: list[Tensor],
    potentials: list[Tensor],
) -> Tensor:
    """The gradient in some rows and columns of a pair's costs: the plan there."""
    if not C.numel():
        return torch.zeros_like(C)
    costs, w = [C.detach().contiguous()], [w.contiguous() for w in weights]
    problem = ops.problems(w, [0, 1], [solution.coefficient], call.options.eps, costs=costs)
    f, g = (v.contiguous() for v in potentials)
    (found,), *_ = ops.envelope_backward(seed, *problem, [f], [g], [0], [], False)
    return found


def _weights_gradient(call: Call, solutions: Solutions, seeds: Tensor, c: int) -> Tensor:
    """Of all ranks' weights, since their total depends on this rank's."""
    w = call.clouds[c].weights
    total = torch.zeros_like(w)
    for s, seed in zip(solutions, seeds, strict=True):
        if call.options.objective == "transport":  # the plan is held constant
            continue
        a, b = call.clouds[s.i].weights, call.clouds[s.j].weights
        f = _with_empty_bins(call, s, exchanged=False) if s.i == c else s.f
        g = _with_empty_bins(call, s, exchanged=True) if s.j == c else s.g
        of_sides = weight_gradients(call.options.eps, f, g, a, b, s.marginals)
        for side, of_side in zip((s.i, s.j), of_sides, strict=True):
            if side == c:
                total += s.coefficient * seed.unsqueeze(-1) * of_side
    return torch.where(call.problem.present[c], total, 0.0)


@torch.no_grad()
def _with_empty_bins(call: Call, s: Solution, *, exchanged: bool) -> Tensor:
    """The potential of the rows, or of the columns if ``exchanged``, and at this rank's points of
    weight 0 that of the first mass to come; see ``otloss.autograd.empty_bins``."""
    own, other, v, u = (s.j, s.i, s.g, s.f) if exchanged else (s.i, s.j, s.f, s.g)
    x, y, rho = call.clouds[own], call.clouds[other], s.marginals[int(exchanged)]
    empty = x.shard.own(call.problem.present[own] & (x.weights == 0))
    if not bool(empty.any()):
        return v
    points, counts = torch.where(empty.unsqueeze(-1), x.points, 0.0), empty.to(x.weights)
    if exchanged:
        C = call.costs(y.whole, points, y.weights, counts).mT
    else:
        C = call.costs(points, y.whole, counts, y.weights)
    C, u, b = C.double(), u.double(), y.weights.double()
    there = damping(rho, call.options.eps) * softmin(call.options.eps, C, u, b)
    filled = v.clone()
    own_part = x.shard.own(filled)
    own_part.copy_(torch.where(empty & there.isfinite(), there.to(v), own_part))
    return filled
