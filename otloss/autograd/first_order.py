"""First derivatives by the registered operations: builds no graph."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from otloss import _check, ops
from otloss.autograd.empty_bins import Both, fill
from otloss.autograd.settings import (
    Gradients,
    Inputs,
    Seeds,
    Settings,
    Wanted,
    batched,
    implementation,
    mode,
)
from otloss.reference.arguments import Arguments

__all__ = ["extend", "gradients", "of_clouds", "plan_gap", "plan_product", "report_system"]


def gradients(
    s: Settings,
    seeds: Seeds,
    inputs: Inputs,
    solution: Sequence[Tensor],
    wanted: Wanted,
    prepared: Tensor | None = None,
) -> Gradients:
    """``solution``: [*f, *g, *traces]; ``prepared``: what a solve made of the points, if kept."""
    P, where, problem = len(s.coefficients), implementation(s.options.method), s.arguments(inputs)
    f, g, traces = list(solution[:P]), list(solution[P : 2 * P]), list(solution[2 * P :])
    want, chosen = (wanted.costs, wanted.points, any(wanted.weights)), mode(s, seeds)
    if chosen == "envelope":
        found = where.envelope_backward(seeds.loss, *problem, f, g, *want, prepared)
    elif chosen == "implicit":
        *found, status = where.implicit_backward(*seeds, *problem, f, g, *want)
        report_system(s.system, status, inputs.weights[0].dtype)
    else:
        found = where.unrolled_backward(*seeds, *problem, inputs.init, traces, *want)
    costs, points, *of_sides = found
    of_weights = of_clouds(s, seeds, inputs.weights, (f, g), of_sides, wanted.weights)
    return Gradients(costs, points, of_weights)


def _pair(s: Settings, points: Sequence[Tensor], weights: Sequence[Tensor]) -> Arguments:
    """The one pair of a multiscale solve, as operations take it."""
    return s.arguments(
        Inputs([], [batched(x) for x in points], [w.contiguous() for w in weights], [])
    )


def plan_product(
    s: Settings,
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    potentials: tuple[Tensor, Tensor],
    v: Tensor,
    axis: int,
) -> Tensor:
    """P v, or with ``axis=0`` P^T v, (B, n, c) in float64, of the one pair of a multiscale
    solve."""
    f, g = (t.contiguous() for t in potentials)
    problem = _pair(s, points, weights)
    if axis == 0:
        problem, f, g = problem._replace(pairs=s.pairs[::-1]), g, f
    return ops.plan_product(*problem, [f], [g], [v.double().contiguous()])[0]


def plan_gap(
    s: Settings,
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    potentials: tuple[Tensor, Tensor],
    marginals: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column sums of the plan, (B, n) and (B, m), and (B, 2): KL of a plan of these
    marginals, and the mass that the sums lack at most; of a multiscale solve, in float64."""
    vectors = ([v.contiguous()] for v in (*potentials, *marginals))
    rows, columns, numbers = ops.plan_gap(*_pair(s, points, weights), *vectors)
    return rows[0], columns[0], numbers[0]


def extend(s: Settings, points: Sequence[Tensor], weights: Sequence[Tensor], g: Tensor) -> Tensor:
    """f, not damped, at the first of two clouds, (B, k), from g at the second; of a multiscale
    solve, in float64."""
    return ops.extend(*_pair(s, points, weights), [g.contiguous()])[0]


def of_clouds(
    s: Settings,
    seeds: Seeds,
    weights: Sequence[Tensor],
    potentials: Both,
    given: Both,
    wanted: list[bool],
) -> list[Tensor | None]:
    """The gradient of each cloud's weights from ``given``, those of each pair's two sides, with
    what empty bins get."""
    total: list[Tensor | None] = [None] * len(wanted)
    if not any(wanted):
        return total
    if s.places and not s.options.holds_plan():
        given = fill(s, s.places, seeds, weights, potentials, given, wanted)
    for side, clouds in zip(given, (s.pairs[::2], s.pairs[1::2]), strict=True):
        for c, grad in zip(clouds, side, strict=True):
            if wanted[c]:
                before = total[c]
                total[c] = grad if before is None else before + grad
    return total


def report_system(system: list[Tensor] | None, status: Tensor, dtype: torch.dtype) -> None:
    """Keeps the status; warns where conjugate gradients left a residual that shows."""
    if system is not None:
        system[:] = [status]
    if not _check.readable(status):
        return
    limit = 1e-6 if dtype == torch.float64 else 1e-4
    iterations, residual = status.reshape(-1, 2).amax(0).tolist()
    if not residual <= limit:
        warnings.warn(
            f"the linear system of the implicit gradient was left after {int(iterations)} "
            f"iterations at a relative residual of {residual:.1e}: eps is small for these costs. "
            'Raise eps, use float64, or differentiate the iterations: n_iters and "unrolled".',
            _check.ConvergenceWarning,
            stacklevel=2,
        )
