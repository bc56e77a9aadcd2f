"""What ``tol`` means for clouds that are close: ``python -m benchmarks.close_clouds``.

The relative error of the divergence's value and of its gradient in x, in float32, against float64
solved to 1e-11, and the sweeps of the problem between x and y. x are 500 points of a standard
Gaussian, y the same points moved by a Gaussian step of ``step`` times the size. Printed as the
table of ``docs/solver.md`` and kept in ``benchmarks/results/close_clouds.json``.
"""

from __future__ import annotations

import torch
from torch import Tensor

import otloss
from benchmarks.alone import markdown, run

TOL = (1e-3, 1e-4, 1e-5, 1e-6)
STEPS = (1.0, 0.1, 0.01, 0.001)
CASES = ((2, 0.2), (2, 2.0), (64, 64.0))  # d, eps
Row = dict[str, float | list[tuple[float, float, int]]]


def solved(x: Tensor, y: Tensor, eps: float, tol: float) -> tuple[float, Tensor]:
    x = x.clone().requires_grad_()
    value = otloss.sinkhorn_divergence(x, y, eps, tol=tol, max_iters=10_000)
    (gradient,) = torch.autograd.grad(value, x)
    return float(value.detach()), gradient.double()


def errors(d: int, eps: float, step: float) -> list[tuple[float, float, int]]:
    generator = torch.Generator().manual_seed(d)
    x = torch.randn(500, d, generator=generator)
    y = x + step * torch.randn(500, d, generator=generator)
    value, gradient = solved(x.double(), y.double(), eps, 1e-11)
    found = []
    for tol in TOL:
        v, g = solved(x, y, eps, tol)
        sweeps = otloss.solve_sample(x, y, eps, tol=tol, max_iters=10_000).n_iters
        off = float((g - gradient).norm() / gradient.norm())
        found.append((abs(v - value) / value, off, sweeps))
    return found


def measure() -> list[Row]:
    return [
        {"d": d, "eps": eps, "step": step, "errors": errors(d, eps, step)}
        for d, eps in CASES
        for step in STEPS
    ]


def table(rows: list[Row]) -> str:
    head = ["d, eps", "step", *(f"tol={tol:g}" for tol in TOL)]
    lines = []
    for row in rows:
        cells = [f"{v:.0e} / {g:.0e}, {n}" for v, g, n in row["errors"]]  # type: ignore[union-attr]
        lines.append([f"{row['d']}, {row['eps']:g}", f"{row['step']:g}", *cells])
    return markdown(head, lines)


if __name__ == "__main__":
    run("close_clouds", __doc__, measure, table)
