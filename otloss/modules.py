"""The losses as ``torch.nn.Module``: configured once, called with clouds."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Unpack

from otloss import _options, losses
from otloss._options import EnergyMethod, LossOptions, check_eps, check_options
from otloss.combination import DEBIASED, LOSS, MINIBATCH, Combination, Memory, combine
from otloss.costs import Cost
from otloss.target import Target

__all__ = ["EnergyDistance", "MinibatchEnergyDistance", "SinkhornDivergence", "SinkhornLoss"]


class _Loss(nn.Module):
    """Checks keyword arguments at construction, not at the first call."""

    options_refused: tuple[str, ...] = ()

    def __init__(
        self, eps: float | Tensor, *, warm_start: bool = False, **kwargs: Unpack[LossOptions]
    ) -> None:
        super().__init__()
        for name in kwargs:
            if name in self.options_refused or name not in LossOptions.__annotations__:
                raise TypeError(f"{type(self).__name__} takes no argument {name}")
        if warm_start and kwargs.get("n_iters") is not None:
            raise ValueError(
                "warm_start must be False with n_iters, whose iterations start from zero "
                f"potentials, got warm_start=True and n_iters={kwargs['n_iters']}"
            )
        self.options = check_options(eps.detach() if isinstance(eps, Tensor) else eps, **kwargs)
        # a parameter is registered, and another tensor moves with the module
        if isinstance(eps, Tensor) and not isinstance(eps, nn.Parameter):
            self.register_buffer("eps", eps)
        else:
            self.eps = eps
        self.cost = self.options.cost  # a module is registered, with its parameters
        self.memory = Memory() if warm_start else None
        self.target: Target | None = None
        self._arguments = {"eps": eps, "warm_start": warm_start, **kwargs}

    def combine(
        self,
        clouds: dict[str, Tensor],
        weights: dict[str, Tensor | None],
        combination: Combination,
    ) -> Tensor:
        eps = check_eps(self.eps) if isinstance(self.eps, Tensor) else self.options.eps
        options = self.options._replace(cost=self.cost, eps=eps)
        return combine(clouds, weights, combination, options, self.memory, self.target)

    def extra_repr(self) -> str:
        hidden = nn.Module, Tensor
        shown = (kv for kv in self._arguments.items() if not isinstance(kv[1], hidden))
        return ", ".join(f"{key}={value!r}" for key, value in shown)


class _PairLoss(_Loss):
    """Of two clouds and their weights."""

    combination: Combination

    def forward(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        return self.combine({"x": x, "y": y}, {"a": a, "b": b}, self.combination)


class SinkhornDivergence(_PairLoss):
    r""":func:`otloss.sinkhorn_divergence` as a module: ``SinkhornDivergence(eps, ...)(x, y)``.

    .. math:: S_\varepsilon(a, b) = OT_\varepsilon(a, b) - \tfrac12 OT_\varepsilon(a, a)
              - \tfrac12 OT_\varepsilon(b, b)

    Called with clouds (n, d) and (m, d), or batches (B, n, d) and (B, m, d), and with weights if
    they are not uniform, ``loss(x, y, a, b)``. It returns () or (B,), differentiable twice in all
    four.

    Args:
        eps: regularisation, in units of cost, absolute. A ``Parameter`` is learnt with the module's
            others.
        warm_start: start from the potentials of the previous call if the shapes agree. It helps if
            the clouds move slowly between calls, as in a gradient flow, and not with fresh
            minibatches. It changes results only within ``tol``.
        kwargs: the other keyword arguments of the function.

    On a CPU a ``y`` that stays, the very same tensor in every call, is solved against itself in the
    first two of them only, unless it needs a gradient or has changed. Without ``warm_start``
    results are the same to the last bit. This is for balanced and unbalanced divergences of named
    costs, ``"regularized"`` and without ``n_iters``.

    Raises:
        ValueError, TypeError: a wrong argument, named: options when the module is made, clouds and
            weights when it is called.

    Example:
        >>> loss = otloss.SinkhornDivergence(eps=0.1, cost="cosine")
        >>> loss(torch.rand(20, 8), torch.rand(30, 8)).shape
        torch.Size([])
        >>> loss
        SinkhornDivergence(eps=0.1, warm_start=False, cost='cosine')
    """

    combination = DEBIASED

    def __init__(
        self, eps: float | Tensor, *, warm_start: bool = False, **kwargs: Unpack[LossOptions]
    ) -> None:
        super().__init__(eps, warm_start=warm_start, **kwargs)
        self.target = Target()


class SinkhornLoss(_PairLoss):
    r""":func:`otloss.sinkhorn_loss` as a module: ``SinkhornLoss(eps, ...)(x, y)``.

    .. math:: OT_\varepsilon(a, b) = \min_{P 1 = a,\; P^T 1 = b}
              \langle P, C\rangle + \varepsilon\, KL(P \,|\, a \otimes b)

    Arguments, calls, gradients and errors as :class:`SinkhornDivergence`, without ``symmetric``.

    Example:
        >>> loss = otloss.SinkhornLoss(eps=torch.nn.Parameter(torch.tensor(0.1)))  # learns its eps
        >>> loss(torch.rand(20, 8), torch.rand(30, 8)).backward()
        >>> loss.eps.grad.shape
        torch.Size([])
    """

    combination = LOSS
    options_refused = ("symmetric",)


class MinibatchEnergyDistance(_Loss):
    r""":func:`otloss.minibatch_energy_distance` as a module, called with x1, x2, y1, y2.

    .. math:: L = W(x_1, y_1) + W(x_1, y_2) + W(x_2, y_1) + W(x_2, y_2)
              - 2 W(x_1, x_2) - 2 W(y_1, y_2)

    Arguments and errors as :class:`SinkhornDivergence`, without ``unbalanced`` and ``symmetric``;
    defaults, shapes and gradients as :func:`otloss.minibatch_energy_distance`.

    Example:
        >>> loss = otloss.MinibatchEnergyDistance(eps=0.01)
        >>> loss(*torch.rand(4, 16, 8)).shape  # four minibatches of 16
        torch.Size([])
    """

    options_refused = ("symmetric", "unbalanced")

    def __init__(
        self, eps: float | Tensor, *, warm_start: bool = False, **kwargs: Unpack[LossOptions]
    ) -> None:
        options: LossOptions = {**losses.MINIBATCH_DEFAULTS, **kwargs}
        super().__init__(eps, warm_start=warm_start, **options)

    def forward(self, x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor) -> Tensor:
        return self.combine({"x1": x1, "x2": x2, "y1": y1, "y2": y2}, {}, MINIBATCH)


class EnergyDistance(nn.Module):
    r""":func:`otloss.energy_distance` as a module: ``EnergyDistance(cost=...)(x, y)``.

    .. math:: E(a, b) = \langle a, C_{xy} b\rangle - \tfrac12 \langle a, C_{xx} a\rangle
              - \tfrac12 \langle b, C_{yy} b\rangle

    Called with clouds (n, d) and (m, d), or batches, and with weights if they are not uniform;
    arguments, gradients and errors are those of the function.

    Example:
        >>> x = torch.rand(20, 3)
        >>> print(f"{abs(otloss.EnergyDistance()(x, x)):.3f}")
        0.000
    """

    def __init__(self, cost: Cost = "euclidean", method: EnergyMethod = "auto") -> None:
        super().__init__()
        self.cost = _options.check_cost(cost)
        self.method = _options.choice("method", method, _options.ENERGY_METHODS)

    def forward(
        self, x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        return losses.energy_distance(x, y, a=a, b=b, cost=self.cost, method=self.method)

    def extra_repr(self) -> str:
        return f"cost={self.cost!r}, method={self.method!r}"
