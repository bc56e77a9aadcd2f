"""What the start between Gaussians saves: ``python -m benchmarks.start``.

Sweeps of a solve in float64 from 0 and from the potential between the clouds' Gaussians, to a
marginal error of 1e-3, by eps over the standard deviation of the costs. Printed as the table of
``docs/solver-measurements.md`` and kept in ``benchmarks/results/start.json``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import otloss
from benchmarks.alone import markdown, run

EPS = (1.0, 0.3, 0.1, 0.03, 0.01)
CLOUDS = (("two Gaussians", 2), ("two Gaussians", 10), ("a ring and a square", 2),
          ("a ring and a cube", 3))  # fmt: skip
Row = dict[str, str | int | list[tuple[int, int]]]


def clouds(kind: str, d: int, n: int = 600) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(d)

    def randn() -> Tensor:
        return torch.randn(n, d, generator=generator, dtype=torch.float64)

    if kind == "two Gaussians":
        return randn(), 0.7 * randn() + 0.5
    angle = 2 * math.pi * torch.rand(n, generator=generator, dtype=torch.float64)
    x = 0.05 * randn()
    x[:, :2] += torch.stack([angle.cos(), angle.sin()], 1)
    return x, torch.rand(n, d, generator=generator, dtype=torch.float64) + 0.3


def sweeps(x: Tensor, y: Tensor, eps: float) -> tuple[int, int]:
    """From 0, since a matrix tells nothing of points, and from the potential."""
    C = otloss.cost_matrix(x, y)
    cold = otloss.solve(C, eps, max_iters=10_000)
    return cold.n_iters, otloss.solve_sample(x, y, eps, method="dense", max_iters=10_000).n_iters


def measure() -> list[Row]:
    rows: list[Row] = []
    for kind, d in CLOUDS:
        x, y = clouds(kind, d)
        unit = float(otloss.cost_matrix(x, y).std())
        counts = [sweeps(x, y, eps * unit) for eps in EPS]
        rows.append({"clouds": kind, "d": d, "sweeps": counts})
    return rows


def table(rows: list[Row]) -> str:
    head = ["clouds", *(f"{eps:g} sigma" for eps in EPS)]
    lines = []
    for row in rows:
        cells = [f"{cold} / {warm}" for cold, warm in row["sweeps"]]  # type: ignore[union-attr,misc]
        lines.append([f"{row['clouds']}, d = {row['d']}", *cells])
    return markdown(head, lines)


if __name__ == "__main__":
    run("start", __doc__, measure, table)
