"""The costs by name. A new one is an entry here, a functor in csrc/core/costs.h and a reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["COSTS", "Cost", "cost_between", "cost_gradient", "full_precision", "without_padding"]

# A cost is a name below or a function (x, y) -> C with x (n, d), y (m, d), C (n, m), batched where
# x and y are.
Cost = str | Callable[[Tensor, Tensor], Tensor]

# Name -> number of the functor, as `CostKind` in csrc/core/costs.h.
COSTS: Final[dict[str, int]] = {"sqeuclidean": 0, "euclidean": 1, "cosine": 2}


def cost_between(x: Tensor, y: Tensor, kind: int) -> Tensor:
    """C (B, n, m) between x (B, n, d) and y (B, m, d), from differences; differentiable.

    The square root and the norms have gradient 0 where they are 0.
    """
    if kind == 2:
        with full_precision(x):
            return 1 - _unit(x) @ _unit(y).mT
    squared = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)
    if kind == 0:
        return squared
    positive = squared != 0  # NaN stays
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def full_precision(t: Tensor) -> AbstractContextManager[Any]:
    """Where matrix products keep the dtype of ``t``, under autocast too."""
    kind = t.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def without_padding(points: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Points of weight 0 moved to 0: what is there, NaN included, must not matter."""
    if not weights:
        return points
    return [torch.where(w.unsqueeze(-1) > 0, x, 0.0) for x, w in zip(points, weights, strict=True)]


def _unit(x: Tensor) -> Tensor:
    squared = x.square().sum(-1, keepdim=True)
    positive = squared != 0  # NaN stays
    return torch.where(positive, x / torch.where(positive, squared, 1.0).sqrt(), 0.0)


def cost_gradient(W: Tensor, C: Tensor, x: Tensor, y: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """sum_ij W_ij c(x_i, y_j) differentiated in x and y, by matrix products; differentiable.

    C is the cost itself; only the euclidean gradient depends on it.
    """
    if kind == 2:
        return _tangent(W, x, y), _tangent(W.mT, y, x)
    if kind == 0:
        V = 2 * W
    else:
        counted = (C > 0) & (W != 0)
        V = torch.where(counted, W / torch.where(counted, C, 1.0), 0.0)
    grad_x = x * V.sum(-1).unsqueeze(-1) - V @ y
    grad_y = y * V.sum(-2).unsqueeze(-1) - V.mT @ x
    return grad_x, grad_y


def _tangent(W: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The cosine cost's gradient in x: (<Wy, x^> x^ - Wy) / |x| with y and x^ of norm 1."""
    unit, image = _unit(x), W @ _unit(y)
    squared = x.square().sum(-1, keepdim=True)
    positive = squared > 0
    tangent = (image * unit).sum(-1, keepdim=True) * unit - image
    return torch.where(positive, tangent / torch.where(positive, squared, 1.0).sqrt(), 0.0)
