"""Accuracy of the CUDA engine's ways to make costs: ``python -m benchmarks.precision``.

Errors of ``sinkhorn_loss`` and its gradient against float64, for the streamed solve with costs by
multiply-adds, by tensor cores from points split into two halves, and from the high halves alone
(11 bits, as TF32). **Emulated on the host, not run on a GPU:** the kernels run under
``tests/cuda_host/emulation.h``, where half precision is rounded as the hardware rounds it and each
sum of the tensor cores is truncated once. Printed as the table of ``docs/gpu.md`` and kept in
``benchmarks/results/precision.json``. It needs g++ and the packages of the tests.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import otloss
from benchmarks.alone import markdown, run
from benchmarks.environment import ROOT
from benchmarks.workloads import WORKLOADS, Problem, make
from otloss.costs import COSTS

sys.path.insert(0, str(ROOT / "tests"))
from test_cuda_host import Cloud, Engine, compiled

TILES = {"multiply-adds": "fma", "three products": "tensor", "one product": "high"}
CASES = (
    ("random_images", 100.0),
    ("random_images", 10.0),
    ("perturbed_digits", 10.0),
    ("perturbed_digits_euclidean", 1.0),
    ("gaussians_64d", 5.0),
    ("cosine_features", 0.02),
)
POINTS = 64
Row = dict[str, object]


def truth(problem: Problem) -> tuple[float, Tensor]:
    """Value and gradient of x in float64."""
    p = problem.to(torch.float64)
    x = p.x.requires_grad_()
    call = {"a": p.a / p.a.sum(), "b": p.b / p.b.sum(), "cost": p.cost}
    value = otloss.sinkhorn_loss(x, p.y, p.eps, tol=1e-8, max_iters=20_000, **call)
    value.backward()
    assert x.grad is not None
    return value.item(), x.grad


def found(engine: Engine, problem: Problem, tiles: str) -> tuple[float, Tensor]:
    """The same from the emulated kernels in float32."""
    os.environ["OTLOSS_CUDA_TILES"] = tiles
    kind = list(COSTS).index(problem.cost)
    cloud = Cloud([problem.x[None], problem.y[None]], kind)
    weights = (problem.a[None], problem.b[None])
    value, _, f, g, _ = engine.solve(cloud, list(weights), [0, 1], problem.eps, tol=1e-6)
    row_sum, product = engine.point_sums(
        cloud, (0, 1), weights, (f[0], g[0]), torch.ones(1), problem.eps, coefficient=1.0
    )
    z = cloud.z[0]
    grad = z * row_sum[..., None] - product
    if problem.cost == "cosine":
        grad = ((z * product).sum(-1, True) * z - product) / cloud.norm[0][..., None]
    return float(value[0, 0]), grad[0]


def errors(engine: Engine, problem: Problem) -> dict[str, tuple[float, float]]:
    """Of the value, and of the gradient in its norm, both relative, by the way to make costs."""
    true_value, true_grad = truth(problem)
    results = {}
    for title, tiles in TILES.items():
        value, grad = found(engine, problem, tiles)
        of_grad = float((grad - true_grad).norm() / true_grad.norm())
        results[title] = abs(value / true_value - 1), of_grad
    return results


def measure(cases: tuple[tuple[str, float], ...] = CASES, n: int = POINTS) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(compiled(Path(folder) / "engine.so"))
        engine.configure()
        for name, eps in cases:
            problem = make(name, n, eps)
            described = {"workload": WORKLOADS[name].title, "eps": eps, "data": problem.data}
            rows.append(described | errors(engine, problem))
    return rows


def table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        cells = ["{:.1e} / {:.1e}".format(*row[title]) for title in TILES]  # type: ignore[misc]
        title = str(row["workload"]).replace("|", r"\|")
        lines.append([f"{title}, {row['eps']:g}", *cells])
    return markdown(["workload, eps", *TILES], lines)


if __name__ == "__main__":
    run("precision", __doc__, measure, table)
