"""Partial transport: of a fixed mass, by one dummy point more on either side.

The dummy points are at cost 0 from all others and take what stays where it is: the one of y the
|a| - mass that x keeps, the one of x the |b| - mass that y keeps (Chapel, Alaya, Gasso 2020). The
problem is then a balanced one, and its solver, gradients and certificate are those of any other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from otloss import _check
from otloss._options import Options, number
from otloss.cost_matrices import build_costs, cost_matrix, ready_for_blocks
from otloss.costs import Cost
from otloss.eps import check_shape, of_rows
from otloss.forbidden import UNDERFLOW
from otloss.method import in_blocks
from otloss.problem import Problem
from otloss.reference.marginals import ROUNDING, of_entries
from otloss.result import OTResult
from otloss.run import Solved

_describe = _check.describe

__all__ = ["Mass", "PartialResult", "check_options_of", "with_dummies"]

Mass = float | Tensor | None


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


def with_dummies(
    problem: Problem,
    costs: tuple[Tensor, ...],
    mass: float | Tensor,
    options: Options,
    start: tuple[Tensor, ...],
) -> tuple[Problem, tuple[Tensor, ...], Options, tuple[Tensor, ...]]:
    """The balanced problem with the dummy points. ``costs``: C (B, n, m) where it is given, or
    none: the problem has points; ``start``: f and g, or nothing."""
    check_shape(options.eps, problem)
    a, b = problem.weights
    kept_x, kept_y = _kept(problem, mass)
    weights = torch.cat([a, kept_y], -1), torch.cat([b, kept_x], -1)
    eps = of_rows(options.eps, a)
    eps = eps.detach() if isinstance(eps, Tensor) else eps
    if start:  # the optimal potentials of the dummies at the others, for a cost of 0
        of_x, of_y = (
            -eps * torch.logsumexp(w.detach().log() + v / eps, -1, keepdim=True)
            for v, w in zip(start[::-1], (b, a), strict=True)
        )
        start = torch.cat([start[0], of_x], -1), torch.cat([start[1], of_y], -1)
    # Between the dummies: at the solution their potentials add up to less than minus the least cost
    # and the logarithms of shares, so that the plan underflows to 0.
    height = 2 * UNDERFLOW[a.dtype] * of_entries(eps)
    for C in costs:
        corner = height - C.detach().amin((-2, -1), keepdim=True).clamp(max=0)
        last = pad(corner.to(C), (C.shape[-1], 0))
        problem = replace(problem, weights=weights, padded=True)
        return problem, (torch.cat([pad(C, (0, 1)), last], 1),), options, start
    cost = WithDummies(options.cost, height - _least(problem, options.cost))
    points = tuple(_with_dummy(x, w) for x, w in zip(problem.points, problem.weights, strict=True))
    problem = replace(problem, points=points, weights=weights, padded=True)
    return problem, (), options._replace(cost=cost), start


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
def _least(problem: Problem, cost: Cost) -> float | Tensor:
    """The least cost (B, 1, 1), or 0."""
    if isinstance(cost, str):
        return 0.0
    ready = ready_for_blocks(problem)

    def of_block(rows: slice) -> tuple[Tensor, ...]:
        (C,) = build_costs(ready.of_rows(rows), [0, 1], cost, "dense")
        return (C.amin((-2, -1), keepdim=True),)

    parts = in_blocks(of_block, problem.weights[0].shape[1], problem.weights[1])
    return torch.stack([part for (part,) in parts]).amin(0).clamp(max=0)


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

    ``potentials`` give P as ever. ``marginal_error`` and ``duality_gap`` are those of the balanced
    problem with the dummies, which is what the solver solves.
    """

    def __init__(self, whole: OTResult) -> None:
        self._whole = whole
        problem, options, C = whole._problem, whole._options, whole._given_cost
        if isinstance(options.cost, WithDummies):
            options = options._replace(cost=options.cost.cost)
        inner = replace(
            problem,
            points=tuple(x[..., :-1, :-1] for x in problem.points),
            weights=tuple(w[:, :-1] for w in problem.weights),
            present=tuple(p[:, :-1] for p in problem.present),
            seen=tuple(S[:, :-1, :-1] for S in problem.seen),
        )
        solved = Solved(
            whole.value, whole._status[None], (whole._f[:, :-1],), (whole._g[:, :-1],),
            whole._settings,
        )  # fmt: skip
        cost = None if C is None else C[:, :-1, :-1]
        super().__init__(inner, cost, options, solved, dense=whole._dense)

    @property
    def _extended(self) -> list[Tensor] | None:
        of_whole = self._whole._extended
        return None if of_whole is None else [v[:, :-1] for v in of_whole]

    @property
    def marginal_error(self) -> Any:
        return self._whole.marginal_error

    @property
    def duality_gap(self) -> Any:
        return self._whole.duality_gap

    def _moved(self) -> Tensor:
        return self._sums()[0]

    def extend(self, x_new: Tensor) -> Tensor:
        """f on new points, of which a part stays too."""
        self._check_unchanged()
        y = self._need_points("extend")[1]
        x_new = _check.points("x_new", x_new)
        _check.same_space("y", y, "x_new", x_new)
        return self._whole.extend(pad(x_new, (0, 1)))
