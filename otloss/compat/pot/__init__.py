"""POT's entropic solvers, for torch tensors: ``import otloss.compat.pot as ot``.

All solve the same problems as :func:`otloss.solve`; they differ in what they return. Their
potentials are in units of ``reg`` and hold the weights: ``plan = exp(u_i + v_j - M_ij / reg)`` with
``u = f / reg + log a`` and ``v = g / reg + log b``.
"""

from typing import Any

from otloss.compat.pot import sinkhorns as bregman
from otloss.compat.pot.common import dist, unif
from otloss.compat.pot.sinkhorns import (
    empirical_sinkhorn,
    empirical_sinkhorn2,
    empirical_sinkhorn_divergence,
    sinkhorn,
    sinkhorn2,
)
from otloss.compat.pot.solvers import OTResult, solve, solve_batch, solve_sample

__all__ = [
    "OTResult",
    "bregman",
    "dist",
    "empirical_sinkhorn",
    "empirical_sinkhorn2",
    "empirical_sinkhorn_divergence",
    "sinkhorn",
    "sinkhorn2",
    "solve",
    "solve_batch",
    "solve_sample",
    "unif",
]


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"ot.{name} has no counterpart in otloss.compat.pot, which has {', '.join(__all__)}: take "
        "it from POT itself"
    )
