"""A loss as a weighted sum of OT values over pairs of clouds, all solved in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from otloss import _check, ops
from otloss._options import Options
from otloss.cost_matrices import build_costs, ready_for_blocks, see_empty_bins
from otloss.eps import check_shape
from otloss.forbidden import solve_allowed
from otloss.known_calls import keep, kind_of_call, known_call
from otloss.method import choose
from otloss.problem import Problem, check_clouds
from otloss.reference.arguments import as_pairs
from otloss.reference.engine import is_symmetric
from otloss.run import Solved, evaluated, report, run
from otloss.target import SelfProblem, Target
from otloss.totals import at_given_totals, at_unit_totals
from otloss.transforms import inside

__all__ = [
    "DEBIASED",
    "LOSS",
    "MINIBATCH",
    "Combination",
    "Memory",
    "combine",
    "prepare",
    "solve_pairs",
]


class Combination(NamedTuple):
    """A loss: the sum of coefficient * OT over pairs of clouds, flat ``[i0, j0, i1, j1, ...]``."""

    pairs: list[int]
    coefficients: list[float]
    # OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2: with eps (sum a - sum b)^2 / 2 where the regularized
    # problems are unbalanced
    debiased: bool = False


LOSS = Combination([0, 1], [1.0])
DEBIASED = Combination([0, 1, 0, 0, 1, 1], [1.0, -0.5, -0.5], debiased=True)
MINIBATCH = Combination([0, 2, 0, 3, 1, 2, 1, 3, 0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0, -2.0, -2.0])


@dataclass
class Memory:
    """Potentials of the last call, to start the next one from."""

    potentials: list[Tensor] = field(default_factory=list)

    def start(self, problem: Problem, pairs: list[int]) -> list[Tensor]:
        """f and g of each pair, or [] if a shape, dtype or device has changed."""
        sides = [problem.weights[c] for c in pairs]
        kept = len(self.potentials) == len(sides) and all(
            v.shape == w.shape and v.dtype == w.dtype and v.device == w.device
            for v, w in zip(self.potentials, sides, strict=True)
        )
        return self.potentials if kept else []

    def keep(self, solved: Solved) -> None:
        """Copies, so that a step in inference mode leaves tensors that a training step can save.

        Problems that failed start from 0: NaN would stay for ever, and data that is not read
        (compiled, on CUDA) raises nothing.
        """
        self.potentials = []
        with torch.inference_mode(False):
            for f, g in zip(solved.f, solved.g, strict=True):
                finite = (f.isfinite().all(-1) & g.isfinite().all(-1)).unsqueeze(-1)
                self.potentials += [torch.where(finite, v.detach(), 0.0) for v in (f, g)]


def combine(
    clouds: dict[str, Tensor],
    weights: dict[str, Tensor | None],
    combination: Combination,
    options: Options,
    memory: Memory | None = None,
    target: Target | None = None,
) -> Tensor:
    """The sum over pairs of coefficient * OT(pair): the common form of all losses here.

    ``target``: of a divergence, keeps the self problem of y from call to call.
    """
    if _check.transformed():
        return inside(
            lambda clouds, weights, o: (combine(clouds, weights, combination, o, memory),),
            clouds, weights, options, combination.pairs,
        )[0]  # fmt: skip
    kind = kind_of_call(clouds, weights, combination, options) if memory is None else None
    pairs, known = combination.pairs, known_call(kind)
    if known:
        problem, costs = known.problem(clouds), None
        options, dense = known.settings.options, known.settings.dense
    else:
        problem = check_clouds(clouds, weights, balanced=options.balanced())
        check_shape(options.eps, problem)
        problem, costs, options, dense = prepare(problem, pairs, options)
    of_target = None
    if target is not None and _stays(clouds["y"], weights, options):
        of_target = target.self_problem(
            clouds["y"], (weights["a"], weights["b"]),
            options, dense, problem.weights[0].dtype, len(problem.weights[0]),
            torch.get_num_threads(),
        )  # fmt: skip
    if known:
        sizes = [0, len(problem.points), len(problem.weights), 0]
        solved = evaluated(
            known.settings._replace(target=of_target) if of_target else known.settings,
            sizes, problem.points + problem.weights,
        )  # fmt: skip
        report(problem, (), options, solved)
        return solved.loss
    _, solved = solve_pairs(
        problem, costs, combination, options, memory.start(problem, pairs) if memory else [],
        potentials=memory is not None, dense=dense, target=of_target,
    )  # fmt: skip
    if memory is not None:
        memory.keep(solved)
    if kind is not None and solved.settings:
        keep(kind, problem, solved.settings)
    return solved.loss


def prepare(
    problem: Problem, pairs: list[int], options: Options
) -> tuple[Problem, tuple[Tensor, ...] | None, Options, bool]:
    """The problem of clouds with what is seen of its empty bins, the matrices of a cost function
    where they are stored, the options with the method, and whether that stores matrices."""
    options, dense = choose(problem.points, problem.weights, pairs, options)
    named, costs = isinstance(options.cost, str), None
    if not (named or dense):
        return ready_for_blocks(problem), None, options, dense
    if not named:
        costs = build_costs(problem, pairs, options.cost, options.method)
    return see_empty_bins(problem, pairs, options.cost, options.method), costs, options, dense


def solve_pairs(
    problem: Problem,
    costs: Sequence[Tensor] | None,
    combination: Combination,
    options: Options,
    init: Sequence[Tensor],
    *,
    potentials: bool,
    dense: bool,
    system: list[Tensor] | None = None,
    target: SelfProblem | None = None,
    share: Tensor | None = None,
) -> tuple[Sequence[Tensor] | None, Solved]:
    """The costs, finite ones in place of those of forbidden pairs, and the solution, which is
    reported on; keyword arguments as in ``run``. Solved at unit totals, see ``otloss/totals.py``.
    ``share`` (B,): of the mass, that errors are over.
    """
    pairs, coefficients, _ = combination
    _check_penalties(options, problem.weights[0].dtype)
    unit, totals = at_unit_totals(problem, options)
    if totals:
        init = totals.start(init, pairs)
    stopping = options
    if share is not None and _check.readable(share):
        stopping = options._replace(tol=options.tol * float(share.min()))

    def solve_given(given: Sequence[Tensor] | None, wanted: bool) -> Solved:
        wanted, combined = wanted or potentials, totals is None
        if given is None or _self_problems_are_symmetric(given, pairs, options):
            solved = run(
                unit, given, pairs, coefficients, stopping, init, potentials=wanted, dense=dense,
                combined=combined, system=system, target=target,
            )  # fmt: skip
        else:
            solved = _solve_apart(
                unit, given, combination, stopping, init, potentials=wanted, combined=combined
            )
        return at_given_totals(solved, problem, totals, combination, options)

    if costs is None:
        solved = solve_given(None, False)
    else:
        costs, solved = solve_allowed(problem, pairs, costs, options, solve_given)
    if share is not None:
        over = torch.ones_like(solved.status)
        over[..., ops.ERROR] = share.to(over)
        solved.status = solved.status / over
    report(problem, costs or (), options, solved)
    return costs, solved


def _check_penalties(options: Options, dtype: torch.dtype) -> None:
    """Raises where the kernels, which flush subnormal numbers, would take a penalty for none."""
    if options.balanced():
        return
    rho, least = min(options.rho_x, options.rho_y), torch.finfo(dtype).tiny
    if rho < least:
        raise ValueError(f"unbalanced must be at least {least:.3g} in {dtype}, got {rho!r}")


def _stays(y: Tensor, weights: dict[str, Tensor | None], options: Options) -> bool:
    """Whether the self problem of y may serve later calls: nothing is differentiated in it, changes
    of its tensors are counted, and the kernels take its solution from an earlier call."""
    if not (ops.NATIVE and y.is_cpu and ops.makes_plain_tensors()):
        return False
    if isinstance(options.eps, Tensor):
        return False
    tensors, b = [t for t in (y, *weights.values()) if t is not None], weights["b"]
    held = not (y.requires_grad or (b is not None and b.requires_grad))
    served = (
        isinstance(options.cost, str)
        and options.method != "reference"
        and options.objective == "regularized"
        and options.n_iters < 0
    )
    return held and served and not any(t.is_inference() for t in tensors)


def _self_problems_are_symmetric(
    costs: Sequence[Tensor], pairs: list[int], options: Options
) -> bool:
    """Whether one potential solves the problems of a cloud against itself.

    Where data is not read, a cost function is taken at the caller's word only.
    """
    own = [C for C, (i, j) in zip(costs, as_pairs(pairs), strict=True) if i == j]
    if options.symmetric is not None or not own:
        return options.symmetric is not False
    return all(_check.readable(C) and is_symmetric([(slice(None), C.detach())]) for C in own)


def _solve_apart(
    problem: Problem,
    costs: Sequence[Tensor],
    combination: Combination,
    options: Options,
    init: Sequence[Tensor],
    *,
    potentials: bool,
    combined: bool,
) -> Solved:
    """Every pair on its own, a cloud against itself as two clouds: for costs c(x, y) != c(y, x)."""
    parts = []
    for p, (i, j) in enumerate(as_pairs(combination.pairs)):
        # The second is a view, since a traced autograd.Function takes no tensor twice.
        a, b = problem.weights[i], problem.weights[j]
        of_pair, weights, present = options, [a, b.view_as(b)], problem.present
        if i == j:
            # Cloud 0 of a solve is held by rho_x, every other by rho_y: the pair are clouds 1, 2.
            weights = [problem.weights[1 - i].detach(), *weights]
            present = tuple(present[c] for c in (1 - i, i, i) if present)
            if i == 0:
                of_pair = options._replace(rho_x=options.rho_y, rho_y=options.rho_x)
        parts.append(
            run(
                replace(
                    problem, weights=tuple(weights), present=present, seen=problem.seen[p : p + 1]
                ),
                [costs[p]],
                [1, 2] if i == j else [0, 1],
                [combination.coefficients[p]],
                of_pair,
                init[2 * p : 2 * p + 2],
                potentials=potentials,
                combined=combined,
            )
        )
    losses = [part.loss for part in parts]
    return Solved(
        torch.stack(losses).sum(0) if combined else torch.cat(losses),
        torch.cat([part.status for part in parts]),
        tuple(f for part in parts for f in part.f),
        tuple(g for part in parts for g in part.g),
        parts[0].settings,
    )
