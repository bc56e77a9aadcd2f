"""What POT's calls share: arguments, tolerances, potentials in its units."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from otloss._check import ConvergenceWarning
from otloss.cost_matrices import cost_matrix
from otloss.costs import COSTS, Cost
from otloss.result import OTResult

__all__ = [
    "as_cost",
    "dist",
    "potentials",
    "refuse",
    "tolerance",
    "unif",
    "warnings_if",
    "weights_of",
]

FLOAT32_TOL = 1e-5  # a marginal error that float32 reaches


def as_cost(metric: Any) -> Cost:
    if callable(metric) or metric in COSTS:
        return metric
    raise NotImplementedError(
        f"metric={metric!r} has no counterpart in otloss: give a function (x, y) -> C"
    )


def tolerance(tol: float, *tensors: Any) -> float:
    double = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors)
    return tol if double else max(tol, FLOAT32_TOL)


def refuse(**values: Any) -> None:
    for name, value in values.items():
        if value is not None:
            raise NotImplementedError(f"{name}= has no counterpart in otloss")


@contextmanager
def warnings_if(warn: bool) -> Iterator[None]:
    """Where a solve that did not converge warns only if asked to."""
    with warnings.catch_warnings():
        if not warn:
            warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def weights_of(result: OTResult) -> tuple[Tensor, Tensor]:
    return result._out(result._a), result._out(result._b)


def potentials(result: OTResult, reg: float, *, weighted: bool = True) -> tuple[Tensor, Tensor]:
    """f / reg and g / reg, ``weighted`` with the logarithms of the weights."""
    u, v = (p / reg for p in result.potentials)
    if not weighted:
        return u, v
    a, b = weights_of(result)
    return u + a.log(), v + b.log()


def dist(x1: Tensor, x2: Tensor | None = None, metric: Cost = "sqeuclidean") -> Tensor:
    """:func:`otloss.cost_matrix` of (n, d) and (m, d), or of x1 with itself: C (n, m)."""
    return cost_matrix(x1, x1 if x2 is None else x2, as_cost(metric))


def unif(n: int, type_as: Tensor | None = None) -> Tensor:
    """Uniform weights (n,), of the dtype and on the device of ``type_as``."""
    like = torch.ones(()) if type_as is None else type_as
    return like.new_full((n,), 1 / n)
