"""Small mass that has to go far, which the marginal error does not see (docs/solver-start.md).

``FarMassRule`` of csrc/core/step_control.h and the readings of csrc/cpu/solve/far_mass.h.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from otloss.reference.engine import Engine
from otloss.reference.group_shifts import Groups, best_shifts
from otloss.reference.marginals import counted, dual, plan, share
from otloss.reference.semidual import NO_MASS, Point, evaluate
from otloss.reference.stopping import StopRule

# A bound of the value's error is suspicious above SUSPICIOUS times the error or tolerance; the gap
# proves a value to PROOF times the tolerance; a shift gains much above MUCH times it.
SUSPICIOUS, PROOF, MUCH = 10, 20, 0.1
UNSEEN = 4  # machine epsilons of the total, which rounding of column sums may make of nothing
# Iterations stall that have not halved the error in PATIENCE sweeps.
PATIENCE, PROGRESS = 5, 0.5
SOON = 3  # sweeps after a shift that gained much
# log2 of the entries, over their row's or column's sum, that join groups, and by what it is
# multiplied where there are too many.
LEAST_ENTRY, FEWER, MOST_GROUPS = -10, 2, 64


class Found(NamedTuple):
    doubtful: bool = False  # whether small mass may have to go far
    readings: int = 0  # of all costs
    shifted: Point | None = None  # a point with groups shifted against each other


class FarMass:
    """Looks at every point of a stage."""

    def __init__(self, engine: Engine, eps: float, tol: float) -> None:
        self.engine, self.eps, self.tol = engine, eps, tol
        self._mark, self._marked = math.inf, 0  # the last error that was clearly less
        self._next, self._next_reached, self._wait = 2, 2, 3

    def look(self, point: Point, stop: StopRule, sweeps: int, left: int) -> Found:
        """After ``sweeps`` of the stage; ``left``: how many there may be."""
        if point.error <= PROGRESS * self._mark:
            self._mark, self._marked = point.error, sweeps
        stalled = sweeps - self._marked >= PATIENCE
        if not (stop.ends or stalled) or not self._suspicious(point):
            return Found()
        if sweeps < (self._next_reached if stop.reached else self._next) and not stop.stuck:
            return Found(doubtful=True)
        if stop.reached:
            self._next_reached, self._wait = sweeps + self._wait, 2 * self._wait
        else:
            self._next = 2 * sweeps
        readings = 0
        if stop.reached and left > 0:
            readings = 1
            if self._gap(point) <= PROOF * self.tol * self._scale(point):
                return Found(readings=readings)
        found = self._shift(point, stop, sweeps, left - readings)
        return found._replace(readings=readings + found.readings)

    def _sums(self, point: Point) -> tuple[Tensor, Tensor]:
        """The plan's column sums, wanted and found, in float64."""
        w = self.engine.b.double() * share(point.g.double(), self.engine.marginals.y)
        return w, w * point.ratio.double()

    def _suspicious(self, point: Point) -> bool:
        """What the plan lacks and has too much could go as far as any two points are apart, but for
        what rounding of the column sums makes of nothing."""
        w, c = self._sums(point)
        least, most = self.engine.cost_range
        unseen = UNSEEN * torch.finfo(point.g.dtype).eps * self.engine.mass[1]
        lacking = float((w - c).clamp(min=0).sum()) - unseen
        bound = max(0.0, lacking) * (most - least) - float((w - c) @ point.g.double())
        lesser = min(bound, self._own_gap(point))
        return lesser > SUSPICIOUS * max(point.error, self.tol) * self._scale(point)

    def _own_gap(self, point: Point) -> float:
        """Where the columns need not have a given sum the plan is feasible as it is."""
        rho = self.engine.marginals.y
        if math.isinf(rho):
            return math.inf
        w, d = self._sums(point)[0], point.ratio.double() - 1
        return rho * float((w * ((1 + d) * d.log1p() - d)).sum())

    def _scale(self, point: Point) -> float:
        """By what an error of the value is measured: its size or, where costs may be negative, the
        value counted from the least of them, if that is more."""
        (rho_x, rho_y, _), e = self.engine.marginals, self.engine
        if math.isinf(rho_x) and math.isinf(rho_y):
            return max(abs(point.value), point.value - e.mass[1] * e.cost_range[0])
        terms = (e.a.double() * dual(point.f.double(), rho_x)).sum()
        terms = terms + (e.b.double() * dual(point.g.double(), rho_y)).sum()
        return abs(float(terms - self.eps * (self._sums(point)[0].sum() - e.mass[0] * e.mass[1])))

    def _plan(self, point: Point, rows: slice, C: Tensor) -> Tensor:
        f, g, a, b = (t.double() for t in (point.f, point.g, self.engine.a, self.engine.b))
        return plan(self.eps, C.double(), f[rows], g, a[rows], b)

    def _gap(self, point: Point) -> float:
        """A bound of the duality gap of P with the columns scaled down that have too much, and a
        plan of rank 1 for what is lacking then, without logarithms of entries."""
        w, c = self._sums(point)
        a, b, f, g = (t.double() for t in (self.engine.a, self.engine.b, point.f, point.g))
        excess, v = torch.where(c > w, 1 - w / c, 0.0), (w - c).clamp(min=0)
        s, total = v.sum(), c.sum()
        if not s > 0:
            return 0.0

        def part(rows: slice, C: Tensor) -> Tensor:
            u, C = self._plan(point, rows, C) @ excess, counted(C, a[rows], b).double()
            return (u * (C @ v / s - f[rows])).sum() + self.eps * _relative_entropy(u, a[rows])

        kept = _relative_entropy(torch.minimum(w, c), c) - _relative_entropy(total - s, total)
        added = _relative_entropy(v, b) - s * s.log() - _relative_entropy(s, total)
        gap = self.engine.over_rows(a.new_zeros(()), part).sum() - v @ g
        return min(float(gap + self.eps * (kept + added)), self._own_gap(point))

    def _shift(self, point: Point, stop: StopRule, sweeps: int, left: int) -> Found:
        w, c = self._sums(point)
        group, readings = self._groups(point, c, left - 2)
        k = int(group.max()) + 1
        if k < 2 or left < readings + 2:
            return Found(True, readings)
        massive = group >= 0
        B, lacking = (w.new_zeros(k).index_add(0, group[massive], v[massive]) for v in (w, w - c))
        t = best_shifts(self._between(point, group, B, lacking))
        readings, much = readings + 1, self._much(point)
        # Where rounding hides all progress only a gain is one.
        is_shift = float(t.abs().max()) > self.eps / 2 and not stop.stuck
        if not (is_shift or float(lacking @ t) > much):
            return Found(True, readings)
        added = torch.where(massive, t[group], 0.0).to(point.g)
        shifted = evaluate(self.engine, self.eps, point.g + added)
        gain = shifted.value - point.value
        gains_much = gain * float(w.sum()) / self.engine.mass[1] > much
        if not (gains_much or (is_shift and gain > -point.noise)):
            return Found(True, readings + 1)
        self._next, self._mark = max(self._next, 2 * sweeps), math.inf
        if gains_much:
            self._next = self._next_reached = sweeps + SOON
        return Found(True, readings + 1, shifted)

    def _much(self, point: Point) -> float:
        return MUCH * self.tol * self._scale(point)

    def _log_plan(self, point: Point, rows: slice, C: Tensor) -> tuple[Tensor, Tensor]:
        """log P_ij, and of the row sums; -inf for rows without mass."""
        f, g, a, b = (t.double() for t in (point.f, point.g, self.engine.a, self.engine.b))
        r = a * share(f, self.engine.marginals.x)
        r = torch.where(r > NO_MASS * r.sum(), r, 0.0)[rows]
        L = (f[rows, None] + g - counted(C, a[rows], b).double()) / self.eps
        L = L + a[rows, None].log() + b.log()
        return torch.where(r[:, None] > 0, L, -math.inf), r.log()

    def _groups(self, point: Point, c: Tensor, most: int) -> tuple[Tensor, int]:
        """(m,) the connected component of each column, -1 without mass, by the entries that are
        large in their row or column; and the readings it took."""
        massive = c > NO_MASS * c.sum()
        log_c = torch.where(massive, c, math.inf).log()
        least, readings = float(LEAST_ENTRY), 0
        group = torch.full_like(c, -1, dtype=torch.long)
        while readings < most:
            limit = least * math.log(2)

            def part(rows: slice, C: Tensor, limit: float = limit) -> Tensor:
                L, log_r = self._log_plan(point, rows, C)
                of_row = (L - log_r[:, None] > limit) & (log_r[:, None] > -math.inf)
                return _components((of_row | (L - log_c > limit)) & massive)

            roots, readings = self.engine.over_rows(c.long(), part), readings + 1
            found, numbers = _joined(roots)[massive].unique(return_inverse=True)
            if len(found) <= MOST_GROUPS:
                group[massive] = numbers
                break
            least *= FEWER
        return group, readings

    def _between(self, point: Point, group: Tensor, B: Tensor, lacking: Tensor) -> Groups:
        """What rows send to groups of columns."""
        k = len(B)

        def part(rows: slice, C: Tensor) -> Tensor:
            L, log_r = self._log_plan(point, rows, C)
            to = [torch.logsumexp(L[:, group == K], 1) for K in range(k)]
            return torch.stack([log_r, *to], 1)

        log_r, to = self.engine.each_row(B.new_zeros(k + 1), part).split([1, k], 1)
        held = log_r[:, 0] > -math.inf
        rho_x, rho_y, _ = self.engine.marginals
        M, A = self.eps * (log_r - to)[held], log_r[held, 0].exp()
        return Groups(M, A, B, float(lacking.clamp(min=0).sum()), self.eps, rho_x, rho_y)


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q)."""
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum()


def _components(large: Tensor) -> Tensor:
    """(m,) the first column of the component of each, where rows join columns."""
    m = large.shape[1]
    first = torch.arange(m, device=large.device)
    while len(large):
        of_row = torch.where(large, first, m).amin(1, keepdim=True)
        lower = torch.minimum(first, torch.where(large, of_row, m).amin(0))
        if torch.equal(lower, first):
            break
        first = lower
    return first


def _joined(parts: Tensor) -> Tensor:
    """Of the components that each part of the rows makes."""
    first = torch.arange(parts.shape[1], device=parts.device)
    while True:
        before = first
        for roots in parts:
            first = torch.minimum(first, first.scatter_reduce(0, roots, first, "amin")[roots])
        if torch.equal(before, first):
            return first
