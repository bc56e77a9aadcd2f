"""What the solver reads costs through: a protocol, and its form for a stored matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from otloss.costs import NamedCost, full_precision
from otloss.reference.marginals import (
    Marginals,
    SoftMean,
    counted,
    damping,
    mean_and_magnitude,
    softmin,
    total,
)

SIGMA_SAMPLE = 256  # points of each side
# Where the Gaussian potential is made, and the time it takes: d^3 and (n + m) d^2 times as much as
# one cost of a sweep.
MAX_GAUSSIAN_DIMS, EIGEN_WORK, MOMENT_WORK = 64, 400, 5


class Engine(Protocol):
    """Sweeps over the costs of one problem."""

    a: Tensor  # (n,) weights
    b: Tensor  # (m,) weights, of the total of x where the problem is balanced
    marginals: Marginals

    @property
    def mass(self) -> tuple[float, float]:
        """The totals of x and y."""

    def iterate(self, eps: float, g: Tensor) -> tuple[Tensor, SoftMean, Tensor]:
        """One sweep: f = damping T_x(g), its mean, and T_y(f)."""

    def update_rows(self, eps: float, g: Tensor) -> Tensor:
        """T_x(g)."""

    def over_rows(self, zero: Tensor, function: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """``function(rows, C[rows])``, like ``zero``, of every part of the rows, stacked."""

    def each_row(self, zero: Tensor, function: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """``function(rows, C[rows])``, an entry like ``zero`` for each row, of all rows."""

    @property
    def cost_range(self) -> tuple[float, float]:
        """An interval with all costs, and 0."""

    def sigma(self) -> float:
        """Standard deviation of C_ij - mean_i - mean_j + mean on a sample."""

    def propose(self, sweeps: float, eps: float) -> Tensor | None:
        """Potentials g (m,) to start from, if they take less time than ``sweeps`` sweeps."""


class Clouds(NamedTuple):
    """The points behind the costs of one problem: where a start in closed form comes from."""

    cost: NamedCost
    x: Tensor  # (n, d)
    y: Tensor  # (m, d)
    a: Tensor  # (n,)
    b: Tensor  # (m,)

    @property
    def equal(self) -> bool:
        return torch.equal(self.x, self.y) and torch.equal(self.a, self.b)

    def item(self, index: int) -> Clouds:
        """One problem of a batch."""
        return Clouds(self.cost, *(t[index] for t in self[1:]))

    def propose(self, sweeps: float, eps: float) -> Tensor | None:
        (n, d), m = self.x.shape, len(self.y)
        work = EIGEN_WORK * d**3 + MOMENT_WORK * (n + m) * d**2
        if d > MAX_GAUSSIAN_DIMS or work > sweeps * n * m:
            return None
        return self.cost.gaussian_potential(self.x, self.y, self.a, self.b, eps)


class DenseEngine:
    """A stored cost matrix. ``iterate`` and ``update_rows`` take batches too, differentiably."""

    def __init__(
        self, C: Tensor, a: Tensor, b: Tensor, marginals: Marginals, clouds: Clouds | None = None
    ) -> None:
        self.C, self.a, self.b = counted(C, a, b), a, b
        self.marginals, self.clouds = marginals, clouds

    @functools.cached_property
    def mass(self) -> tuple[float, float]:
        return float(total(self.a)), float(total(self.b))

    def iterate(self, eps: float, g: Tensor) -> tuple[Tensor, SoftMean, Tensor]:
        f = damping(self.marginals.x, eps) * self.update_rows(eps, g)
        t = torch.where(self.b > 0, softmin(eps, self.C.mT, f, self.a), 0.0)
        return f, mean_and_magnitude(f.detach(), self.a, self.marginals.x), t

    def update_rows(self, eps: float, g: Tensor) -> Tensor:
        return torch.where(self.a > 0, softmin(eps, self.C, g, self.b), 0.0)

    def over_rows(self, zero: Tensor, function: Callable[[slice, Tensor], Tensor]) -> Tensor:
        return function(slice(None), self.C)[None]

    def each_row(self, zero: Tensor, function: Callable[[slice, Tensor], Tensor]) -> Tensor:
        return function(slice(None), self.C)

    @functools.cached_property
    def cost_range(self) -> tuple[float, float]:
        return range_of(self)

    def sigma(self) -> float:
        return spread(self.C[sample(self.a)][:, sample(self.b)])

    def propose(self, sweeps: float, eps: float) -> Tensor | None:
        return self.clouds.propose(sweeps, eps) if self.clouds else None


def range_of(engine: Engine) -> tuple[float, float]:
    """An interval with all costs of points of positive weight, and 0."""

    def part(_: slice, C: Tensor) -> Tensor:
        ends = torch.cat([C.flatten(), C.new_zeros(1)])
        return torch.stack([ends.amin(), ends.amax()])

    parts = engine.over_rows(engine.b.new_zeros(2), part)
    return float(parts[:, 0].amin()), float(parts[:, 1].amax())


def sample(weights: Tensor) -> Tensor:
    """Numbers of some points of positive weight, evenly spread."""
    count = min(len(weights), SIGMA_SAMPLE)
    chosen = torch.arange(count, device=weights.device) * len(weights) // count
    return chosen[weights[chosen] > 0]


def spread(C: Tensor) -> float:
    """The standard deviation of C_ij - mean_i - mean_j + mean; 0 of a single row or column."""
    if min(C.shape) < 2:
        return 0.0
    C = C.double()
    C = C - C.mean(0, keepdim=True) - C.mean(1, keepdim=True) + C.mean()
    return float(C.square().mean().sqrt())


def is_symmetric(blocks: Iterable[tuple[slice, Tensor]]) -> bool:
    """Whether costs (..., n, n), given as blocks of rows, are symmetric to rounding, or not finite:
    C v = C^T v for one v, which costs two readings.

    The difference of C and C^T maps almost no v to 0. This one has no period and both signs, so
    that the sums and their rounding stay small in whatever order they are added.
    """
    apart = squares = torch.zeros(())
    for rows, C in blocks:
        n = C.shape[-1]
        v = torch.arange(1, n + 1, dtype=C.dtype, device=C.device).sin()
        with full_precision(C):
            own, others = (C @ v).double(), (C.mT @ v[rows]).double()
        apart = apart - others
        apart[..., rows] += own
        squares = squares + torch.linalg.vector_norm(C, dim=(-2, -1)).double().square()
    limit = 64 * torch.finfo(C.dtype).eps * (squares / n).sqrt()
    return not bool((apart.abs().amax(-1) > limit).any())
