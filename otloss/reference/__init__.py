"""Every operation in plain torch: slow, obvious, for any device and dtype.

These functions define what the kernels compute. They take the same arguments as the operations in
``otloss/ops.py`` and serve ``method="reference"``, pure-Python installs and the tests.
"""

from __future__ import annotations

from otloss.reference.grid import GRID_OPERATIONS, grid_adjoint, grid_means, grid_solve
from otloss.reference.operations import (
    OPERATIONS,
    cost,
    cost_backward,
    envelope_backward,
    extend,
    implicit_backward,
    plan_gap,
    plan_product,
    solve,
    unrolled_backward,
)
from otloss.reference.solver import fixed_iterations

__all__ = [
    "GRID_OPERATIONS",
    "OPERATIONS",
    "cost",
    "cost_backward",
    "envelope_backward",
    "extend",
    "fixed_iterations",
    "grid_adjoint",
    "grid_means",
    "grid_solve",
    "implicit_backward",
    "plan_gap",
    "plan_product",
    "solve",
    "unrolled_backward",
]
