"""A sum over pairs of clouds that are spread over processes, and its gradient.

The ranks solve every problem together (``engine``). Then each has all potentials, so that the
gradients of its own points and weights need no exchange: where its points are columns of a cost
matrix, it makes that part of the matrix anew. A rank stores its rows of one matrix at a time; with
a cost function, of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from otloss import _check, ops
from otloss._options import Options
from otloss.autograd import refuse_higher_order
from otloss.combination import Combination
from otloss.costs import COSTS, subtracted
from otloss.distributed.call import Call, Cloud, agree
from otloss.distributed.engine import ShardedEngine
from otloss.distributed.ranks import Ranks
from otloss.reference.gradients import weight_gradients
from otloss.reference.marginals import Marginals, counted, marginals_of
from otloss.reference.operations import as_pairs
from otloss.result import Solved
from otloss.solve import report

__all__ = ["combine"]


class Solution(NamedTuple):
    """Of one pair of clouds, the whole of both."""

    i: int
    j: int
    coefficient: float
    marginals: Marginals
    f: Tensor  # (B, n)
    g: Tensor  # (B, m)
    value: Tensor  # (B,)
    status: Tensor  # (B, 5) as in ``otloss.ops``


def combine(
    clouds: dict[str, Any],
    given: dict[str, Any],
    combination: Combination,
    group: dist.ProcessGroup | None,
    check: Callable[[], Options],
) -> Tensor:
    """The sum over pairs of coefficient * OT(pair), as in ``otloss.combination``."""
    ranks = Ranks(group)
    with ranks.exchanging():
        call = agree(ranks, clouds, given, combination, check)
        terms = zip(as_pairs(combination.pairs), combination.coefficients, strict=True)
        solved = [_solve(call, i, j, coefficient) for (i, j), coefficient in terms]
    solutions, costs = zip(*solved, strict=True)
    problem, options = call.problem, call.options
    total = torch.stack([s.coefficient * s.value for s in solutions]).sum(0)
    loss = total.to(problem.weights[0]) if problem.batched else total[0].to(problem.weights[0])
    report(problem, (), options, Solved(loss, torch.stack([s.status for s in solutions]), (), ()))
    own = [t for cloud in call.clouds for t in (cloud.points, cloud.weights)]
    made = [] if call.named() else costs
    loss = _Loss.apply(call, solutions, loss, *own, *made)
    if combination.debiased and options.objective == "regularized" and not options.balanced():
        x, y = (_mass(cloud) for cloud in call.clouds)
        term = 0.5 * options.eps * (x - y).square()
        loss = loss + (term if problem.batched else term[0])
    return loss


def _mass(cloud: Cloud) -> Tensor:
    """(B,), differentiable in this rank's weights, with gradient 0 where they are 0."""
    own = torch.where(cloud.weights > 0, cloud.weights, 0.0).sum(-1)
    return cloud.whole_weights.sum(-1) + (own - own.detach())


def _solve(call: Call, i: int, j: int, coefficient: float) -> tuple[Solution, Tensor]:
    """A pair, and this rank's rows of its costs (B, n_local, m), with the graph of a function."""
    x, y, options, made = call.clouds[i], call.clouds[j], call.options, list[Tensor]()
    marginals = marginals_of(options.rho_x, options.rho_y, i, j)

    def fill(largest: Tensor) -> None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not call.named()):
            made.append(call.costs(x.points, y.whole, x.weights.detach(), y.whole_weights))
        sizes = counted(made[0].detach(), x.weights.detach(), y.whole_weights).abs().flatten(1)
        largest[:, call.ranks.rank] = sizes.amax(1) if sizes.numel() else 0

    largest = call.ranks.sum(x.whole.new_zeros(len(x.whole), call.ranks.count), fill).amax(-1)
    C = made[0].detach()
    _check_costs(call, C, float(largest.max()))
    symmetric = i == j and (call.named() or options.symmetric is True)
    clouds = call.between(x, y)
    found, values, statuses = [], [], []
    with torch.no_grad():
        for k in range(len(C)):
            a, b = x.whole_weights[k], y.whole_weights[k]
            points = clouds.item(k) if clouds else None
            engine = ShardedEngine(x.shard, C[k], a, b, marginals, points)
            solved = engine.solve(symmetric, options)
            values.append(engine.value(options, solved.f, solved.g))
            term = coefficient * float(values[-1])
            reached = float(solved.converged)
            statuses.append([solved.iterations, solved.error, reached, float(largest[k]), term])
            found.append((solved.f, solved.g))
    f, g = (torch.stack(potentials) for potentials in zip(*found, strict=True))
    status = torch.tensor(statuses, dtype=torch.float64)
    return Solution(i, j, coefficient, marginals, f, g, torch.stack(values), status), made[0]


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


# ------------------------------------------------------------------------------------ its gradient


class _Loss(torch.autograd.Function):
    """``(call, solutions, loss, *(points, weights), *costs) -> loss``, at fixed potentials.

    ``costs`` are the rows that a cost function has made, of each pair: by them gradients reach
    this rank's points in the rows, and parameters of the function.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, solutions: list[Solution], loss: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.call, ctx.solutions = call, solutions
        ctx.save_for_backward(*tensors)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        call, solutions, wanted = ctx.call, ctx.solutions, list(ctx.needs_input_grad[3:])
        seed, grads = grad.reshape(-1).to(call.clouds[0].whole), list[Tensor | None]()
        of_points = _points_gradient if call.named() else _columns_gradient
        for c in range(len(call.clouds)):
            for of_tensor in (of_points, _weights_gradient):
                grads.append(of_tensor(call, solutions, seed, c) if wanted.pop(0) else None)
        for s, C in zip(solutions, ctx.saved_tensors[len(grads) :], strict=False):
            x, y = call.clouds[s.i], call.clouds[s.j]
            weights = [x.weights.detach(), y.whole_weights]
            grads.append(_plan_gradient(call, s, seed, C, weights, [x.shard.own(s.f), s.g]))
        message = "second derivatives of distributed losses are not available"
        present = [g for g in grads if g is not None]
        kept = iter(refuse_higher_order(present, [*ctx.saved_tensors, grad], message))
        return None, None, None, *(None if g is None else next(kept) for g in grads)


def _points_gradient(call: Call, solutions: list[Solution], seed: Tensor, c: int) -> Tensor:
    """For named costs, which are symmetric: of every side that the cloud takes in a pair, this
    rank's points as rows."""
    cloud = call.clouds[c]
    if not cloud.shard.size:
        return torch.zeros_like(cloud.points)
    pairs, coefficients, f, g = list[int](), list[float](), list[Tensor](), list[Tensor]()
    for s in solutions:
        for side, other, u, v in ((s.i, s.j, s.f, s.g), (s.j, s.i, s.g, s.f)):
            if side == c:
                pairs += [0, 1 + other]
                coefficients.append(s.coefficient)
                f.append(cloud.shard.own(u).contiguous())
                g.append(v)
    x = [cloud.points.detach().contiguous(), *(other.whole for other in call.clouds)]
    w = [cloud.weights.detach(), *(other.whole_weights for other in call.clouds)]
    kind = COSTS[str(call.options.cost)]
    costs = ops.cost(x, w, pairs, kind)
    problem = ops.problems(
        w, pairs, coefficients, call.options.eps, costs=costs, points=x, kind=kind
    )
    _, (found,), *_ = ops.envelope_backward(seed, *problem, f, g, [], [0], False)
    return found


def _columns_gradient(call: Call, solutions: list[Solution], seed: Tensor, c: int) -> Tensor:
    """For a cost function: of the pairs in which this rank's points are columns."""
    cloud = call.clouds[c]
    total = torch.zeros_like(cloud.points)
    for s in solutions:
        if s.j != c:
            continue
        x, y = call.clouds[s.i], cloud.points.detach().requires_grad_()
        weights = [x.whole_weights, cloud.weights.detach()]
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


def _weights_gradient(call: Call, solutions: list[Solution], seed: Tensor, c: int) -> Tensor:
    cloud, total = call.clouds[c], torch.zeros_like(call.clouds[c].whole_weights)
    for s in solutions if call.options.objective == "regularized" else []:
        a, b = call.clouds[s.i].whole_weights, call.clouds[s.j].whole_weights
        of_sides = weight_gradients(call.options.eps, s.f, s.g, a, b, s.marginals)
        for side, of_side in zip((s.i, s.j), of_sides, strict=True):
            if side == c:
                total += s.coefficient * seed.unsqueeze(-1) * of_side
    return cloud.shard.own(torch.where(cloud.whole_weights > 0, total, 0.0))
