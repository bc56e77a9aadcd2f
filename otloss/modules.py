"""The losses as ``torch.nn.Module``: configured once, called with clouds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from otloss import _check, losses

__all__ = ["EnergyDistance", "MinibatchEnergyDistance", "SinkhornDivergence", "SinkhornLoss"]


class _Loss(nn.Module):
    """Keyword arguments are checked here, once; a wrong one does not wait for the first call."""

    combination: tuple[list[int], list[float]]

    def __init__(self, eps: float, *, warm_start: bool = False, **kwargs: Any) -> None:
        super().__init__()
        if warm_start and kwargs.get("n_iters") is not None:
            raise ValueError(
                "warm_start must be False with n_iters, whose iterations start from zero "
                f"potentials, got warm_start=True and n_iters={kwargs['n_iters']}"
            )
        self.options = _check.options(eps, **kwargs)
        self.memory = losses.Memory() if warm_start else None
        self._arguments = {"eps": eps, "warm_start": warm_start, **kwargs}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self._arguments.items())


class SinkhornDivergence(_Loss):
    """:func:`otloss.sinkhorn_divergence` as a module: ``SinkhornDivergence(eps, ...)(x, y)``.

    Args:
        eps: regularisation, in units of cost.
        warm_start: start from the potentials of the previous call when the shapes agree. Helps when
            the same clouds move slowly (a flow), not with fresh minibatches; changes the result
            within ``tol`` only.
        kwargs: the other keyword arguments of the function.
    """

    combination = losses.DEBIASED

    def forward(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        return losses.combine(
            {"x": x, "y": y}, {"a": a, "b": b}, self.combination, self.options, self.memory
        )


class SinkhornLoss(SinkhornDivergence):
    """:func:`otloss.sinkhorn_loss` as a module: ``SinkhornLoss(eps, ...)(x, y)``.

    Arguments as :class:`SinkhornDivergence`.
    """

    combination = losses.LOSS


class MinibatchEnergyDistance(_Loss):
    """:func:`otloss.minibatch_energy_distance` as a module, called with x1, x2, y1, y2.

    Arguments as :class:`SinkhornDivergence`, with the function's defaults.
    """

    combination = losses.MINIBATCH

    def __init__(self, eps: float, **kwargs: Any) -> None:
        if "unbalanced" in kwargs:
            raise TypeError("MinibatchEnergyDistance takes no argument unbalanced")
        super().__init__(eps, **{**losses.MINIBATCH_DEFAULTS, **kwargs})

    def forward(self, x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor) -> Tensor:
        clouds = {"x1": x1, "x2": x2, "y1": y1, "y2": y2}
        return losses.combine(clouds, {}, self.combination, self.options, self.memory)


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
