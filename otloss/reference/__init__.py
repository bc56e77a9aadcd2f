"""Every operation in plain torch: slow, obvious, for any device and dtype.

These functions define what the kernels compute. They take the same arguments as the operations in
``otloss/ops.py`` and serve ``method="reference"``, pure-Python installs and the tests.
"""

from __future__ import annotations

from otloss.costs import full_precision, without_padding
from otloss.reference.arguments import as_pairs
from otloss.reference.grid import GRID_OPERATIONS, grid_adjoint, grid_means, grid_solve
from otloss.reference.marginals import damping, marginals_of, plan, share, softmin, value
from otloss.reference.operations import (
    OPERATIONS,
    cost,
    cost_backward,
    envelope_backward,
    implicit_backward,
    plan_product,
    solve,
    unrolled_backward,
)
from otloss.reference.solver import fixed_iterations

__all__ = [
    "GRID_OPERATIONS",
    "OPERATIONS",
    "as_pairs",
    "cost",
    "cost_backward",
    "damping",
    "envelope_backward",
    "fixed_iterations",
    "full_precision",
    "grid_adjoint",
    "grid_means",
    "grid_solve",
    "implicit_backward",
    "marginals_of",
    "plan",
    "plan_product",
    "share",
    "softmin",
    "solve",
    "unrolled_backward",
    "value",
    "without_padding",
]
