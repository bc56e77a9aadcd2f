"""What POT's calls share: arguments, tolerances, potentials in its units."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from otloss._check import ConvergenceWarning
from otloss.costs import COSTS, Cost
from otloss.result import OTResult

__all__ = ["as_cost", "potentials", "refuse", "tolerance", "warnings_if", "weights_of"]

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
