"""First derivatives by the registered operations: builds no graph."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from otloss import _check, ops
from otloss.autograd import empty_bins
from otloss.autograd.settings import (
    Inputs,
    Seeds,
    Settings,
    Wanted,
    batched,
    implementation,
    is_envelope,
)
from otloss.reference.operations import as_pairs

__all__ = ["gradients", "plan_product", "sum_over_pairs"]


def gradients(
    s: Settings, seeds: Seeds, inputs: Inputs, solution: Sequence[Tensor], wanted: Wanted
) -> tuple[Sequence[Tensor], Sequence[Tensor], list[Tensor | None]]:
    """Of the wanted costs, of the wanted clouds, and of every cloud's weights where wanted.

    ``solution``: [*f, *g, *traces].
    """
    P, operation = len(s.coefficients), implementation(s.options.method)
    f, g, traces = list(solution[:P]), list(solution[P : 2 * P]), list(solution[2 * P :])
    problem, want = s.arguments(inputs), (wanted.costs, wanted.points, any(wanted.weights))
    if s.backward == "unrolled":
        found = operation.unrolled_backward(*seeds, *problem, inputs.init, traces, *want)
    elif is_envelope(s, seeds):
        found = operation.envelope_backward(seeds.loss, *problem, f, g, *want)
    else:
        every_pair = problem._replace(multiscale=False)
        *found, status = operation.implicit_backward(*seeds, *every_pair, f, g, *want)
        _report_system(s, status, inputs.weights[0].dtype)
    costs, points, *of_sides = found
    if any(wanted.weights):
        of_sides = empty_bins.fill(s, seeds, inputs, (f, g), of_sides, wanted.weights)
    grad_a, grad_b = of_sides
    return costs, points, sum_over_pairs(s.pairs, grad_a, grad_b, wanted.weights)


def plan_product(
    s: Settings,
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    potentials: tuple[Tensor, Tensor],
    v: Tensor,
    axis: int,
) -> Tensor:
    """P v, or with ``axis=0`` P^T v, (B, n, c), of the one pair of a multiscale solve."""
    f, g = (t.contiguous() for t in potentials)
    inputs = Inputs([], [batched(x) for x in points], [w.contiguous() for w in weights], [])
    problem = s.arguments(inputs)
    if axis == 0:
        problem, f, g = problem._replace(pairs=s.pairs[::-1]), g, f
    return ops.plan_product(*problem, [f], [g], [v.contiguous()])[0]


def sum_over_pairs(
    pairs: list[int], grad_a: list[Tensor], grad_b: list[Tensor], wanted: list[bool]
) -> list[Tensor | None]:
    """The gradient of each cloud's weights from those of each pair's two sides."""
    total: list[Tensor | None] = [None] * len(wanted)
    if not any(wanted):
        return total
    for (i, j), of_a, of_b in zip(as_pairs(pairs), grad_a, grad_b, strict=True):
        for c, grad in ((i, of_a), (j, of_b)):
            if wanted[c]:
                before = total[c]
                total[c] = grad if before is None else before + grad
    return total


def _report_system(s: Settings, status: Tensor, dtype: torch.dtype) -> None:
    """Keeps the status; warns where conjugate gradients left a residual that shows."""
    if s.system is not None:
        s.system[:] = [status]
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
