"""Sweeps of unbalanced problems: ``python -m benchmarks.unbalanced``.

How many sweeps a solve takes to a marginal error of 1e-6 in float64, by eps and rho over the mean
cost, for totals that agree and totals 1 and 1000. Printed as the table of
``docs/solver-measurements.md`` and kept in ``benchmarks/results/unbalanced.json``.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

import otloss
from benchmarks.alone import markdown, run

EPS = (0.01, 0.1, 1.0)
RHO = (0.001, 0.01, 0.1, 1.0, 10.0, 1e3, 1e6)
CLOUDS = ("overlapping", "outliers")
Row = dict[str, str | float | list[int]]


def clouds(kind: str, n: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = 0.7 * torch.randn(n, 3, generator=generator, dtype=torch.float64) + 0.5
    if kind == "outliers":
        x[:10] += 30
        y[:5] -= 20
    return x, y


def sweeps(C: Tensor, eps: float, rho: float | None, total: float) -> int:
    """-1 where 10 000 are not enough."""
    b = torch.full_like(C[0], total / C.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otloss.ConvergenceWarning)
        result = otloss.solve(C, eps, b=b, unbalanced=rho, tol=1e-6, max_iters=10_000)
    return int(result.n_iters) if result.converged else -1


def measure() -> list[Row]:
    rows: list[Row] = []
    for kind in CLOUDS:
        C = otloss.cost_matrix(*clouds(kind))
        unit = float(C.mean())
        for eps in EPS:
            row: Row = {"clouds": kind, "eps": eps, "balanced": sweeps(C, eps * unit, None, 1.0)}
            for total in (1.0, 1000.0):
                row[f"total {total:g}"] = [sweeps(C, eps * unit, rho * unit, total) for rho in RHO]
            rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """Markdown; the totals 1 and 1000 as "equal / unequal" where they differ."""
    head = ["clouds", "eps", *(f"{rho:g}" for rho in RHO), "balanced"]
    lines = []
    for row in rows:
        pairs = zip(row["total 1"], row["total 1000"], strict=True)  # type: ignore[arg-type]
        cells = [f"{p}" if p == q else f"{p} / {q}" for p, q in pairs]
        lines.append([str(row["clouds"]), f"{row['eps']:g}", *cells, str(row["balanced"])])
    return markdown(head, lines, words=2)


if __name__ == "__main__":
    run("unbalanced", __doc__, measure, table)
