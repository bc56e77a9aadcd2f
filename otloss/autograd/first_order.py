"""First derivatives by the registered operations: builds no graph."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from otloss import _check, ops
from otloss._options import OBJECTIVES, Options
from otloss.costs import COSTS
from otloss.reference import operations
from otloss.reference.operations import Arguments, as_pairs

__all__ = [
    "Inputs",
    "Seeds",
    "Settings",
    "Wanted",
    "batched",
    "gradients",
    "implementation",
    "unbatched",
]


HALF: Final = (torch.float16, torch.bfloat16)


class Settings(NamedTuple):
    """What a solve is told besides tensors, as plain values that the tracer understands."""

    pairs: list[int]  # flat: [i0, j0, i1, j1, ...]
    coefficients: list[float]  # the loss is the sum of coefficient * value over the pairs
    options: Options
    backward: str  # the mode, decided where options leave it open
    potentials: bool  # whether f and g are outputs, differentiable
    trace: bool  # keep the potentials of every iteration, for backward="unrolled"
    dense: bool  # store cost matrices made from points
    combined: bool  # return the loss, not its terms
    batched: bool  # the loss is (B,), not ()
    eps: Tensor  # made once for both passes, like rho, from the options
    rho: Tensor | None
    system: list[Tensor] | None = None  # receives the status of the implicit gradient's system

    def arguments(self, inputs: Inputs) -> Arguments:
        """What the operations take of a set of problems."""
        o, (costs, points, weights, _) = self.options, inputs
        kind = COSTS[str(o.cost)] if points else 0
        modes = OBJECTIVES.index(o.objective), o.precision == "tf32"
        clouds = points, weights, self.pairs, kind
        return Arguments(costs, *clouds, self.coefficients, self.eps, self.rho, *modes)


class Inputs(NamedTuple):
    """Tensors that a solve starts from, as the operations take them."""

    costs: list[Tensor]  # (B, n, m) per pair, or none
    points: list[Tensor]  # (B, n, d) per cloud, or none
    weights: list[Tensor]  # (B, n) per cloud
    init: list[Tensor]  # f and g of each pair in turn, or none


class Seeds(NamedTuple):
    """Gradients of what a solve returned."""

    loss: Tensor  # (B,), or (P, B) where every pair has its own
    f: list[Tensor]  # per pair, or none
    g: list[Tensor]


class Wanted(NamedTuple):
    costs: list[int]  # pairs
    points: list[int]  # clouds
    weights: list[bool]  # of each cloud


def implementation(method: str) -> ModuleType:
    """Where the operations are."""
    return operations if method == "reference" else ops


def batched(x: Tensor) -> Tensor:
    """(B, n, d), contiguous, in the dtype that is computed in."""
    if x.dim() == 2:
        x = x.unsqueeze(0)
    if x.dtype in HALF:
        x = x.float()
    return x.contiguous()


def unbatched(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x`` from that of ``batched(x)``."""
    grad = grad.view_as(x)
    return grad if grad.dtype == x.dtype else grad.to(x.dtype)


def is_envelope(s: Settings, seeds: Seeds) -> bool:
    """Whether the gradient is that at fixed potentials. The implicit one of the value itself is."""
    of_value = s.options.objective == "regularized" and not seeds.f
    return s.backward == "envelope" or (s.backward == "implicit" and of_value)


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
        *found, status = operation.implicit_backward(*seeds, *problem, f, g, *want)
        _report_system(s, status, inputs.weights[0].dtype)
    costs, points, grad_a, grad_b = found
    return costs, points, sum_over_pairs(s.pairs, grad_a, grad_b, wanted.weights)


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
