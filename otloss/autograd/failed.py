"""Gradients of solves that failed: NaN, whatever the kernels make of potentials that are NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from otloss import _check
from otloss.autograd.settings import Settings, Wanted

__all__ = ["failed", "marked"]


def failed(s: Settings, loss: Tensor, dtype: torch.dtype) -> Tensor | None:
    """NaN where a solve failed, else 0, (B,); None where data is read: there a failure raises."""
    if _check.readable(loss):
        return None
    loss = loss.detach()
    return (0 * (loss.reshape(-1) if s.combined else loss.sum(0))).to(dtype)


def marked(
    mark: Tensor,
    weights: Sequence[Tensor],
    wanted: Wanted,
    of_costs: Sequence[Tensor],
    of_points: Sequence[Tensor],
    of_weights: Sequence[Tensor | None],
) -> tuple[Sequence[Tensor], Sequence[Tensor], list[Tensor | None]]:
    """NaN where a problem failed, but not for padding; ``mark`` (B,) is NaN there, else 0."""
    costs = [grad + mark[:, None, None] for grad in of_costs]
    points = [
        torch.where(weights[c].unsqueeze(-1) > 0, grad + mark[:, None, None], 0.0)
        for c, grad in zip(wanted.points, of_points, strict=True)
    ]
    marked = [
        None if grad is None else torch.where((w > 0) | (grad != 0), grad + mark[:, None], 0.0)
        for w, grad in zip(weights, of_weights, strict=True)
    ]
    return costs, points, marked
