"""OTT-JAX ``sinkhorn_divergence`` on point clouds, compiled by ``jax.jit``.

Its ``reg_ot_cost`` is OT_eps and its costs have no 1/2, so nothing is converted. It tests the L1
marginal error every ``inner_iterations``; self problems are iterated symmetrically. The threshold
is an argument of the compiled function, so that a ladder compiles once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from benchmarks.peers import TOLERANCES, ValueAndGradient, Variant, importable, storable
from benchmarks.workloads import Problem

TEST_EVERY = (10, 1)  # iterations; OTT's default first
MAX_ITERS = 20_000
ROWS = 1024  # of the cost at a time, where it is too large to store


def available() -> tuple[bool, str]:
    return importable("ott")


def version() -> str:
    import jax
    import ott

    return f"{ott.__version__}, jax {jax.__version__}"


@cache
def _compiled(cost: str, eps: float, every: int, rows: int | None) -> Callable[..., Any]:
    """(x, y, a, b, threshold) -> ((value, iterations), gradient)."""
    import jax
    from ott.geometry import costs, pointcloud
    from ott.tools import sinkhorn_divergence as tools

    functions = {
        "sqeuclidean": costs.SqEuclidean,
        "euclidean": costs.Euclidean,
        "cosine": costs.Cosine,
    }

    def loss(x: Any, y: Any, a: Any, b: Any, threshold: Any) -> tuple[Any, Any]:
        value, details = tools.sinkhorn_divergence(
            pointcloud.PointCloud,
            x,
            y,
            cost_fn=functions[cost](),
            epsilon=eps,
            a=a,
            b=b,
            batch_size=rows,
            solve_kwargs={
                "threshold": threshold,
                "max_iterations": MAX_ITERS,
                "inner_iterations": every,
            },
        )
        return value, details.n_iters[0]

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _run(problem: Problem, every: int, threshold: float) -> tuple[Any, Any]:
    import jax

    rows = None if storable(problem) else ROWS
    function = _compiled(problem.cost, problem.eps, every, rows)
    data = (jax.numpy.asarray(t.numpy()) for t in (problem.x, problem.y, problem.a, problem.b))
    return jax.block_until_ready(function(*data, threshold))


def _divergence(problem: Problem, every: int, threshold: float) -> ValueAndGradient:
    (value, _), gradient = _run(problem, every, threshold)
    # Arrays of jax are read-only, which torch warns about.
    return torch.tensor(value.item()), torch.tensor(gradient.__array__())


def divergence(problem: Problem) -> list[Variant]:
    if problem.x.is_cuda:
        return []

    def at(every: int, threshold: float) -> Variant:
        return Variant(
            f"threshold={threshold:.2g}, tested every {every}",
            partial(_divergence, problem, every, threshold),
            f"tested every {every}",
            lambda: 2 * int(_run(problem, every, threshold)[0][1]),
        )

    return [at(every, threshold) for every in TEST_EVERY for threshold in TOLERANCES]
