"""Cost matrices of points: squared distances and their gradient, against torch's own ways.

Rates count the products alone, 2 n m d operations forward and as many for the gradient of x, so
that all are measured by the same work; ``torch.mm`` is the product without the formula.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks import timing
from benchmarks.suites import Context, text_table

TITLE = "Cost matrices: squared distances and the gradient of one cloud"
SIZES = ((200, 784), (500, 784), (1000, 512), (1000, 64), (2000, 64), (2000, 3))

Cost = Callable[[Tensor, Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def expanded(x: Tensor, y: Tensor) -> Tensor:
    norms = (x * x).sum(1, True) + (y * y).sum(1)
    return torch.addmm(norms, x, y.T, alpha=-2).clamp_min_(0)


COSTS: dict[str, Cost] = {
    "otloss": otloss.cost_matrix,
    "torch, |x|^2 + |y|^2 - 2 xy": expanded,
    "torch.cdist squared": lambda x, y: torch.cdist(x, y).square(),
    "torch.mm": lambda x, y: x @ y.T,
}


def _calls(x: Tensor, y: Tensor, weights: Tensor) -> dict[str, Callable[[], Any]]:
    """Forward, and forward with the gradient, of each contestant."""
    calls: dict[str, Callable[[], Any]] = {}
    moving = x.clone().requires_grad_()

    def forward(cost: Cost) -> Callable[[], Any]:
        return lambda: cost(x, y)

    def gradient(cost: Cost) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(cost(moving, y), moving, weights)

    for name, cost in COSTS.items():
        calls[f"{name}/forward"] = forward(cost)
        calls[f"{name}/gradient"] = gradient(cost)
    return calls


def run(context: Context) -> dict[str, Any]:
    rows = []
    for n, d in SIZES:
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.rand(n, d, generator=generator).to(context.device) for _ in range(2))
        weights = torch.rand(n, n, generator=generator).to(context.device)
        calls = _calls(x, y, weights)
        samples = timing.interleaved(calls, 2 * context.options.repetitions, context.timer)
        for name in COSTS:
            parts = ("forward", "gradient")
            times = {part: timing.statistics(samples[f"{name}/{part}"]) for part in parts}
            rows.append({"n": n, "d": d, "cost": name, **times})
    return {"rows": rows}


def rate(row: dict[str, Any], part: str) -> float:
    """GFLOP/s of the products."""
    operations = 2 * row["n"] ** 2 * row["d"] * (2 if part == "gradient" else 1)
    return operations / row[part]["median"] / 1e9


def table(result: dict[str, Any]) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        times = [
            f"{1e3 * row[part]['median']:.2f} ms, {rate(row, part):.0f} GFLOP/s"
            for part in ("forward", "gradient")
        ]
        return [f"n = {row['n']}, d = {row['d']}", row["cost"], *times]

    return text_table(["", "cost", "forward", "with gradient"], map(cells, result["rows"]))


def figure(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7.4, 3.6), layout="constrained")
    axes = fig.subplots()
    width = 0.8 / len(COSTS)
    for k, name in enumerate(COSTS):
        rates = [rate(row, "forward") for row in result["rows"] if row["cost"] == name]
        axes.bar([i + (k - 1.5) * width for i in range(len(rates))], rates, width, label=name)
    axes.set_xticks(range(len(SIZES)), [f"n={n}\nd={d}" for n, d in SIZES])
    axes.set(ylabel="GFLOP/s of the product")
    axes.legend()
    return fig
