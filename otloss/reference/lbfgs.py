"""L-BFGS in a weighted inner product, and the length of its steps."""

from __future__ import annotations

import math

from torch import Tensor

# A first step is at most MAX_GROWTH times as long as the one before. One that changes the residual
# by less than FLAT of it, or FLAT_BUT_FOR_ROUNDING where the change may be only rounding, is
# followed by one STRETCH times as long.
MAX_GROWTH, FLAT, FLAT_BUT_FOR_ROUNDING, STRETCH = 10.0, 1e-2, 0.3, 2.0
# L-BFGS: pairs kept, the least cosine of the angle between step and change of the residual.
MEMORY, LEAST_CURVATURE = 8, 1e-10


class StepLength:
    """How far the first try along a direction goes; all lengths are squared.

    Where clusters are many eps apart the semidual is nearly a plane until they exchange mass, and
    tells nothing of how far to go.
    """

    def __init__(self) -> None:
        self.stretch, self.longest = 1.0, math.inf

    def first(self, direction: float) -> float:
        """The factor of a direction."""
        most = math.sqrt(self.longest / direction) if direction > 0 else math.inf
        return min(most, self.stretch)

    def accepted(self, step: float, change: float, residual: float, least: float) -> None:
        """``least``: what ``least_change`` says of ``change``."""
        flat = FLAT if change > least else FLAT_BUT_FOR_ROUNDING
        self.stretch = STRETCH * self.stretch if change < flat**2 * residual else 1.0
        self.longest = MAX_GROWTH**2 * step

    def plain(self, residual: float) -> None:
        self.stretch, self.longest = 1.0, MAX_GROWTH**2 * residual


class InnerProduct:
    """sum_j w_j u_j v_j, in float64."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.double()

    def __call__(self, u: Tensor, v: Tensor) -> float:
        return float((self.weight * u.double() * v.double()).sum())

    def curved(self, step: Tensor, change: Tensor) -> bool:
        size = math.sqrt(self(step, step)) * math.sqrt(self(change, change))
        return self(step, change) > LEAST_CURVATURE * size


def two_loop_recursion(
    r: Tensor, memory: list[tuple[Tensor, Tensor]], inner: InnerProduct
) -> Tensor:
    """The residual times the inverse Hessian that the memory implies (Nocedal 1980)."""
    p, steps = r, list[float]()
    for s, y in reversed(memory):
        steps.append(inner(s, p) / inner(s, y))
        p = p - steps[-1] * y
    if memory:
        s, y = memory[-1]
        p = inner(s, y) / inner(y, y) * p
    for s, y in memory:
        p = p + (steps.pop() - inner(y, p) / inner(s, y)) * s
    return p
