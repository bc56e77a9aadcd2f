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

import torch
from torch import Tensor

import otloss
from benchmarks.alone import markdown, run
from benchmarks.environment import ROOT
from benchmarks.workloads import WORKLOADS, Problem, make

sys.path.insert(0, str(ROOT / "tests"))
from backends import emulated, serving

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


def solved(problem: Problem, **options: object) -> tuple[float, Tensor]:
    """Value and gradient of x."""
    x = problem.x.clone().requires_grad_()
    call = {"a": problem.a, "b": problem.b, "cost": problem.cost, "max_iters": 20_000, **options}
    value = otloss.sinkhorn_loss(x, problem.y, problem.eps, **call)
    (grad,) = torch.autograd.grad(value, x)
    return value.item(), grad


def errors(problem: Problem) -> dict[str, tuple[float, float]]:
    """Of the value, and of the gradient in its norm, both relative, by the way to make costs."""
    exact = problem.to(torch.float64)
    weights = {"a": exact.a / exact.a.sum(), "b": exact.b / exact.b.sum()}
    true_value, true_grad = solved(exact, tol=1e-8, **weights)
    results = {}
    for title, tiles in TILES.items():
        os.environ["OTLOSS_CUDA_TILES"] = tiles
        with serving(emulated()):
            value, grad = solved(problem, tol=1e-6, method="streamed")
        of_grad = float((grad - true_grad).norm() / true_grad.norm())
        results[title] = abs(value / true_value - 1), of_grad
    return results


def measure(cases: tuple[tuple[str, float], ...] = CASES, n: int = POINTS) -> list[Row]:
    rows: list[Row] = []
    for name, eps in cases:
        problem = make(name, n, eps)
        described = {"workload": WORKLOADS[name].title, "eps": eps, "data": problem.data}
        rows.append(described | errors(problem))
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
