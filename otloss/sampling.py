"""Pairs of points drawn from a transport plan, a block of its rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from otloss import _options
from otloss.method import in_blocks
from otloss.plan import Plan

__all__ = ["PlanPairs"]

LITTLE = 1 << 20  # entries

# From a slice of the rows of a plan (B, n, m), these rows.
PlanRows = Callable[[slice], Tensor]


class PlanPairs(Plan):
    """What a result says about single pairs."""

    def sample(
        self, n: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pairs (i, j) of points drawn from the plan, two tensors of indices.

        Args:
            n: the number of pairs, each (i, j) with probability P_ij over the plan's total, with
                replacement. None: one partner j for every i, so that each x occurs once; j is -1
                where P has a row of 0, as at points of weight 0.
            generator: of the draws; default torch's own.

        Returns:
            ``i`` and ``j``, (n,) or (B, n) of int64. After a streamed solve rows of the plan are
            computed in blocks and not stored.
        """
        count = None if n is None else _options.count("n", n)
        plan = self._readable_rows()
        with torch.no_grad():
            i, j = _sampled(plan, self._a, self._b, count, generator)
        return self._out(i), self._out(j)

    def argmax(self) -> Tensor:
        """The most probable partner j of each i, (n,) or (B, n) of int64; -1 where P has a row of
        0. Several i may have the same j."""
        plan = self._readable_rows()

        def largest(rows: slice) -> tuple[Tensor, ...]:
            value, j = plan(rows).max(-1)
            return (torch.where(value > 0, j, -1),)

        with torch.no_grad():
            parts = in_blocks(largest, self._a.shape[1], self._b)
        return self._out(torch.cat([part for (part,) in parts], -1))

    def _readable_rows(self) -> PlanRows:
        """What the result keeps of the plan, it keeps with its graph: reading needs none."""
        self._check_unchanged()
        if self._dense:
            P = self._plan
            return lambda rows: P[:, rows]
        _ = self._extended  # once, not in every block
        return lambda rows: self._made_rows(rows)[0]


def _sampled(
    plan: PlanRows, a: Tensor, b: Tensor, count: int | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """``count`` pairs (i, j) of each problem, (B, count); None: one for each i. a (B, n), b (B, m)
    are the weights."""
    shape = a.shape if count is None else (a.shape[0], count)
    where = a.device if generator is None else generator.device
    drawn = torch.rand((2, *shape), generator=generator, dtype=torch.float64, device=where)
    u, v = drawn.to(a.device)
    if count is None:
        i = torch.arange(a.shape[1], device=a.device).repeat(len(a), 1)
    else:
        sums = in_blocks(lambda rows: (plan(rows).sum(-1, dtype=torch.float64),), a.shape[1], b)
        i = _drawn(torch.cat([part for (part,) in sums], -1), u)
    j = torch.empty_like(i)

    def draw(rows: slice) -> tuple[Tensor, ...]:
        P = plan(rows)
        here = ((i >= rows.start) & (i < rows.stop)).nonzero()
        # as many rows of a draw each as take no more memory than P, or little
        for each in here.split(max(P.shape[0] * P.shape[1], 1 + LITTLE // P.shape[2])):
            problem, place = each.unbind(-1)
            of_pairs = P[problem, i[problem, place] - rows.start]
            j[problem, place] = _drawn(of_pairs, v[problem, place].unsqueeze(-1)).squeeze(-1)
        return ()

    in_blocks(draw, a.shape[1], b)
    return i, j


def _drawn(p: Tensor, u: Tensor) -> Tensor:
    """For each u (..., k), uniform in [0, 1), an index into p (..., m) of probability p / sum(p):
    never one where p is 0, and -1 where all are."""
    upto = p.cumsum(-1, dtype=torch.float64)
    total = upto[..., -1:]
    return torch.where(total > 0, torch.searchsorted(upto / total, u, right=True), -1)
