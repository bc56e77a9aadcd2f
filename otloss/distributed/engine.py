"""One problem whose rows are spread over processes, as the solver of ``otloss/reference`` reads it.

A rank passes over the rows of its own points with the kernels of every other solve, which gives
their potentials f and, for each column, its rows' contribution to the update of g. Both are
exchanged, n numbers and m per rank in an iteration, and contributions are joined by a log-sum-exp.
So all ranks know the same f and g, and the solver, which each of them runs, decides alike on all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from otloss._options import OBJECTIVES, Options
from otloss.distributed.ranks import Shard
from otloss.reference.engine import Clouds, sample, spread
from otloss.reference.marginals import (
    Marginals,
    SoftMean,
    counted,
    damping,
    mean_and_magnitude,
    plan,
    value,
)
from otloss.row_sweep import RowSweep

__all__ = ["ShardedEngine"]


class ShardedEngine(RowSweep):
    """Sweeps over this rank's rows of one problem, joined with those of the others."""

    def __init__(
        self,
        shard: Shard,
        C: Tensor,
        a: Tensor,
        b: Tensor,
        marginals: Marginals,
        clouds: Clouds | None,
    ) -> None:
        super().__init__(a, b, marginals)
        self.rows, self.C, self.clouds = shard, C, clouds
        self.own_a = shard.own(a).contiguous()

    def own_softmins(self, eps: float, g: Tensor) -> tuple[Tensor, Tensor]:
        return self.softmins(self.C, self.own_a, eps, g)

    def iterate(self, eps: float, g: Tensor) -> tuple[Tensor, SoftMean, Tensor]:
        n, ranks = len(self.a), self.rows.ranks

        def fill(whole: Tensor) -> None:
            f, part = self.own_softmins(eps, g)
            self.rows.own(whole[:n]).copy_(f)
            whole[n:].view(ranks.count, -1)[ranks.rank] = part

        whole = ranks.sum(g.new_zeros(n + ranks.count * len(g)), fill)
        f, parts = damping(self.marginals.x, eps) * whole[:n], whole[n:].view(ranks.count, -1)
        t = -eps * torch.logsumexp(-parts.double() / eps, dim=0)
        mean = mean_and_magnitude(f, self.a, self.marginals.x)
        return f, mean, torch.where(self.b > 0, t, 0.0).to(g)

    def update_rows(self, eps: float, g: Tensor) -> Tensor:
        def fill(whole: Tensor) -> None:
            self.rows.own(whole).copy_(self.own_softmins(eps, g)[0])

        return self.rows.ranks.sum(torch.zeros_like(self.a), fill)

    def over_rows(self, zero: Tensor, function: Callable[[slice, Tensor], Tensor]) -> Tensor:
        ranks, rows = self.rows.ranks, slice(self.rows.first, self.rows.first + self.rows.size)

        def fill(parts: Tensor) -> None:
            parts[ranks.rank] = function(rows, counted(self.C, self.own_a, self.b))

        return ranks.sum(zero.new_zeros(ranks.count, *zero.shape), fill)

    def each_row(self, zero: Tensor, function: Callable[[slice, Tensor], Tensor]) -> Tensor:
        rows = slice(self.rows.first, self.rows.first + self.rows.size)

        def fill(whole: Tensor) -> None:
            whole[rows] = function(rows, counted(self.C, self.own_a, self.b))

        return self.rows.ranks.sum(zero.new_zeros(len(self.a), *zero.shape), fill)

    def sigma(self) -> float:
        rows, columns = sample(self.a), sample(self.b)

        def fill(C: Tensor) -> None:
            own = rows - self.rows.first
            here = (own >= 0) & (own < self.rows.size)
            C[here] = self.C[own[here]][:, columns]

        return spread(self.rows.ranks.sum(self.C.new_zeros(len(rows), len(columns)), fill))

    def propose(self, sweeps: float, eps: float) -> Tensor | None:
        """To the last digit as on the first rank."""

        def fill(proposal: Tensor) -> None:
            g = self.clouds.propose(sweeps, eps) if self.clouds else None
            if g is not None and self.rows.ranks.rank == 0:
                proposal[0], proposal[1:] = 1, g

        made, g = self.rows.ranks.sum(self.b.new_zeros(1 + len(self.b)), fill).split(
            [1, len(self.b)]
        )
        return g if bool(made) else None

    def value(self, options: Options, f: Tensor, g: Tensor) -> Tensor:
        """The objective at f (n,) and g (m,), in float64."""
        eps = options.eps
        if options.objective == "regularized":
            f, g, a, b = (t.double() for t in (f, g, self.a, self.b))
            return value(
                eps, self.C, f, g, a, b, OBJECTIVES.index(options.objective), self.marginals
            )

        def fill(total: Tensor) -> None:
            P = plan(eps, self.C, self.rows.own(f), g, self.own_a, self.b)
            total.copy_((P * counted(self.C, self.own_a, self.b)).double().sum())

        return self.rows.ranks.sum(self.b.new_zeros((), dtype=torch.float64), fill)
