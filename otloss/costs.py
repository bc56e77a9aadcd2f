"""The costs by name. A new one is an entry here, a functor in csrc/core/costs.h and a reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from torch import Tensor

__all__ = ["COSTS", "Cost"]

# A cost is a name below or a function (x, y) -> C with x (n, d), y (m, d), C (n, m), batched where
# x and y are.
Cost = str | Callable[[Tensor, Tensor], Tensor]

# Name -> number of the functor, as `CostKind` in csrc/core/costs.h.
COSTS: Final[dict[str, int]] = {"sqeuclidean": 0, "euclidean": 1, "cosine": 2}
