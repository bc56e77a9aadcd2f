"""The call that all losses and results share: a set of OT problems, solved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from otloss import _check, ops, status
from otloss._options import Options
from otloss.autograd import Places, Settings, Solve, evaluate
from otloss.autograd.settings import batched
from otloss.costs import degree, subtracted
from otloss.eps import scale_of
from otloss.first_use import first_use
from otloss.problem import Problem
from otloss.streamed_functions import solve_by_rows
from otloss.target import SelfProblem

__all__ = ["Solved", "evaluated", "report", "run"]


@dataclass
class Solved:
    loss: Tensor  # () or (B,)
    status: Tensor  # (P, B, 5)
    f: tuple[Tensor, ...]  # (B, n) per pair, if they were asked for
    g: tuple[Tensor, ...]  # (B, m) per pair
    settings: Settings | None = None


def run(
    problem: Problem,
    costs: Sequence[Tensor] | None,
    pairs: list[int],
    coefficients: list[float],
    options: Options,
    init: Sequence[Tensor] = (),
    *,
    potentials: bool = False,
    dense: bool = True,
    combined: bool = True,
    system: list[Tensor] | None = None,
    target: SelfProblem | None = None,
) -> Solved:
    """Solves all pairs and returns the weighted sum of their values, or not ``combined`` its terms:
    as ``loss`` () or (B,), or (P, B) in float64.

    ``costs``: given matrices, or None to compute costs from the points; ``dense`` says whether they
    are stored. Those of a function are not.
    ``potentials``: whether f and g are returned too, differentiable.
    ``target``: the last pair, a cloud against itself whose solution is kept for later calls.
    ``system``: receives the status of the linear system when an implicit gradient is taken.
    """
    first_use(problem.weights[0])
    given, scale = problem, scale_of(problem, options)
    by_rows = costs is None and not isinstance(options.cost, str)
    if scale:
        problem, costs, init = scale.down(problem, () if by_rows else costs, init)
        options, potentials = scale.options, potentials or scale.needs_potentials()
    costs, points = ((), problem.points) if costs is None else (costs, ())
    live = _live_pairs(costs, points, problem.weights, pairs) if torch.is_grad_enabled() else []
    places = None
    if problem.present:
        places = Places(
            list(problem.seen),
            [batched(x.detach()) for x in points],
            [v.contiguous() for v in init],
            list(problem.present),
        )
    settings = Settings(
        pairs=pairs,
        coefficients=coefficients,
        combined=combined,
        options=options,
        potentials=potentials,
        trace=len(live) > 0 and options.follows_iterations(),
        dense=dense,
        batched=problem.batched,
        single=_are_single(problem, points, options),
        eps=ops.number(options.eps),
        rho=ops.penalties(options.rho_x, options.rho_y),
        tol=ops.number(options.tol),
        live=live,
        target=target,
        system=system,
        places=places,
    )
    if by_rows:
        parts = solve_by_rows(problem, pairs, coefficients, options, init, scale, combined=combined)
        solved = Solved(*parts, settings)
        return scale.up(solved, given, pairs, coefficients) if scale else solved
    tensors = (*costs, *points, *problem.weights, *init)
    sizes = [len(costs), len(points), len(problem.weights), len(init)]
    solved = evaluated(settings, sizes, tensors)
    return scale.up(solved, given, pairs, coefficients) if scale else solved


def evaluated(settings: Settings, sizes: list[int], tensors: Sequence[Tensor]) -> Solved:
    """What ``Solve`` gives, with a node where a gradient flows."""
    # Forward-mode derivatives are not available, which only a node says.
    if settings.live or forward_ad._current_level >= 0:
        outputs = Solve.apply(settings, sizes, *tensors)
    else:
        outputs, *_ = evaluate(settings, sizes, tensors)
    loss, how, *rest = outputs
    half = len(rest) // 2
    return Solved(loss, how, tuple(rest[:half]), tuple(rest[half:]), settings)


def _live_pairs(
    costs: Sequence[Tensor], points: Sequence[Tensor], weights: Sequence[Tensor], pairs: list[int]
) -> list[int]:
    """Those that a gradient flows through."""
    of_pairs, of_clouds = ([t.requires_grad for t in ts] for ts in (costs, weights))
    for c, x in enumerate(points):
        of_clouds[c] |= x.requires_grad
    sides = enumerate(zip(pairs[::2], pairs[1::2], strict=True))
    return [p for p, (i, j) in sides if of_clouds[i] or of_clouds[j] or (of_pairs and of_pairs[p])]


def _are_single(problem: Problem, points: Sequence[Tensor], options: Options) -> bool:
    """Whether the kernels take the clouds as they are, without a batch dimension."""
    return (
        ops.NATIVE
        and len(points) > 0  # torch 2.10 cannot trace bool of a tuple
        and not (problem.padded or problem.batched or torch.compiler.is_compiling())
        and options.method != "reference"
        and all(
            x.is_cpu and x.is_contiguous() and x.dtype == problem.weights[0].dtype for x in points
        )
    )


def report(problem: Problem, costs: Sequence[Tensor], options: Options, solved: Solved) -> None:
    """Raises for costs that are not finite or overflow; warns if the solver did not converge.

    Where data is not read, the status is kept for :func:`otloss.last_status` only.
    """
    status.record(solved.status)
    dtype, least = problem.weights[0].dtype, subtracted(options.cost)
    if not _check.readable(solved.status):
        if _check.unread(solved.status):
            costs_up_to = solved.status[..., ops.MAX_COST].amax(0).clamp(min=least)
            _check.resolution(options.eps, costs_up_to, dtype)
            if problem.points:
                _check.distances(problem, degree(options.cost), costs_up_to)
        return
    rows = status.rows_of(solved.status)
    largest = status.max_cost(rows)
    if not math.isfinite(largest):
        for name, x in zip(problem.names, problem.points, strict=False):
            _check.finite(name, x)
        for C in costs:
            _check.finite("C" if not problem.points else "the cost matrix", C)
        raise ValueError(f"costs overflow {dtype}: scale the data down")
    eps, largest = options.eps, max(largest, least)
    if isinstance(eps, Tensor):
        each = solved.status[..., ops.MAX_COST].amax(0).clamp(min=least)
        hardest = (each / eps.detach()).argmax()
        eps, largest = eps.expand_as(each)[hardest].item(), each[hardest].item()
    _check.resolution(eps, largest, dtype)
    if problem.points:
        most = solved.status[..., ops.MAX_COST].amax(0) if problem.batched else largest
        _check.distances(problem, degree(options.cost), most)
    values = solved.loss.tolist()
    if not all(map(math.isfinite, values if problem.batched else [values])):
        raise ValueError(f"sums of costs up to {largest:.3g} overflow {dtype}: scale the data down")
    status.warn_not_converged(options, rows, dtype)
