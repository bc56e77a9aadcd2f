"""What the operations take: a set of OT problems over a set of clouds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otloss.reference.marginals import Marginals, marginals_of

__all__ = ["Arguments", "as_pairs", "each_problem", "read"]


class Arguments(NamedTuple):
    """What operations on a set of OT problems take, in the order of the schemas."""

    costs: list[Tensor]  # (B, n, m) or (1, n, m) per pair, or none: they are made from the points
    points: list[Tensor]  # (B, n, d) per cloud, or none
    weights: list[Tensor]  # (B, n) per cloud
    pairs: list[int]
    kind: int
    coefficients: list[float]
    eps: Tensor  # () or (B,), float64, on the CPU
    rho: Tensor | None  # (2,) likewise: rho_x, rho_y; infinite both if there is none
    objective: int
    tf32: bool
    multiscale: bool

    def scale(self, grad_loss: Tensor, p: int) -> Tensor:
        """The gradient (B,) of the value of pair p, from that of the loss, (B,), or of its terms,
        (P, B)."""
        return self.coefficients[p] * grad_loss.expand(len(self.coefficients), -1)[p]

    def numbered_pairs(self) -> list[tuple[int, int, int, Marginals]]:
        """(p, i, j, marginals) of each pair p, of clouds i and j."""
        rho_x, rho_y = (math.inf, math.inf) if self.rho is None else self.rho.tolist()
        pairs = enumerate(as_pairs(self.pairs))
        return [(p, i, j, marginals_of(rho_x, rho_y, i, j)) for p, (i, j) in pairs]


def read(arguments: Sequence[Any]) -> tuple[Arguments, Sequence[Any]]:
    """An operation's arguments from those of the problems on: these, costs (B, n, m), and the
    rest."""
    count = len(Arguments._fields)
    problem = Arguments(*arguments[:count])
    costs = [C.expand(len(problem.weights[0]), -1, -1) for C in problem.costs]
    return problem._replace(costs=costs), arguments[count:]


def each_problem(before: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For operations: where eps is (B,), one problem of the batch after the other. ``before``: how
    many arguments there are before those of the problems."""

    def decorated(operation: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(operation)
        def run(*arguments: Any) -> Any:
            problem, rest = read(arguments[before:])
            if problem.eps.numel() == 1:
                return operation(*arguments)
            parts = []
            for k in range(len(problem.eps)):
                seeds = [_item(t, k, -1) for t in arguments[:before]]
                costs, points, weights = (_item(problem[c], k) for c in range(3))
                one = problem._replace(
                    costs=costs, points=points, weights=weights, eps=problem.eps[k]
                )
                parts.append(operation(*seeds, *one, *(_item(t, k) for t in rest)))
            return tuple(map(_joined, zip(*parts, strict=True)))

        return run

    return decorated


def _item(value: Any, k: int, dim: int = 0) -> Any:
    """Problem k of a batch, as a batch of one; tensors of one number are of all."""
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [t.narrow(0, k, 1) for t in value]
    return value.narrow(dim, k, 1) if isinstance(value, Tensor) and value.dim() else value


def _joined(parts: Sequence[Any]) -> Any:
    """A result of all problems: tensors (B, ...) of pairs or clouds, the loss (B,), a status
    (P, B, ...)."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts), min(parts[0].dim() - 1, 1))
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def as_pairs(pairs: list[int]) -> list[tuple[int, int]]:
    """``[i0, j0, i1, j1, ...]`` as ``[(i0, j0), (i1, j1), ...]``."""
    return list(zip(pairs[::2], pairs[1::2], strict=True))
