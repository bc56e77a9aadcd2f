"""The transport plan of a result: kept, or made from the points in blocks of rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from otloss import _check
from otloss._options import Options
from otloss.autograd import extend, extended, plan_gap, plan_product
from otloss.cost_matrices import build_costs, seen_costs, with_empty_bins
from otloss.duality_gap import Dual, gap_of
from otloss.eps import of_rows
from otloss.method import in_blocks
from otloss.problem import Problem, as_weights
from otloss.reference.marginals import of_entries, plan, weighted
from otloss.run import Solved

__all__ = ["Plan", "total_of"]


class Plan:
    """What a result knows of its plan, all with the dimension of the batch: cost (B, n, m), plan
    (B, n, m), their rows, products and sums."""

    def __init__(
        self,
        problem: Problem,
        cost: Tensor | None,
        options: Options,
        solved: Solved,
        *,
        dense: bool,
    ) -> None:
        self._problem, self._given_cost, self._options = problem, cost, options
        self._kept_cost = cost if cost is None else cost.expand(len(problem.weights[0]), -1, -1)
        self._kept_plan: Tensor | None = None
        self._settings = solved.settings
        self._kept_extended: list[Tensor] | None = None
        self._dense = dense
        self._f, self._g = solved.f[0], solved.g[0]
        self._versions = problem.versions(cost, options, self._f, self._g)
        self._a, self._b = problem.weights[0], problem.weights[1]
        self._eps = of_rows(options.eps, self._a)

    def _out(self, t: Tensor) -> Tensor:
        return t if self._problem.batched else t[0]

    def __getstate__(self) -> dict[str, Any]:
        unchanged = [(k, t, t._version == version) for k, t, version in self._versions]
        return self.__dict__ | {"_versions": unchanged}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies of tensors count their changes anew."""
        self.__dict__.update(state)
        self._versions = [(k, t, t._version if same else -1) for k, t, same in self._versions]

    def _check_unchanged(self) -> None:
        for name, tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"{name} was changed in place after the solve, so that nothing more can be "
                    "computed from this result: give the solve a copy, or read the result before"
                )

    # Not cached_property, whose lock torch.compile cannot trace. What is kept is kept with its
    # graph, also if it is first read where gradients are off, in no_grad or inference_mode (leaving
    # the latter turns them on): later readings may want one.

    @property
    def _cost(self) -> Tensor:
        """The cost matrix (B, n, m); from points it is made when first needed."""
        self._check_unchanged()
        if self._kept_cost is None:
            o = self._options
            with torch.inference_mode(False):
                self._kept_cost = build_costs(self._problem, [0, 1], o.cost, o.method)[0]
        return self._kept_cost

    @property
    def _plan(self) -> Tensor:
        if self._kept_plan is None:
            with torch.inference_mode(False):
                self._kept_plan, self._kept_cost = self._plan_rows(slice(None), self._cost)
        return self._kept_plan

    def _plan_rows(self, rows: slice, C: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the plan and of its cost."""
        f, g = self._extended or (self._f, self._g)
        return self._entries(rows, C, f[:, rows], g, self._a[:, rows])

    def _relative_rows(self, rows: slice, C: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the plan over their weights, or where these need not move as a whole, multiples
        of rows that are not out of range, however little moves; and of its cost."""
        (f, g), there = self._extended or (self._f, self._g), self._a[:, rows] > 0
        f = f[:, rows]
        if not self._moves_all():
            with torch.no_grad():
                z = (g.unsqueeze(-2) - C) / of_entries(self._eps) + self._b.log().unsqueeze(-2)
                z = torch.where(there.unsqueeze(-1) & (self._b > 0).unsqueeze(-2), z, -torch.inf)
                lift = f + self._eps * z.amax(-1)
            f = f - torch.where(lift.isfinite(), lift, 0.0)
        return self._entries(rows, C, f, g, there.to(f.dtype))

    def _moves_all(self) -> bool:
        """Whether x_i transports its weight, up to the marginal error."""
        return self._options.balanced()

    def _entries(
        self, rows: slice, C: Tensor, f: Tensor, g: Tensor, a: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The plan of f and a of some rows, and its cost."""
        eps, b = self._eps, self._b
        if self._extended is None:
            return plan(eps, C, f, g, a, b), C
        # At empty bins the plan is 0, but not its derivative in their weights.
        if self._given_cost is None:
            o, block = self._options, self._problem.of_rows(rows)
            (seen,) = seen_costs(block, [0, 1], o.cost, o.method)
        else:
            seen = self._problem.seen[0][:, rows]
        x, y = (a > 0).unsqueeze(-1), (b > 0).unsqueeze(-2)
        C = with_empty_bins(C, seen, a, b)
        exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - C) / of_entries(eps)
        exponent = torch.where((x & y) | ((x ^ y) & seen.isfinite()), exponent, -torch.inf)
        largest = math.log(torch.finfo(C.dtype).max)  # 0 times infinity is NaN
        return weighted(exponent.clamp(max=largest), a, b), C

    @property
    def _extended(self) -> list[Tensor] | None:
        """The potentials with those of empty bins, if their weights are differentiated."""
        settings = self._settings
        if settings is not None and settings.places is not None and self._kept_extended is None:
            weights = self._problem.weights
            with torch.inference_mode(False):
                self._kept_extended = extended(settings, settings.places, weights, self._f, self._g)
        return self._kept_extended

    def _over_rows(
        self, function: Callable[..., tuple[Tensor, ...]], relative: bool = False
    ) -> list[tuple[Tensor, ...]]:
        """``function(rows, P, C)``, once if matrices are stored; after a streamed solve once per
        block of rows, computed from the points and recomputed for the gradient. relative: see
        ``_relative_rows``."""
        self._check_unchanged()
        if relative and self._dense:
            return [function(slice(None), *self._relative_rows(slice(None), self._cost))]
        if not relative and (self._dense or self._kept_plan is not None):
            return [function(slice(None), self._plan, self._cost)]
        _ = self._extended  # once, not in every block
        made = self._relative_rows if relative else self._plan_rows

        def of_block(rows: slice) -> tuple[Tensor, ...]:
            return function(rows, *made(rows, self._cost_rows(self._problem, rows)))

        return in_blocks(of_block, self._a.shape[1], self._b, [t for _, t, _ in self._versions])

    def _made_rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Rows of the plan and of its cost, neither of which is stored."""
        return self._plan_rows(rows, self._cost_rows(self._problem, rows))

    def _cost_rows(self, problem: Problem, rows: slice) -> Tensor:
        o = self._options
        return build_costs(problem.of_rows(rows), [0, 1], o.cost, o.method)[0]

    def _prunes(self, *others: Tensor) -> bool:
        """Whether products with the plan are those of the multiscale engine, which have no
        gradient, and are made on a CPU."""
        if self._options.method != "multiscale" or self._kept_plan is not None or self._f.is_cuda:
            return False
        given = (*self._problem.points, self._f, self._g, self._a, self._b, *others)
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in given))

    def _product(self, v: Tensor, axis: int) -> Tensor:
        """P v or P^T v in float64 by the multiscale engine."""
        self._check_unchanged()
        problem, potentials = self._problem, (self._f, self._g)
        assert self._settings is not None  # of a solve of points
        return plan_product(self._settings, problem.points, problem.weights, potentials, v, axis)

    def _pruned_gap(self, dual: Dual, value: Tensor | None, points: tuple[Tensor, ...]) -> Tensor:
        """The duality gap by the multiscale engine."""
        assert self._settings is not None
        rows, columns, numbers = plan_gap(
            self._settings, points, (dual.a, dual.b), (dual.f, dual.g), dual.feasible()
        )
        KL, missing = numbers.unbind(-1)
        return gap_of(dual, value, KL, rows, columns, missing)

    def _finds(self, x_new: Tensor) -> bool:
        """Whether the multiscale engine can find new points: it has no place for others."""
        if not _check.readable(x_new):
            return False
        size = x_new.abs().amax(-1)
        least = 0.0 if self._options.cost == "cosine" else -1.0
        return bool((size.isfinite() & (size > least)).all())

    def _extended_to(self, x_new: Tensor) -> Tensor:
        """f, not damped, at new points by the multiscale engine, (B, k) in float64."""
        assert self._settings is not None
        new, y = (x.detach().double() for x in (x_new, self._problem.points[1]))
        weights = as_weights(None, new, new.shape[-2], new.dtype), self._b.detach().double()
        return extend(self._settings, (new, y), weights, self._g.detach().double())

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Row and column sums of the plan, (B, n) and (B, m)."""
        if self._prunes():
            ones = (torch.ones_like(w).unsqueeze(-1) for w in (self._b, self._a))
            rows, columns = (self._product(v, axis) for v, axis in zip(ones, (1, 0), strict=True))
            return rows.squeeze(-1).to(self._a.dtype), columns.squeeze(-1).to(self._a.dtype)
        parts = self._over_rows(lambda _, P, __: (P.sum(-1), P.sum(-2)))
        return torch.cat([rows for rows, _ in parts], -1), total_of(columns for _, columns in parts)


def total_of(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)
