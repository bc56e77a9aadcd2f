"""The losses as ``torch.nn.Module``: configured once, called with clouds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from otloss import _check, losses

__all__ = ["EnergyDistance", "MinibatchEnergyDistance", "SinkhornDivergence", "SinkhornLoss"]


class _Loss(nn.Module):
    """Keeps the keyword arguments; a wrong one raises here, not at the first call."""

    def __init__(self, eps: float, **kwargs: Any) -> None:
        super().__init__()
        _check.options(eps, **kwargs)
        self.eps, self.kwargs = eps, kwargs

    def extra_repr(self) -> str:
        return ", ".join([f"eps={self.eps}", *(f"{k}={v!r}" for k, v in self.kwargs.items())])


class SinkhornDivergence(_Loss):
    """:func:`otloss.sinkhorn_divergence` as a module: ``SinkhornDivergence(eps, ...)(x, y)``."""

    def forward(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        return losses.sinkhorn_divergence(x, y, self.eps, a=a, b=b, **self.kwargs)


class SinkhornLoss(_Loss):
    """:func:`otloss.sinkhorn_loss` as a module: ``SinkhornLoss(eps, ...)(x, y)``."""

    def forward(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        return losses.sinkhorn_loss(x, y, self.eps, a=a, b=b, **self.kwargs)


class MinibatchEnergyDistance(_Loss):
    """:func:`otloss.minibatch_energy_distance` as a module, called with x1, x2, y1, y2."""

    def forward(self, x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor) -> Tensor:
        return losses.minibatch_energy_distance(x1, x2, y1, y2, self.eps, **self.kwargs)


class EnergyDistance(nn.Module):
    """:func:`otloss.energy_distance` as a module: ``EnergyDistance(cost=...)(x, y)``."""

    def __init__(self, cost: Any = "euclidean", method: str = "auto") -> None:
        super().__init__()
        self.cost = _check.cost(cost)
        self.method = _check.choice("method", method, _check.METHODS)

    def forward(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        return losses.energy_distance(x, y, a=a, b=b, cost=self.cost, method=self.method)

    def extra_repr(self) -> str:
        return f"cost={self.cost!r}, method={self.method!r}"
