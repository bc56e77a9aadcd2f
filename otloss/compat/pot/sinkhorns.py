"""The functions that return a plan or a transport cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otloss import _check
from otloss._options import Objective
from otloss.compat.pot.common import as_cost, potentials, tolerance, warnings_if, weights_of
from otloss.costs import Cost
from otloss.losses import sinkhorn_divergence
from otloss.result import OTResult as Solved
from otloss.solve import solve as solve_matrix
from otloss.solve import solve_sample as solve_points

__all__ = [
    "empirical_sinkhorn",
    "empirical_sinkhorn2",
    "empirical_sinkhorn_divergence",
    "sinkhorn",
    "sinkhorn2",
]

# All of them lead to one solution.
METHODS = (
    "sinkhorn",
    "sinkhorn_log",
    "sinkhorn_stabilized",
    "sinkhorn_epsilon_scaling",
    "greenkhorn",
)
# They steer iterations of POT, and have no effect.
IGNORED = ("tau", "print_period", "epsilon0", "numInnerItermax")


def sinkhorn(
    a: Any,
    b: Any,
    M: Tensor,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """``ot.sinkhorn``: the plan of entropic transport, (n, m); for several histograms ``b`` (m, k)
    the k transport costs, as :func:`sinkhorn2`.

    Args:
        a, b: weights (n,) and (m,); empty or None: uniform.
        M, reg: cost matrix (n, m) and eps, in units of it.
        method: any of POT's names; they lead to one plan.
        numItermax, stopThr: ``max_iters`` and ``tol`` of :func:`otloss.solve`, an L1 error over the
            total mass. In float32, a ``stopThr`` below 1e-5 is taken as that.
        log: return ``(plan, log)`` with ``err``, ``niter``, ``u``, ``v``, ``log_u``, ``log_v``.
        warmstart: ``(log_u, log_v)``.
        verbose: without effect.

    Returns:
        The plan, differentiable in M, a and b through the optimality conditions.

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected.

    Example:
        >>> import otloss.compat.pot as ot  # instead of: import ot
        >>> a = torch.tensor([0.5, 0.5])
        >>> ot.sinkhorn(a, a, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reg=0.05).round(decimals=2)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    limits = _Limits(numItermax, stopThr, warn, warmstart, kwargs)
    result = _sinkhorn(a, b, M, reg, method, limits, "regularized")
    value = result.plan if _one(b) else result.value_linear
    return (value, _log(result, reg)) if log else value


def sinkhorn2(
    a: Any,
    b: Any,
    M: Tensor,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = False,
    warmstart: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """``ot.sinkhorn2``: the transport cost <P, M> of the entropic plan, () or, for ``b`` (m, k),
    (k,); without the entropy. Arguments as :func:`sinkhorn`; the gradient counts how the plan
    changes.

    Example:
        >>> import otloss.compat.pot as ot
        >>> a = torch.tensor([0.5, 0.5])
        >>> print(f"{ot.sinkhorn2(a, a, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reg=0.05):.2f}")
        0.00
    """
    limits = _Limits(numItermax, stopThr, warn, warmstart, kwargs)
    result = _sinkhorn(a, b, M, reg, method, limits, "transport")
    return (result.value, _log(result, reg)) if log else result.value


def empirical_sinkhorn(
    X_s: Tensor,
    X_t: Tensor,
    reg: float,
    a: Any = None,
    b: Any = None,
    metric: Cost = "sqeuclidean",
    numIterMax: int = 10000,
    stopThr: float = 1e-9,
    isLazy: bool = False,
    batchSize: Any = 100,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """``ot.empirical_sinkhorn``: the plan between samples (n, m); with ``isLazy`` the
    potentials ``(log_u, log_v)`` in memory O(n + m). ``metric`` is a cost of :mod:`otloss`;
    ``batchSize`` has no effect.

    Example:
        >>> import otloss.compat.pot as ot
        >>> ot.empirical_sinkhorn(torch.rand(5, 2), torch.rand(7, 2), reg=0.1).shape
        torch.Size([5, 7])
    """
    limits = _Limits(numIterMax, stopThr, warn, warmstart, kwargs)
    result = _empirical(X_s, X_t, reg, a, b, metric, isLazy, limits, "regularized")
    if isLazy:
        u, v = potentials(result, reg)
        return (u, v, {**_log(result, reg), "u": u, "v": v}) if log else (u, v)
    return (result.plan, _log(result, reg)) if log else result.plan


def empirical_sinkhorn2(
    X_s: Tensor,
    X_t: Tensor,
    reg: float,
    a: Any = None,
    b: Any = None,
    metric: Cost = "sqeuclidean",
    numIterMax: int = 10000,
    stopThr: float = 1e-9,
    isLazy: bool = False,
    batchSize: Any = 100,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """``ot.empirical_sinkhorn2``: the transport cost <P, M> between samples, without the
    entropy. Arguments as :func:`empirical_sinkhorn`.

    Example:
        >>> import otloss.compat.pot as ot
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> print(f"{ot.empirical_sinkhorn2(x, x + 2, reg=1.0).item():.2f}")
        4.27
    """
    limits = _Limits(numIterMax, stopThr, warn, warmstart, kwargs)
    result = _empirical(X_s, X_t, reg, a, b, metric, isLazy, limits, "transport")
    return (result.value, _log(result, reg)) if log else result.value


def empirical_sinkhorn_divergence(
    X_s: Tensor,
    X_t: Tensor,
    reg: float,
    a: Any = None,
    b: Any = None,
    metric: Cost = "sqeuclidean",
    numIterMax: int = 10000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: None = None,
    **kwargs: Any,
) -> Any:
    """``ot.empirical_sinkhorn_divergence``: ``sinkhorn_divergence(X_s, X_t, reg,
    objective="transport")``, 0 if that is negative, of shape (1,) as in POT. ``log`` holds the
    three terms and their logs.

    Example:
        >>> import otloss.compat.pot as ot
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> print(f"{ot.empirical_sinkhorn_divergence(x, x + 2, reg=1.0).item():.2f}")
        4.00
    """
    if warmstart is not None:
        raise NotImplementedError("warmstart= of a divergence has no counterpart in otloss")
    _refuse_unknown(kwargs)
    a, b = _weights(a), _weights(b)
    with warnings_if(warn):
        value = sinkhorn_divergence(
            X_s, X_t, reg, a=a, b=b, cost=as_cost(metric), objective="transport",
            tol=tolerance(stopThr, X_s, X_t), max_iters=numIterMax,
        )  # fmt: skip
    value = value.clamp(min=0).reshape(1)
    if not log:
        return value
    logged: dict[str, Any] = {}
    for name, x, y, p, q in (("ab", X_s, X_t, a, b), ("a", X_s, X_s, a, a), ("b", X_t, X_t, b, b)):
        term, of_term = empirical_sinkhorn2(
            x, y, reg, p, q, metric, numIterMax, stopThr, log=True, warn=warn
        )
        logged |= {f"sinkhorn_loss_{name}": term, f"log_sinkhorn_{name}": of_term}
    return value, logged


class _Limits(NamedTuple):
    """What all functions take of a solve besides the problem."""

    iterations: int
    stop: float
    warn: bool
    warmstart: Any
    unknown: Mapping[str, Any]

    def solve(
        self,
        function: Callable[..., Solved],
        *given: Tensor,
        reg: float,
        a: Any,
        b: Any,
        **options: Any,
    ) -> Solved:
        """``given``: a cost matrix, or two clouds."""
        _refuse_unknown(self.unknown)
        n, m = given[0].shape[-2:] if len(given) == 1 else map(len, given)
        with warnings_if(self.warn):
            return function(
                *given, reg, a=a, b=b, tol=tolerance(self.stop, *given), max_iters=self.iterations,
                init=_start(self.warmstart, reg, a, b, (n, m)), **options,
            )  # fmt: skip


def _sinkhorn(
    a: Any, b: Any, M: Tensor, reg: float, method: str, limits: _Limits, objective: Objective
) -> Solved:
    """A batch for several histograms b (m, k)."""
    if not isinstance(method, str) or method.lower() not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    a, b = _weights(a), _weights(b)
    if b is not None and b.dim() == 2:
        b = b.mT
        a = None if a is None else a.expand(len(b), -1)
    return limits.solve(solve_matrix, M, reg=reg, a=a, b=b, objective=objective)


def _empirical(
    x: Tensor, y: Tensor, reg: float, a: Any, b: Any, metric: Cost, lazy: bool, limits: _Limits,
    objective: Objective,
) -> Solved:  # fmt: skip
    method = "streamed" if lazy else "auto"
    options = {"cost": as_cost(metric), "objective": objective, "method": method}
    return limits.solve(solve_points, x, y, reg=reg, a=_weights(a), b=_weights(b), **options)


def _log(result: Solved, reg: float) -> dict[str, Any]:
    """With several histograms their number k is the last dimension, as in POT."""
    u, v = (t.mT if t.dim() == 2 else t for t in potentials(result, reg))
    with torch.no_grad():
        error = (result.marginals[1] - weights_of(result)[1]).norm()
    names = {"log_u": u, "log_v": v, "u": u.exp(), "v": v.exp()}
    return {"err": [error], "niter": result.n_iters, **names}


def _start(warmstart: Any, reg: float, a: Any, b: Any, sizes: tuple[int, int]) -> Any:
    """f and g of ``(log_u, log_v)``, which hold the logarithms of the weights."""
    if warmstart is None:
        return None
    sides = zip(warmstart, (a, b), sizes, strict=True)
    return tuple(
        reg * (v + math.log(n) if w is None else torch.where(w > 0, v - w.log(), 0.0))
        for v, w, n in sides
    )


def _weights(w: Any) -> Any:
    """None for the empty lists that POT takes for uniform weights."""
    return None if w is None or len(w) == 0 else _check.floating("weights", w)


def _one(b: Any) -> bool:
    return b is None or len(b) == 0 or b.dim() == 1


def _refuse_unknown(kwargs: Mapping[str, Any]) -> None:
    for name in kwargs:
        if name not in IGNORED:
            raise TypeError(f"unexpected argument {name}=")
