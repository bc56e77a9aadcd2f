"""Partial transport: of a fixed mass, by one dummy point more on either side.

The dummy points are at cost 0 from all others and take what stays where it is: the one of y the
|a| - mass that x keeps, the one of x the |b| - mass that y keeps (Chapel, Alaya, Gasso 2020). The
problem is then a balanced one, and its solver, gradients and certificate are those of any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from otloss import _check, ops
from otloss._options import Options, number
from otloss.autograd import extended
from otloss.cost_matrices import (
    build_costs,
    cost_matrix,
    hide_padding,
    ready_for_blocks,
    see_empty_bins,
    seen_costs,
)
from otloss.costs import Cost
from otloss.eps import detached, of_rows
from otloss.method import choose, in_blocks, streams_function
from otloss.problem import Problem, all_positive
from otloss.reference.marginals import ROUNDING, Eps, bordered, forbidding
from otloss.result import OTResult
from otloss.run import Solved

_describe = _check.describe

__all__ = [
    "Mass",
    "PartialResult",
    "check_options_of",
    "with_dummies",
]

Mass = float | Tensor | None
PAIRS = [0, 1]


def check_options_of(mass: Mass, options: Options) -> None:
    """Raises for what does not go with a fixed mass."""
    if mass is None:
        return
    if not options.balanced():
        raise ValueError(
            "mass= and unbalanced= are two ways to leave mass where it is: give one of them, got "
            f"mass={_describe(mass)} and unbalanced= of ({options.rho_x}, {options.rho_y})"
        )
    if options.method == "multiscale":
        raise NotImplementedError('mass= is not available with method="multiscale": use "auto"')


# A problem, its costs, options, and whether costs are stored.
Solvable = tuple[Problem, tuple[Tensor, ...] | None, Options, bool]


class Whole(NamedTuple):
    """The balanced problem with the dummies, as it is solved."""

    problem: Problem
    costs: tuple[Tensor, ...] | None
    options: Options
    dense: bool
    share: Tensor  # (B,) of the mass, that moves


def with_dummies(
    real: Problem,
    mass: float | Tensor,
    C: Tensor | None,
    options: Options,
    start: tuple[Tensor, ...],
) -> tuple[Whole, tuple[Tensor, ...]]:
    """``C`` (B, n, m) or (1, n, m), or None: the problem has points. ``start``: f and g, or
    nothing."""
    if start:  # the optimal potentials of the dummies at the others, for a cost of 0
        eps = of_rows(detached(options).eps, start[0])
        of_x, of_y = (
            -eps * torch.logsumexp(w.detach().log() + v / eps, -1, keepdim=True)
            for v, w in zip(start[::-1], real.weights[::-1], strict=True)
        )
        start = torch.cat([start[0], of_x], -1), torch.cat([start[1], of_y], -1)
    weights = _weights(real, mass)
    share = _moved_mass(weights) / weights[0].detach().sum(-1)
    share = share.clamp(min=torch.finfo(weights[0].dtype).eps)
    whole = replace(real, weights=weights, padded=True)
    return Whole(*_whole(real, whole, mass, C, options), share), start


def _weights(real: Problem, mass: float | Tensor) -> tuple[Tensor, ...]:
    """With those of the dummies, in which only what ``real`` has for padding does not count."""
    kept_x, kept_y = _kept(real, mass)
    sides = zip(real.weights, (kept_y, kept_x), strict=True)
    return tuple(torch.cat([w, kept], -1) for w, kept in sides)


def _moved_mass(weights: Sequence[Tensor]) -> Tensor:
    """(B,), from weights with those of the dummies."""
    a, b = (w.detach().double() for w in weights)
    return a[:, :-1].sum(-1) - b[:, -1]


def _whole(
    real: Problem, whole: Problem, mass: float | Tensor, C: Tensor | None, options: Options
) -> Solvable:
    """How ``whole``, ``real`` with the weights of the dummies, is solved.

    The kernels of a CPU take matrices and points as they are. Elsewhere, and where a pair is
    forbidden or a weight of 0 may want a gradient, a copy of the matrix gets a row and a column
    more, and where costs are not stored they are those of a function.
    """
    weights, dense = whole.weights, True
    if C is None:
        options, dense = choose(real.points, weights, PAIRS, options)
    cost = options.cost if dense else "sqeuclidean"  # whose matrix is not looked at
    seen = see_empty_bins(real, PAIRS, cost, options.method, C)
    if seen.present:  # what comes to an empty bin may stay, too
        weights = _weights(seen, mass)
        whole = replace(whole, weights=weights)
    has_empty_bins = bool(seen.present) or _may_come_to([w[:, -1:] for w in weights])
    kernels = ops.NATIVE and weights[0].is_cpu and options.method != "reference"
    kernels = kernels and not has_empty_bins
    if not dense and kernels and isinstance(options.cost, str):
        return whole, None, options, False
    if not dense and streams_function(weights, PAIRS, options):
        return _by_rows(whole, options)
    if C is None:
        (counted,) = build_costs(real, PAIRS, options.cost, options.method)
    else:
        counted = hide_padding(real, C, *real.weights)
    if kernels and _check.readable(counted) and counted.detach().amax() != math.inf:
        return whole, (counted,), options, True
    eps = of_rows(detached(options).eps, weights[0])
    if has_empty_bins:
        costs = _seen(seen, options) if C is None else C.detach()
        how = options.cost, options.method
        whole = see_empty_bins(whole, PAIRS, *how, _for_each(costs, weights, eps))
    return whole, (_for_each(counted, weights, eps),), options, True


def _may_come_to(kept: Sequence[Tensor]) -> bool:
    """Whether a dummy's weight is 0 and may want a gradient."""
    return torch.is_grad_enabled() and any(k.requires_grad and not all_positive(k) for k in kept)


def _for_each(C: Tensor, weights: tuple[Tensor, ...], eps: Eps) -> Tensor:
    """The matrix of each problem, with dummies."""
    return bordered(C.expand(len(weights[0]), -1, -1), eps)


def _seen(seen: Problem, options: Options) -> Tensor:
    """The costs from points, with those of empty bins and NaN for padding."""
    present = seen.present or tuple(w > 0 for w in seen.weights)
    return seen_costs(replace(seen, present=present), PAIRS, options.cost, options.method)[0]


def _by_rows(whole: Problem, options: Options) -> Solvable:
    """With dummies among the points and a cost that knows them."""
    real = [w[:, :-1] for w in whole.weights]
    eps = of_rows(detached(options).eps, whole.weights[0])
    least = _least(replace(whole, weights=tuple(real)), options.cost)
    cost = WithDummies(options.cost, forbidding(eps, least, real[0].dtype))
    points = tuple(_with_dummy(x, w) for x, w in zip(whole.points, real, strict=True))
    marked = ready_for_blocks(replace(whole, points=points))
    return marked, None, options._replace(cost=cost), False


def _kept(problem: Problem, mass: float | Tensor) -> list[Tensor]:
    """What x and y keep, (B, 1) each, 0 where it is only rounding."""
    weights = problem.counted_weights()
    like, moved = weights[0], mass
    if isinstance(mass, Tensor):
        if tuple(_check.floating("mass", mass).shape) not in ((), (len(like),)):
            raise ValueError(f"mass must have shape () or ({len(like)},), got {_describe(mass)}")
        moved = mass.to(like.device, torch.float64).reshape(-1, 1)
    else:
        moved = number("mass", mass)
    totals = [w.sum(-1, keepdim=True, dtype=torch.float64) for w in weights]
    least = torch.minimum(*(t.detach() for t in totals))
    rounding = ROUNDING * torch.finfo(like.dtype).eps * least
    at = 0 * least + (moved.detach() if isinstance(moved, Tensor) else moved)
    good = ((at > 0) & (at <= least + rounding)).all()
    demand = "mass must be positive and at most the totals of a and b"
    if _check.unread(like):
        torch._assert_async(good, demand)
    elif _check.readable(like) and not bool(good):
        raise ValueError(f"{demand}, got {_describe(mass)} and totals of {least.amin():.6g}")
    kept = [total - moved for total in totals]
    return [torch.where(k.abs() <= rounding, k - k.detach(), k).to(like.dtype) for k in kept]


def _with_dummy(x: Tensor, w: Tensor) -> Tensor:
    """The cloud with its point of the largest weight again, and a mark as the last coordinate."""
    each = x if x.dim() == 3 else x.unsqueeze(0)
    real = each.detach().take_along_dim(w.argmax(-1).reshape(-1, 1, 1), 1)
    all_points = torch.cat([each, real], 1)
    mark = torch.zeros_like(all_points[..., :1])
    mark[:, -1] = 1
    marked = torch.cat([all_points, mark], -1)
    return marked if x.dim() == 3 else marked[0]


@torch.no_grad()
def _least(problem: Problem, cost: Cost, C: Tensor | None = None) -> float | Tensor:
    """The least cost (B, 1, 1), or 0."""
    if C is not None:
        return C.amin((-2, -1), keepdim=True).clamp(max=0)
    if isinstance(cost, str):
        return 0.0
    ready = ready_for_blocks(problem)

    def of_block(rows: slice) -> tuple[Tensor, ...]:
        (C,) = build_costs(ready.of_rows(rows), [0, 1], cost, "dense")
        return (C.amin((-2, -1), keepdim=True),)

    parts = in_blocks(of_block, problem.weights[0].shape[1], problem.weights[1])
    return torch.stack([part for (part,) in parts]).amin(0).clamp(max=0)


def _staying(a: Tensor, f: Tensor, b: Tensor, g: Tensor, eps: Eps) -> Tensor:
    """The plan at cost 0, between points and a dummy."""
    root = (0.5 * (f + g) / eps).exp()
    return torch.where((a > 0) & (b > 0), (a * root) * (b * root), 0.0)


class WithDummies:
    """A cost between clouds whose dummies are marked: 0 to them, ``corner`` between them."""

    def __init__(self, cost: Cost, corner: float | Tensor) -> None:
        self.cost, self.corner = cost, corner

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        C = cost_matrix(x[..., :-1], y[..., :-1], self.cost)
        of_x, of_y = x[..., -1:] > 0, (y[..., -1:] > 0).mT
        corner = self.corner
        if isinstance(corner, Tensor):
            corner = corner.to(C) if C.dim() == 3 else corner.to(C).reshape(())
        return torch.where(of_x & of_y, corner, torch.where(of_x | of_y, 0.0, C))


class PartialResult(OTResult):
    """The solution of a partial problem: as :class:`OTResult`, of the plan P between the points
    themselves.

    ``potentials`` give P as ever. ``marginal_error``, over the mass that moves, and ``duality_gap``
    are those of the balanced problem with the dummies, which is what the solver solves.
    """

    def __init__(
        self,
        real: Problem,
        whole: Problem,
        cost: Tensor | None,
        options: Options,
        solved: Solved,
        *,
        dense: bool,
    ) -> None:
        self._whole = (*whole.weights, solved.f[0], solved.g[0])
        n, m = (w.shape[1] for w in real.weights)
        real = replace(
            real,
            present=tuple(there[:, :-1] for there in whole.present),
            seen=tuple(C[:, :n, :m] for C in whole.seen),
        )
        cost = cost if cost is None else cost[:, :n, :m]
        solved = replace(solved, f=(solved.f[0][:, :n],), g=(solved.g[0][:, :m],))
        if isinstance(options.cost, WithDummies):
            options = options._replace(cost=options.cost.cost)
        super().__init__(real, cost, options, solved, dense=dense)

    def _dual_point(self) -> tuple[Tensor, ...]:
        return self._whole

    def _dual_costs(self, problem: Problem, rows: slice) -> Tensor:
        """With the column of the dummy and, behind the last of the others, its row."""
        n, like = self._a.shape[1], problem.weights[1]
        real = slice(rows.start, min(rows.stop, n))
        C = super()._dual_costs(problem, real) if rows.start < n else like[:, None][:, :0]
        C = pad(C, (0, 1, 0, rows.stop - real.stop))
        if rows.stop > n:
            least = _least(problem, self._options.cost, self._given_cost)
            C[:, -1:, -1:] = forbidding(self._eps, least, self._a.dtype)
        return C

    @property
    def _extended(self) -> list[Tensor] | None:
        settings = self._settings
        if settings is not None and settings.places is not None and self._kept_extended is None:
            a, b, f, g = self._whole
            with torch.inference_mode(False):  # see Plan
                every = extended(settings, settings.places, [a, b], f, g)
            self._kept_extended = [v[:, :-1] for v in every]
        return self._kept_extended

    @property
    def marginal_error(self) -> Any:
        moved = self._sums()  # a plan that is kept is kept with its graph
        a, b, f, g = self._whole
        with torch.no_grad():
            errors = []
            for total, w, v, u, t in ((moved[0], a, f, b, g), (moved[1], b, g, a, f)):
                stays = _staying(w[:, :-1], v[:, :-1], u[:, -1:], t[:, -1:], self._eps)
                of_dummy = _staying(w[:, -1:], v[:, -1:], u[:, :-1], t[:, :-1], self._eps)
                sums = torch.cat([total + stays, of_dummy.sum(-1, True)], -1)
                errors.append((sums - w).abs().sum(-1) / _moved_mass((a, b)))
        return self._number(torch.maximum(*errors))

    def _moves_all(self) -> bool:
        return False

    def extend(self, x_new: Tensor) -> Tensor:
        """f on new points, of which a part stays too."""
        _, b, _, g = self._whole
        kept = b[:, -1:] > 0
        log_b = torch.where(kept, torch.where(kept, b[:, -1:], 1.0).log(), -math.inf)
        stays = self._out(log_b + g[:, -1:] / self._eps)
        eps = self._eps
        return -eps * torch.logaddexp(-super().extend(x_new) / eps, stays)
