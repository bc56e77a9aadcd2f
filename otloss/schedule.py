"""How a problem is solved when the caller leaves it open: with stored cost matrices or without."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

__all__ = ["choose_method", "dense_budget"]

# Cost matrices that together take more bytes than this are not stored. Set it through the
# environment variable or by assignment, `otloss.schedule.dense_budget = 1 << 30`.
dense_budget = int(os.environ.get("OTLOSS_DENSE_BUDGET", 1 << 30))

# Where making a cost again is faster than reading it: up to so many dimensions, and for matrices of
# more than so many bytes. A matrix that stays in the second cache is only slower than that to make.
STREAMED_FROM = {4: 1 << 20, 16: 12 << 20}


def choose_method(
    points: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    itemsize: int,
    *,
    many_passes_back: bool = False,
) -> str:
    """``"dense"`` or ``"streamed"`` for pairs of ``sizes`` (n, m) over ``points`` (B, n, d).

    ``many_passes_back``: whether the gradient will go over the costs again and again, which pays
    for a matrix that fits.
    """
    shape, bytes_of = points[0].shape, [n * m * itemsize for n, m in sizes]
    if sum(bytes_of) * (shape[0] if len(shape) == 3 else 1) > dense_budget:
        return "streamed"
    least = [least for dims, least in STREAMED_FROM.items() if shape[-1] <= dims]
    faster = bool(least) and max(bytes_of) > min(least) and not many_passes_back
    return "streamed" if faster else "dense"
