"""How a problem is solved when the caller leaves it open: with stored cost matrices or without."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

__all__ = ["choose_method", "dense_budget"]

# Cost matrices that together take more bytes than this are not stored. Set it through the
# environment variable or by assignment, `otloss.schedule.dense_budget = 1 << 30`.
dense_budget = int(os.environ.get("OTLOSS_DENSE_BUDGET", 1 << 30))

# Above this dimension making a cost again takes longer than reading it: what fits is kept.
STREAMED_DIMS = 8

# Below this many bytes a stored matrix stays near and is faster whatever the dimension.
CACHED_BYTES = 1 << 22


def choose_method(points: Sequence[Tensor], sizes: Sequence[tuple[int, int]], itemsize: int) -> str:
    """``"dense"`` or ``"streamed"`` for pairs of ``sizes`` (n, m) over ``points`` (B, n, d)."""
    shape, bytes_of = points[0].shape, [n * m * itemsize for n, m in sizes]
    if sum(bytes_of) * (shape[0] if len(shape) == 3 else 1) > dense_budget:
        return "streamed"
    return "streamed" if shape[-1] <= STREAMED_DIMS and max(bytes_of) > CACHED_BYTES else "dense"
