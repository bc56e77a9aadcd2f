"""How a problem is solved when the caller leaves it open: with stored cost matrices or without."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["budget", "choose_method", "dense_budget"]

# Cost matrices that together take more bytes than this are not stored; on a GPU, where it is left
# at this default, more than CUDA_SHARE of the memory. Set it through the environment variable or by
# assignment, `otloss.schedule.dense_budget = 1 << 30`.
DEFAULT_BUDGET = 1 << 30
dense_budget = int(os.environ.get("OTLOSS_DENSE_BUDGET", DEFAULT_BUDGET))
CUDA_SHARE = 0.25

# Rows of a plan that a streamed result makes at once take so many bytes or more, and some ten times
# that on the way. glibc gives pieces of this size back to the system; smaller ones splinter its
# heap.
BLOCK_BYTES = 1 << 25

# Where making a cost again is faster than reading it, on each kind of device: up to so many
# dimensions, and for matrices of more than so many bytes. A matrix that stays in the second cache
# (in the multiprocessors) is only slower than that to make.
STREAMED_FROM = {"cpu": {4: 1 << 20, 8: 12 << 20}, "cuda": {3: 1 << 25}}
# The same where the gradient goes over the costs again and again, which pays for making a matrix
# until it is too large for the third cache. (A GPU makes each entry twice in a pass.)
STREAMED_BACK_FROM = {"cpu": {4: 12 << 20, 8: 32 << 20}, "cuda": {}}


def choose_method(
    points: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    itemsize: int,
    *,
    many_passes_back: bool = False,
) -> str:
    """``"dense"`` or ``"streamed"`` for pairs of ``sizes`` (n, m) over ``points`` (B, n, d).

    ``many_passes_back``: whether the gradient will go over the costs again and again.
    """
    shape, device = points[0].shape, points[0].device
    if device.type == "cuda":
        forced = os.environ.get("OTLOSS_CUDA_REGIME") or "auto"
        if forced != "auto":
            return "streamed" if forced == "streamed" else "dense"
    bytes_of = [n * m * itemsize for n, m in sizes]
    total = sum(bytes_of) * (shape[0] if len(shape) == 3 else 1)
    if total > dense_budget and total > budget(device):  # the device is only asked if need be
        return "streamed"
    table = STREAMED_BACK_FROM if many_passes_back else STREAMED_FROM
    least = [least for dims, least in table[device.type].items() if shape[-1] <= dims]
    return "streamed" if least and max(bytes_of) > min(least) else "dense"


def budget(device: torch.device) -> int:
    """Bytes that the cost matrices of a call may take together."""
    if device.type == "cuda" and dense_budget == DEFAULT_BUDGET:
        return int(CUDA_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return dense_budget
