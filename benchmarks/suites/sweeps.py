"""A sweep by what may slow it down: odd numbers of columns, narrow vectors, denormal numbers.

Nanoseconds per entry of rows rounded up to whole vectors, from the time of 60 iterations less that
of 10. Costs are given, as a matrix whose rows start anywhere, or made from points, where each row
starts on a cache line. Denormal numbers: the time of a solve of points in 3-D at a small eps, as it
is over that where torch flushes them to 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import timing
from benchmarks.levels import LEVELS, at_each_level
from benchmarks.suites import Context, text_table

TITLE = "A sweep by the number of columns, the instruction set and denormal numbers"
COLUMNS = (193, 200, 208, 250, 256, 500, 512, 1000, 1008)  # and what they round up to
VECTOR, ROWS, COORDINATES = 16, 256, 32
COUNTS = (10, 60)
FLUSHED = {"sinkhorn_loss": 2500, "solve_sample": 5000}  # points


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def padded(m: int) -> int:
    return -(-m // VECTOR) * VECTOR


def _iterations(m: int) -> dict[str, Callable[[int], Any]]:
    """By where the costs come from: a number of iterations."""
    import otloss

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, COORDINATES, generator=generator) for n in (ROWS, m))
    C, eps = otloss.cost_matrix(x, y), 20.0
    return {
        "given": lambda k: otloss.solve(C, eps, n_iters=k),
        "made": lambda k: otloss.solve_sample(x, y, eps, n_iters=k, method="dense"),
    }


def worker(repetitions: int, clock: str) -> list[dict[str, Any]]:
    timer = timing.Timer(torch.device("cpu"), clock)
    calls: dict[tuple[int, str, int], timing.Call] = {
        (m, costs, k): partial(run, k)
        for m in COLUMNS
        for costs, run in _iterations(m).items()
        for k in COUNTS
    }
    with torch.no_grad():
        samples = timing.interleaved(calls, repetitions, timer)
    rows = []
    for m, costs in dict.fromkeys(key[:2] for key in calls):
        few, many = (samples[m, costs, k] for k in COUNTS)
        seconds = timing.statistics(many)["q1"] - timing.statistics(few)["q1"]
        nanoseconds = 1e9 * seconds / (COUNTS[1] - COUNTS[0]) / (ROWS * padded(m))
        rows.append({"m": m, "costs": costs, "ns_per_entry": nanoseconds})
    return rows


def _denormals(repetitions: int, timer: timing.Timer) -> list[dict[str, Any]]:
    import otloss

    def call(name: str, n: int, flush: bool) -> None:
        torch.set_flush_denormal(flush)
        x, y = points[n]
        getattr(otloss, name)(x, y, 2e-3, method="streamed", max_iters=20)
        torch.set_flush_denormal(False)

    generator = torch.Generator().manual_seed(0)
    points = {n: torch.rand(2, n, 3, generator=generator) for n in FLUSHED.values()}
    calls: dict[tuple[str, bool], timing.Call] = {
        (name, flush): partial(call, name, n, flush)
        for name, n in FLUSHED.items()
        for flush in (False, True)
    }
    samples = timing.interleaved(calls, repetitions, timer)
    quartiles = {key: timing.statistics(each)["q1"] for key, each in samples.items()}
    return [
        {"call": name, "n": n, "over_flushed": quartiles[name, False] / quartiles[name, True]}
        for name, n in FLUSHED.items()
    ]


def run(context: Context) -> dict[str, Any]:
    options = context.options
    rows = at_each_level(__name__, options.repetitions, options.clock)
    return {"rows": rows, "denormals": _denormals(max(3, options.repetitions // 3), context.timer)}


def cells(result: dict[str, Any]) -> list[list[str]]:
    """By the number of columns: the entry's time with costs from points and with given ones, each
    over that of the rounded number, and from points with narrower vectors."""
    ns = {
        (level, row["m"], row["costs"]): row["ns_per_entry"]
        for level, rows in result["rows"].items()
        for row in rows
    }

    def against_whole(m: int, costs: str) -> str:
        time, whole = (ns[LEVELS[0], columns, costs] for columns in (m, padded(m)))
        return f"{time:.2f}" if padded(m) == m else f"{time:.2f} ({time / whole:.2f})"

    return [
        [
            str(m),
            *(against_whole(m, costs) for costs in ("made", "given")),
            *(f"{ns[level, m, 'made']:.2f}" for level in LEVELS[1:]),
        ]
        for m in COLUMNS
    ]


def table(result: dict[str, Any]) -> str:
    header = ["m", "made", "given", *(f"made, {level}" for level in LEVELS[1:])]
    lines = [
        f"{row['call']}, n={row['n']}: {row['over_flushed']:.2f} of the time with denormals flushed"
        for row in result["denormals"]
    ]
    return "\n".join([text_table(header, cells(result)), *lines])


def figure(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7.4, 3.6), layout="constrained")
    axes = fig.subplots()
    for costs in ("made", "given"):
        rows = [row for row in result["rows"][LEVELS[0]] if row["costs"] == costs]
        axes.plot([row["ns_per_entry"] for row in rows], "o-", label=costs)
    axes.set_xticks(range(len(COLUMNS)), [str(m) for m in COLUMNS])
    axes.set(xlabel="columns", ylabel="ns per entry of whole vectors", ylim=(0, None))
    axes.legend()
    return fig
