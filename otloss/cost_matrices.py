"""The cost matrices of a problem: made, without padding, with what is seen of empty bins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from otloss import _check, _options
from otloss.autograd import Argument, CostMatrices, FirstOrder, through
from otloss.costs import COSTS, Cost, degree
from otloss.first_use import first_use
from otloss.problem import Problem, all_positive, check_clouds
from otloss.reference.arguments import as_pairs

__all__ = [
    "build_costs",
    "call_cost",
    "cost_matrix",
    "hide_padding",
    "ready_for_blocks",
    "replaced",
    "see_empty_bins",
    "seen_costs",
    "with_empty_bins",
]


def build_costs(problem: Problem, pairs: list[int], cost: Cost, method: str) -> tuple[Tensor, ...]:
    """C (B, n, m) of each pair; differentiable in the points."""
    points = problem.points
    if isinstance(cost, str):
        first_use(points[0])
        weights = tuple(w.detach() for w in problem.weights) if problem.padded else ()
        return CostMatrices.apply(pairs, COSTS[cost], method, len(points), *points, *weights)
    weights = problem.weights
    ready = [_ready(x, w, problem.padded) for x, w in zip(points, weights, strict=True)]
    return tuple(
        hide_padding(problem, call_cost(cost, ready[i], ready[j]), weights[i], weights[j])
        for i, j in as_pairs(pairs)
    )


def ready_for_blocks(problem: Problem) -> Problem:
    """The problem with points that a cost function may see, whichever rows it gets: in place of
    padding a real one."""
    if not problem.padded:
        return problem
    kept = problem.present or [w > 0 for w in problem.weights]
    sides = zip(problem.points, problem.weights, kept, strict=True)
    return replace(problem, points=tuple(replaced(x.to(w.dtype), w, k) for x, w, k in sides))


def see_empty_bins(
    problem: Problem, pairs: list[int], cost: Cost, method: str, C: Tensor | None = None
) -> Problem:
    """The problem with what is there at weight 0, where that may matter; ``C`` is given or none."""
    if not problem.has_empty_bins():
        return problem
    if C is None:
        # Four times the square of a norm is no less than a cost to points that are not larger.
        points = [
            x.detach().to(w.dtype) for x, w in zip(problem.points, problem.weights, strict=True)
        ]
        finite = [(4 * x.square().sum(-1)).isfinite() for x in points]
        problem = _with_present(problem, finite)
        if isinstance(cost, str) or not problem.present:
            return problem
        seen = seen_costs(problem, pairs, cost, method)
    else:
        seen = (C.detach(),)
    finite = [torch.ones_like(w, dtype=torch.bool) for w in problem.weights]
    for S, (i, j) in zip(seen, as_pairs(pairs), strict=True):
        each, (a, b) = S.isfinite(), (problem.weights[i], problem.weights[j])
        finite[i] = finite[i] & (each | (b.unsqueeze(-2) == 0)).all(-1)
        finite[j] = finite[j] & (each | (a.unsqueeze(-1) == 0)).all(-2)
    return _with_present(replace(problem, seen=seen), finite)


def _with_present(problem: Problem, finite: list[Tensor]) -> Problem:
    """As it was if all that has weight 0 is padding."""
    sides = list(zip(problem.weights, finite, strict=True))
    if all(_check.readable(w) and not bool(((w == 0) & f).any()) for w, f in sides):
        return replace(problem, present=())
    return replace(problem, present=tuple((w > 0) | f for w, f in sides))


@torch.no_grad()
def seen_costs(problem: Problem, pairs: list[int], cost: Cost, method: str) -> tuple[Tensor, ...]:
    """C (B, n, m) of each pair with the rows and columns of empty bins, NaN for padding.

    They have no derivative: that of a cost function may not be finite there.
    """
    present = problem.present
    if isinstance(cost, str):
        # Empty bins that are far away move the clouds' centre, so that on a CPU float64 is needed.
        points = tuple(x.double() if x.is_cpu else x for x in problem.points)
        weights = tuple(
            there.to(torch.float64 if w.is_cpu else w.dtype)
            for there, w in zip(present, problem.weights, strict=True)
        )
        far = replace(problem, points=points, weights=weights)
        costs = build_costs(far, pairs, cost, method)
    else:
        ready = [
            replaced(x.to(w.dtype), w, p)
            for x, w, p in zip(problem.points, problem.weights, present, strict=True)
        ]
        costs = tuple(call_cost(cost, ready[i], ready[j]) for i, j in as_pairs(pairs))
    return tuple(
        torch.where(
            present[i].unsqueeze(-1) & present[j].unsqueeze(-2),
            C.to(problem.weights[i].dtype),
            torch.nan,
        )
        for C, (i, j) in zip(costs, as_pairs(pairs), strict=True)
    )


def with_empty_bins(C: Tensor, seen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """C (B, n, m) with the costs of empty bins, and 0 for padding.

    What multiplies these costs is 0, but not its derivative in the weights. The derivative of that
    in the costs, a second one, raises.
    """
    x, y = (a > 0).unsqueeze(-1), (b > 0).unsqueeze(-2)
    empty = ~(x & y) & seen.isfinite()
    return FirstOrder.apply(torch.where(x & y, C, torch.where(empty, seen, 0.0)), empty, True)


def hide_padding(problem: Problem, C: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """C (B, n, m) with 0 in rows and columns of weight 0, whatever they hold, even NaN; of one
    matrix (1, n, m) for all problems, where no problem has a positive weight."""
    if not problem.padded or (all_positive(a) and all_positive(b)):
        return C
    x, y = a > 0, b > 0
    if len(C) < len(a):
        counts = (x.mT.to(a) @ y.to(b) > 0).unsqueeze(0)
    else:
        counts = x.unsqueeze(-1) & y.unsqueeze(-2)
    return torch.where(counts, C, 0.0)


def _ready(x: Tensor, w: Tensor, padded: bool) -> Tensor:
    """What a cost function gets: points in the dtype of the weights, and for padding a real point.

    Its costs are hidden afterwards, and their derivatives are those of costs that count: finite.
    """
    x = x.to(w.dtype)
    if padded and not all_positive(w):
        x = replaced(x, w, w > 0)
    if x.requires_grad and _check.readable(x):
        x = x.view_as(x)  # the hook is this call's, not the caller's tensor's
        x.register_hook(_check.finite_gradient)
    return x


def replaced(x: Tensor, w: Tensor, kept: Tensor) -> Tensor:
    """The cloud with its point of the largest weight in place of those that are not kept (B, n)."""
    batched = x if x.dim() == 3 else x.unsqueeze(0)
    index = w.argmax(-1, keepdim=True).unsqueeze(-1)
    real = batched.take_along_dim(index, dim=1).detach()
    return torch.where(kept.unsqueeze(-1), batched, real).view_as(x)


def call_cost(cost: Any, x: Tensor, y: Tensor) -> Tensor:
    given = [(t, t._version) for t in (x, y) if _check.readable(t) and not t.is_inference()]
    C = cost(x, y)
    if any(t._version != version for t, version in given):
        raise ValueError("cost must not change its arguments in place, but has")
    expected = (*x.shape[:-1], y.shape[-2])
    if not isinstance(C, Tensor) or tuple(C.shape) != expected or C.is_complex():
        raise ValueError(
            f"cost must return a tensor of shape {expected}, of real numbers, for clouds of shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}, got {_check.describe(C)}"
        )
    return (C if C.dim() == 3 else C.unsqueeze(0)).to(x.dtype)


def cost_matrix(x: Tensor, y: Tensor, cost: Cost = "sqeuclidean") -> Tensor:
    """The cost matrix C_ij = c(x_i, y_j), in one operation. Twice differentiable.

    Args:
        x, y: clouds (n, d) and (m, d), or (B, n, d) and (B, m, d).
        cost: ``"sqeuclidean"`` |x - y|^2 (no 1/2), ``"euclidean"`` |x - y|, ``"cosine"``
            1 - <x, y> / (|x| |y|), or a function ``(x, y) -> C``. Coincident points under
            euclidean, and points of norm 0 under cosine (cost 1), have gradient 0.

    Returns:
        C (n, m) or (B, n, m), float32 or float64; differentiable twice in x and y. Where ``x is y``
        the diagonal is exactly 0.

    Raises:
        ValueError, TypeError: a wrong argument, or NaN or infinity in x or y (on the CPU).

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]])
        >>> otloss.cost_matrix(x, y)
        tensor([[9.],
                [4.]])
    """
    cost = _options.check_cost(cost)
    if _check.transformed():
        return _cost_matrix_inside(x, y, cost)
    problem = check_clouds({"x": x} if x is y else {"x": x, "y": y})
    (C,) = build_costs(problem, [0, len(problem.points) - 1], cost, "auto")
    means = C.detach().mean((-2, -1))
    if _check.readable(C) and not bool(means.isfinite().all()):
        _check.finite("x", x)
        _check.finite("y", y)
    _check.distances(problem, degree(cost), means)
    return C if problem.batched else C[0]


def _cost_matrix_inside(x: Tensor, y: Tensor, cost: Cost) -> Tensor:
    """Of torch.func's transforms; a function may hold tensors of these."""
    points = {"x": _check.cloud("x", x), "y": _check.cloud("y", y)}
    if not isinstance(cost, str):
        x, y = (t.to(_check.compute_dtype(*points.values())) for t in points.values())
        C = call_cost(cost, x, y)
        return C if x.dim() == 3 else C[0]

    def function(t: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (cost_matrix(t["x"], t["x"] if x is y else t["y"], cost),)

    return through(function, {k: Argument(t, 2) for k, t in points.items()})[0]
