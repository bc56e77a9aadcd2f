"""The losses as ``torch.nn.Module``: configured once, called with clouds."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Unpack

from otloss import _options, losses
from otloss._options import LossOptions, check_options
from otloss.costs import Cost

__all__ = ["EnergyDistance", "MinibatchEnergyDistance", "SinkhornDivergence", "SinkhornLoss"]


class _Loss(nn.Module):
    """Keyword arguments are checked here, once; a wrong one does not wait for the first call."""

    def __init__(
        self, eps: float, *, warm_start: bool = False, **kwargs: Unpack[LossOptions]
    ) -> None:
        super().__init__()
        if warm_start and kwargs.get("n_iters") is not None:
            raise ValueError(
                "warm_start must be False with n_iters, whose iterations start from zero "
                f"potentials, got warm_start=True and n_iters={kwargs['n_iters']}"
            )
        self.options = check_options(eps, **kwargs)
        self.memory = losses.Memory() if warm_start else None
        self._arguments = {"eps": eps, "warm_start": warm_start, **kwargs}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self._arguments.items())


class _PairLoss(_Loss):
    """Of two clouds and their weights."""

    combination: losses.Combination

    def forward(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        return losses.combine(
            {"x": x, "y": y}, {"a": a, "b": b}, self.combination, self.options, self.memory
        )


class SinkhornDivergence(_PairLoss):
    """:func:`otloss.sinkhorn_divergence` as a module: ``SinkhornDivergence(eps, ...)(x, y)``.

    Args:
        eps: regularisation, in units of cost.
        warm_start: start from the potentials of the previous call when the shapes agree. Helps when
            the same clouds move slowly (a flow), not with fresh minibatches; changes the result
            within ``tol`` only.
        kwargs: the other keyword arguments of the function.
    """

    combination = losses.DEBIASED


class SinkhornLoss(_PairLoss):
    """:func:`otloss.sinkhorn_loss` as a module: ``SinkhornLoss(eps, ...)(x, y)``.

    Arguments as :class:`SinkhornDivergence`.
    """

    combination = losses.LOSS


class MinibatchEnergyDistance(_Loss):
    """:func:`otloss.minibatch_energy_distance` as a module, called with x1, x2, y1, y2.

    Arguments as :class:`SinkhornDivergence`, with the function's defaults.
    """

    def __init__(
        self, eps: float, *, warm_start: bool = False, **kwargs: Unpack[LossOptions]
    ) -> None:
        if "unbalanced" in kwargs:
            raise TypeError("MinibatchEnergyDistance takes no argument unbalanced")
        options: LossOptions = {**losses.MINIBATCH_DEFAULTS, **kwargs}
        super().__init__(eps, warm_start=warm_start, **options)

    def forward(self, x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor) -> Tensor:
        clouds = {"x1": x1, "x2": x2, "y1": y1, "y2": y2}
        return losses.combine(clouds, {}, losses.MINIBATCH, self.options, self.memory)


class EnergyDistance(nn.Module):
    """:func:`otloss.energy_distance` as a module: ``EnergyDistance(cost=...)(x, y)``."""

    def __init__(self, cost: Cost = "euclidean", method: str = "auto") -> None:
        super().__init__()
        self.cost = _options.cost(cost)
        self.method = _options.choice("method", method, _options.METHODS)

    def forward(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        return losses.energy_distance(x, y, a=a, b=b, cost=self.cost, method=self.method)

    def extra_repr(self) -> str:
        return f"cost={self.cost!r}, method={self.method!r}"
