"""otloss: differentiable optimal-transport losses for PyTorch, with fused C++ and CUDA kernels."""

from otloss import compat, distributed
from otloss._check import ConvergenceWarning
from otloss.barycenter import BarycenterInfo, barycenter, barycenter_grid
from otloss.batching import pad, pad_batch_vector
from otloss.config import show_config
from otloss.cost_matrices import cost_matrix
from otloss.grid import sinkhorn_divergence_grid, solve_grid
from otloss.losses import (
    energy_distance,
    minibatch_energy_distance,
    sinkhorn_divergence,
    sinkhorn_loss,
)
from otloss.modules import (
    EnergyDistance,
    MinibatchEnergyDistance,
    SinkhornDivergence,
    SinkhornLoss,
)
from otloss.progress import progress
from otloss.result import OTResult
from otloss.simple import mmd, sliced_wasserstein, wasserstein_1d
from otloss.solve import solve, solve_sample
from otloss.status import last_status
from otloss.suggest_eps import suggest_eps

__version__ = "0.1.0"

__all__ = [
    "BarycenterInfo",
    "ConvergenceWarning",
    "EnergyDistance",
    "MinibatchEnergyDistance",
    "OTResult",
    "SinkhornDivergence",
    "SinkhornLoss",
    "barycenter",
    "barycenter_grid",
    "compat",
    "cost_matrix",
    "distributed",
    "energy_distance",
    "last_status",
    "minibatch_energy_distance",
    "mmd",
    "pad",
    "pad_batch_vector",
    "progress",
    "show_config",
    "sinkhorn_divergence",
    "sinkhorn_divergence_grid",
    "sinkhorn_loss",
    "sliced_wasserstein",
    "solve",
    "solve_grid",
    "solve_sample",
    "suggest_eps",
    "wasserstein_1d",
]
