"""When iterations end: ``StopRule`` of csrc/core/step_control.h."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)

# The part of `rounding` that the error of a rounded plan is where a sweep measures less: a mean
# over points, and how it fluctuates.
MEAN, SPREAD = 0.3, 1.0
# Within NEAR times `rounding`, PATIENCE sweeps that do not bring the least error down to PROGRESS
# of what it was are the last.
NEAR, PATIENCE, PROGRESS = 10, 8, 0.8


def rounding(size: Number, eps: float, dtype: torch.dtype) -> Number:
    """The marginal error of a plan whose potentials, of mean sizes |f| + |g| = ``size``, are each
    off by their rounding."""
    return torch.finfo(dtype).eps * size / eps


def rounding_share(a: Tensor, b: Tensor) -> Tensor:
    """The part of ``rounding`` to be counted on, (...,): the more, the fewer points have the weight
    of a side."""
    squares = [(w.double() / w.sum(-1, True, dtype=torch.float64)).square().sum(-1) for w in (a, b)]
    return MEAN + SPREAD * torch.maximum(*squares).sqrt()


class StopRule:
    """Ends iterations within the tolerance, or where rounding hides all progress."""

    def __init__(self, tol: float, share: float) -> None:
        self.tol, self.share = tol, share
        self.restart()

    def restart(self) -> None:
        """A point follows that was reached by no iteration."""
        self._least = math.inf  # error of points that were kept
        self._mark, self._marked = math.inf, 0  # the last error that was clearly less; sweeps to it

    def see(self, error: float, rounding: float, sweeps: int) -> None:
        """A point, after this number of sweeps."""
        self.error = error + self.share * rounding
        self.reached = self.error <= self.tol
        near = error <= NEAR * rounding
        # Where rounding may be what ends the iterations the best point is kept, and returned if
        # none is within the tolerance.
        self.keep = near and error < self._least
        if self.keep:
            self._least = error
        self.returns_kept = not self.reached and self._least < error
        if self.returns_kept:
            self.error = self._least + self.share * rounding
        if error <= PROGRESS * self._mark:
            self._mark, self._marked = error, sweeps
        idle = sweeps - self._marked >= PATIENCE
        self.stuck = error <= self.share * rounding or (near and idle)
        self.ends = self.stuck or self.reached or math.isnan(error)
