"""The matrix products of the CPU kernels against torch's (MKL), by size and instruction set.

A cost matrix of squared distances and its gradient in x are timed whole: with the centring, the
formula and the sums that come with the product. torch makes the products alone. An instruction set
is chosen when the library is loaded, so each has a process of its own, in which the kernels and
torch are timed in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import timing
from benchmarks.levels import LEVELS, at_each_level
from benchmarks.suites import Context, text_table

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
    """By size: torch's time over the kernels', for the cost and for the gradient, of each level."""
    found: dict[tuple[int, int], dict[str, list[float]]] = {}
    for level, rows in result["rows"].items():
        for row in rows:
            both = [row[f"torch {part}"] / row[part] for part in PARTS]
            found.setdefault((row["n"], row["d"]), {})[level] = both
    return found


def table(result: dict[str, Any]) -> str:
    rates = {(row["n"], row["d"]): row for row in result["rows"][LEVELS[0]]}
    rows = []
    for (n, d), of_level in ratios(result).items():
        gflops = [2e-9 * n * n * d / rates[n, d][part] for part in PARTS]
        cells = [" / ".join(f"{ratio:.2f}" for ratio in of_level[level]) for level in LEVELS]
        rows.append([f"{n}", f"{d}", " / ".join(f"{rate:.0f}" for rate in gflops), *cells])
    return text_table(["n = m", "d", f"GFLOP/s, {LEVELS[0]}", *LEVELS], rows)


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
