"""Peak memory that value and gradient of one divergence add, each in a fresh process."""

from __future__ import annotations

import argparse
import subprocess
from typing import Any

from benchmarks import workloads
from benchmarks.memory import Peak, peak
from benchmarks.suites import Context, integers, text_table

TITLE = "Peak memory of one divergence, value and gradient"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory")
    group.add_argument("--memory-sizes", type=integers, default=(1000, 2000, 4000))
    group.add_argument("--memory-workload", default="gaussians_64d")


def _peak(context: Context, name: str, n: int) -> Peak | None:
    options = context.options
    try:
        return peak(
            name,
            options.memory_workload,
            n,
            device=str(context.device),
            threads=options.threads,
        )
    except subprocess.SubprocessError as error:
        print(f"{name}, n={n}: {error}", flush=True)
        return None


def run(context: Context) -> dict[str, Any]:
    rows = []
    for n in context.options.memory_sizes:
        for name in context.supporting("divergence"):
            measured = _peak(context, name, n)
            rows.append(
                {
                    "peer": name,
                    "n": n,
                    "added_bytes": measured.added if measured else None,
                    # One float32 matrix of n x n entries is the natural unit.
                    "matrices": measured.added / (4 * n * n) if measured else None,
                }
            )
    workload = context.options.memory_workload
    return {"rows": rows, "workload": workload, "title": workloads.WORKLOADS[workload].title}


def table(result: dict[str, Any]) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        if row["added_bytes"] is None:
            return [str(row["n"]), row["peer"], "failed", ""]
        added = f"{row['added_bytes'] / 2**20:.0f}"
        return [str(row["n"]), row["peer"], added, f"{row['matrices']:.1f}"]

    header = ["n=m", "peer", "peak added, MiB", "in n x n float32 matrices"]
    return text_table(header, map(cells, result["rows"]))


def figure(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = fig.subplots()
    for peer in dict.fromkeys(row["peer"] for row in result["rows"]):
        rows = [r for r in result["rows"] if r["peer"] == peer and r["added_bytes"] is not None]
        axes.plot(
            [r["n"] for r in rows], [r["added_bytes"] / 2**20 for r in rows], "o-", label=peer
        )
    axes.set(xscale="log", yscale="log", xlabel="n = m", ylabel="peak memory added, MiB")
    axes.legend()
    axes.grid(alpha=0.3)
    return fig
