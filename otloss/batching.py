"""Clouds of different sizes as one batch: points of weight 0 fill them up."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from otloss import _check

__all__ = ["pad", "pad_batch_vector"]


def pad(clouds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A list of clouds as one batch, with weights that are 0 where it was filled up.

    Args:
        clouds: B clouds (n_1, d), ..., (n_B, d).

    Returns:
        ``x`` (B, n, d) with n the largest size, zeros after the points of each cloud,
        differentiable; ``a`` (B, n) with 1 / n_i at the points of cloud i and 0 after them, in
        float32 or float64. For other weights, ``a = a * w`` with the padded ``w``.

    Raises:
        ValueError, TypeError: no clouds, an empty one, or clouds that do not go together.

    Example:
        >>> x, a = otloss.pad([torch.ones(2, 3), torch.ones(4, 3)])
        >>> x.shape, a[0]
        (torch.Size([2, 4, 3]), tensor([0.5000, 0.5000, 0.0000, 0.0000]))
    """
    clouds = list(clouds)
    if not clouds:
        raise ValueError("clouds must hold at least one cloud (n, d), got none")
    names = [f"clouds[{i}]" for i in range(len(clouds))]
    for name, x in zip(names, clouds, strict=True):
        if _check.points(name, x).dim() != 2:
            raise ValueError(f"{name} must have shape (n, d), got {_check.describe(x)}")
        _check.same_space(names[0], clouds[0], name, x)
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in clouds))
    x = nn.utils.rnn.pad_sequence([x.to(dtype) for x in clouds], batch_first=True)
    sizes = torch.tensor([len(cloud) for cloud in clouds], device=x.device).unsqueeze(-1)
    present = torch.arange(x.shape[1], device=x.device) < sizes
    return x, present.to(_check.compute_dtype(x)) / sizes


def pad_batch_vector(x: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Points with the number of their cloud each, PyTorch Geometric's convention, as one batch.

    Args:
        x: all points (N, d).
        batch: for each point the number of its cloud, (N,) of int64, in any order; each of 0 to
            B - 1 occurs.

    Returns:
        ``x`` (B, n, d) and ``a`` (B, n) as :func:`otloss.pad`; the points of a cloud keep their
        order. The result's shape depends on the data, so that a GPU is waited for.

    Raises:
        ValueError, TypeError: a wrong argument, or a number that no point has.

    Example:
        >>> x, a = otloss.pad_batch_vector(torch.rand(6, 3), torch.tensor([0, 0, 1, 1, 1, 1]))
        >>> x.shape, a[0]
        (torch.Size([2, 4, 3]), tensor([0.5000, 0.5000, 0.0000, 0.0000]))
    """
    if _check.points("x", x).dim() != 2:
        raise ValueError(f"x must have shape (N, d), got {_check.describe(x)}")
    if not isinstance(batch, Tensor) or batch.dtype != torch.int64:
        raise TypeError(f"batch must be a tensor of int64, got {_check.describe(batch)}")
    if batch.shape != x.shape[:1]:
        raise ValueError(f"batch must have shape ({len(x)},), got {_check.describe(batch)}")
    _check.same_device("x", x, "batch", batch)
    numbers, sizes = batch.unique(return_counts=True)
    if numbers[0] != 0 or numbers[-1] != len(numbers) - 1:
        raise ValueError(
            f"batch must hold each number from 0 to B - 1, got {len(numbers)} from "
            f"{numbers[0]} to {numbers[-1]}"
        )
    return pad(x[batch.argsort(stable=True)].split(sizes.tolist()))
