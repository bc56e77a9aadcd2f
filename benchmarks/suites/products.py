"""The matrix products of the CPU kernels against torch's (MKL), by size and instruction set.

A cost matrix of squared distances and its gradient in x are timed whole: with the centring, the
formula and the sums that come with the product. torch makes the products alone. An instruction set
is chosen when the library is loaded, so each has a process of its own, in which the kernels and
torch are timed in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.suites import Context, text_table

TITLE = "Matrix products of the kernels against torch's"
ROOT = Path(__file__).resolve().parents[2]
LEVELS = ("avx512", "avx2", "baseline")
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


def worker(repetitions: int, clock: str) -> None:
    timer, rows = timing.Timer(torch.device("cpu"), clock), []
    for n, d in SIZES:
        samples = timing.interleaved(_calls(n, d), repetitions, timer, shortest=5e-3)
        seconds = {name: timing.statistics(each)["q1"] for name, each in samples.items()}
        rows.append({"n": n, "d": d, **seconds})
    print(json.dumps(rows))


def run(context: Context) -> dict[str, Any]:
    found: dict[str, Any] = {}
    threads, options = torch.get_num_threads(), context.options
    for level in LEVELS:
        code = (
            "from benchmarks.suites import products; import torch; "
            f"torch.set_num_threads({threads}); "
            f"products.worker({options.repetitions}, {options.clock!r})"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OTLOSS_SIMD": level},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[level] = json.loads(done.stdout)
    return {"rows": found, "threads": threads}


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
