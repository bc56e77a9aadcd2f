"""How the last loss or solve converged, for callers that get a tensor and no result."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from otloss import _check, ops
from otloss._options import Options

__all__ = ["Status", "last_status", "max_cost", "record", "rows_of", "warn_not_converged", "worst"]


class Status(NamedTuple):
    """How a call converged: the worst of its problems."""

    n_iters: int
    marginal_error: float
    converged: bool


class _Last:
    status: Tensor | None = None  # (P, B, 5) as in otloss.ops


_last = _Last()


def record(status: Tensor) -> None:
    """Keeps the status of a call; reads nothing, so that it neither stalls a device nor breaks a
    traced graph."""
    # An exported graph has no side effects. torch 2.10 says of all compiled code that it
    # is_exporting().
    if not torch.compiler._is_exporting_flag:
        _last.status = status


def last_status() -> Status:
    """How the last loss or solve of this process converged: ``n_iters``, ``marginal_error`` and
    ``converged`` of the worst of its problems, as a named tuple.

    On CUDA, and after a compiled call, no :class:`otloss.ConvergenceWarning` is given, since that
    would wait for the device. This function reads the status, and waits, when it is called.
    ``energy_distance``, which solves nothing, does not change it.

    Raises:
        RuntimeError: nothing has been solved yet.

    Example:
        >>> loss = otloss.sinkhorn_divergence(torch.rand(20, 2), torch.rand(30, 2), eps=0.1)
        >>> otloss.last_status().converged
        True
    """
    if _last.status is None:
        raise RuntimeError("last_status() needs a solve before it: none has run in this process")
    return worst(rows_of(_last.status))


def rows_of(status: Tensor) -> list[list[float]]:
    """The fields of every problem's status, from (P, B, 5). Waits for its device."""
    return [row for rows in status.tolist() for row in rows]


def worst(rows: list[list[float]]) -> Status:
    row = max(rows, key=lambda row: (not row[ops.CONVERGED], _or_infinite(row[ops.ERROR])))
    return Status(int(row[ops.ITERATIONS]), row[ops.ERROR], bool(row[ops.CONVERGED]))


def max_cost(rows: list[list[float]]) -> float:
    """The largest cost of a call, infinite where one is not finite."""
    costs = [row[ops.MAX_COST] for row in rows]
    return max([cost if cost >= 0 else math.inf for cost in costs])


def warn_not_converged(options: Options, rows: list[list[float]], dtype: torch.dtype) -> None:
    """Warns if a solve that was to converge did not."""
    if options.n_iters < 0 and not all(row[ops.CONVERGED] for row in rows):
        found = worst(rows)
        if isinstance(options.eps, Tensor):
            options = options._replace(eps=options.eps.detach().amin().item())
        _check.not_converged(options, found.n_iters, found.marginal_error, max_cost(rows), dtype)


def _or_infinite(value: float) -> float:
    return value if value >= 0 else math.inf
