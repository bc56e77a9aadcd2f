"""The matrix products of the CPU kernels against torch's (MKL), by size and instruction set.

A cost matrix of squared distances and its gradient in x are timed whole: with the centring, the
formula and the sums that come with the product. torch makes the products alone, and then all of the
matrix and of the gradient around them, which is what calling its product would come to. An
instruction set is chosen when the library is loaded, so each has a process of its own, in which the
kernels and torch are timed in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timing
from benchmarks.levels import LEVELS, at_each_level
from benchmarks.suites import Context, text_table
from benchmarks.suites.costs import expanded

TITLE = "Matrix products of the kernels against torch's"
SIZES = [(n, d) for n in (64, 200, 1000) for d in (16, 64, 784, 3072)]
PARTS = ("cost", "gradient")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def _calls(n: int, d: int) -> dict[str, Callable[[], Any]]:
    from otloss import ops

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, n, d, generator=generator) for _ in range(2))
    V = torch.rand(1, n, n, generator=generator)
    C = ops.cost([x, y], [], [0, 1], 0)
    return {
        "cost": lambda: ops.cost([x, y], [], [0, 1], 0),
        "gradient": lambda: ops.cost_backward([V], C, [x, y], [], [0, 1], 0, [0]),
        "torch cost": lambda: x[0] @ y[0].T,
        "torch gradient": lambda: V[0] @ y[0],
        "whole cost": lambda: expanded(x[0], y[0]),
        "whole gradient": lambda: 2 * (V[0].sum(1, True) * x[0] - V[0] @ y[0]),
    }


def worker(repetitions: int, clock: str) -> list[dict[str, Any]]:
    timer, rows = timing.Timer(torch.device("cpu"), clock), []
    for n, d in SIZES:
        samples = timing.interleaved(_calls(n, d), repetitions, timer, shortest=5e-3)
        seconds = {name: timing.statistics(each)["q1"] for name, each in samples.items()}
        rows.append({"n": n, "d": d, **seconds})
    return rows


def run(context: Context) -> dict[str, Any]:
    options = context.options
    rows = at_each_level(__name__, options.repetitions, options.clock)
    return {"rows": rows, "threads": torch.get_num_threads()}


def ratios(result: dict[str, Any]) -> dict[tuple[int, int], dict[str, list[float]]]:
    """By size: torch's time over the kernels', for the cost and for the gradient. Of all that torch
    would do, and of its product alone at each level."""
    found: dict[tuple[int, int], dict[str, list[float]]] = {}
    for level, rows in result["rows"].items():
        for row in rows:
            of_size = found.setdefault((row["n"], row["d"]), {})
            if level == LEVELS[0]:
                of_size["whole"] = [row[f"whole {part}"] / row[part] for part in PARTS]
            of_size[level] = [row[f"torch {part}"] / row[part] for part in PARTS]
    return found


def rates(result: dict[str, Any], n: int, d: int) -> list[float]:
    """GFLOP/s of the products in the cost and in the gradient, at the highest level."""
    (row,) = (row for row in result["rows"][LEVELS[0]] if (row["n"], row["d"]) == (n, d))
    return [2e-9 * n * n * d / row[part] for part in PARTS]


def cells(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            f"{n}, {d}",
            " / ".join(f"{rate:.0f}" for rate in rates(result, n, d)),
            *(" / ".join(f"{ratio:.2f}" for ratio in both) for both in found.values()),
        ]
        for (n, d), found in ratios(result).items()
    ]


def table(result: dict[str, Any]) -> str:
    header = ["n, d", f"GFLOP/s, {LEVELS[0]}", "torch's whole", *(f"mm, {x}" for x in LEVELS)]
    return text_table(header, cells(result))


def figure(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7.4, 3.6), layout="constrained")
    axes = fig.subplots()
    found = ratios(result)
    for level in LEVELS:
        axes.plot([of_level[level][0] for of_level in found.values()], "o-", label=level)
    axes.set_xticks(range(len(found)), [f"{n}\n{d}" for n, d in found], fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="torch's time over the kernel's", xlabel="n = m, d", ylim=(0, None))
    axes.legend()
    return fig
