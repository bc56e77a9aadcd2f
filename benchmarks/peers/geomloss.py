"""GeomLoss ``SamplesLoss("sinkhorn")``: tensorized, and on KeOps "online" and "multiscale".

It takes C = |x-y|^2 / 2 and eps = blur^2 (p=2), or C = |x-y| and eps = blur (p=1). Halving the
cost and eps halves the divergence, so S at eps is 2 SamplesLoss(blur=sqrt(eps/2)). It anneals
eps from diameter^p by steps of scaling^p and never tests convergence: `scaling` sets accuracy.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import STEP, ValueAndGradient, Variant, importable, storable
from benchmarks.reference import cost_matrix
from benchmarks.workloads import Problem

# scaling = 4^(-1 / STEP^k): the number of values of eps grows by STEP from one to the next.
SCALINGS = tuple(0.25 ** (STEP**-k) for k in range(44))
# KeOps sums the dimensions one by one, and multiscale clusters on a grid.
MOST_DIMENSIONS = {"online": 64, "multiscale": 3}
# The largest cosine distance, where GeomLoss would take the diameter of the cloud.
COSINE_DIAMETER = 2.0


def available() -> tuple[bool, str]:
    return importable("geomloss")


def version() -> str:
    import geomloss

    return geomloss.__version__


def _convention(problem: Problem) -> tuple[dict[str, Any], float]:
    """SamplesLoss's arguments for this cost and eps, and the factor from its value to S."""
    if problem.cost == "sqeuclidean":
        return {"p": 2, "blur": math.sqrt(problem.eps / 2)}, 2.0
    if problem.cost == "euclidean":
        return {"p": 1, "blur": problem.eps}, 1.0
    cost = partial(cost_matrix, cost=problem.cost)
    return {"p": 1, "blur": problem.eps, "cost": cost, "diameter": COSINE_DIAMETER}, 1.0


def _module(problem: Problem, **options: Any) -> tuple[torch.nn.Module, float]:
    import geomloss

    convention, factor = _convention(problem)
    options = {"backend": "tensorized", **convention, **options}
    return geomloss.SamplesLoss("sinkhorn", **options), factor


def _value_and_gradient(
    problem: Problem, module: torch.nn.Module, factor: float
) -> ValueAndGradient:
    x = problem.x.detach().requires_grad_()
    if problem.uniform:
        value = factor * module(x, problem.y)
    else:
        value = factor * module(problem.a, x, problem.b, problem.y)
    return value.detach(), torch.autograd.grad(value, x)[0]


def _diameter(x: Tensor, y: Tensor) -> float:
    """The diagonal of the bounding box, as GeomLoss estimates it."""
    points = torch.cat([x, y])
    return (points.amax(0) - points.amin(0)).norm().item()


def overhead(problem: Problem, n_iters: int) -> list[Variant]:
    """Exactly ``n_iters`` values of eps: diameter^p, then ceil(log ratio / log scaling), then eps.

    The diameter is given, which spares GeomLoss its estimate in every call.
    """
    convention, _ = _convention(problem)
    diameter = _diameter(problem.x, problem.y)
    scaling = (convention["blur"] / diameter) ** (1 / (n_iters - 2.5))
    calls = _module(problem, diameter=diameter, scaling=scaling)
    return [Variant("GeomLoss SamplesLoss", partial(_value_and_gradient, problem, *calls))]


def _passes(problem: Problem, scaling: float) -> int:
    """Two for each value of eps, for the start and for the last extrapolation."""
    convention, _ = _convention(problem)
    diameter = convention.get("diameter") or _diameter(problem.x, problem.y)
    steps = math.ceil(math.log(convention["blur"] / diameter) / math.log(scaling))
    return 2 * (max(steps, 0) + 4)


def _backends(problem: Problem) -> list[str]:
    d = problem.x.shape[1]
    keops = importable("pykeops")[0] and problem.cost != "cosine"
    found = ["tensorized"] if storable(problem) else []
    return found + [name for name, most in MOST_DIMENSIONS.items() if keops and d <= most]


def divergence(problem: Problem) -> list[Variant]:
    def at(backend: str, scaling: float) -> Variant:
        module = _module(problem, backend=backend, scaling=scaling)
        call = partial(_value_and_gradient, problem, *module)
        return Variant(
            f"{backend}, scaling={scaling:.3f}", call, backend, lambda: _passes(problem, scaling)
        )

    return [at(backend, scaling) for backend in _backends(problem) for scaling in SCALINGS]
