"""Peak memory that value and gradient of one divergence add, each in a fresh process.

A run adds its rows to those of earlier runs.
"""

from __future__ import annotations

import argparse
import subprocess
from typing import Any

from benchmarks import workloads
from benchmarks.memory import GaveUpError, Peak, peak
from benchmarks.suites import Context, integers, milliseconds, text_table

TITLE = "Peak memory of one divergence, value and gradient"
DEFAULT_WORKLOAD = "gaussians_64d"
KEYS = ("workload", "n", "eps", "peer", "setting", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory")
    group.add_argument("--memory-sizes", type=integers, default=(1000, 2000, 4000))
    group.add_argument("--memory-workload", default=DEFAULT_WORKLOAD)
    group.add_argument("--memory-eps", type=float, help="instead of the workload's first")
    group.add_argument("--memory-setting", default="", help="of the ladder of the one peer")
    group.add_argument("--memory-errors", action="store_true", help="of the gradient: adds minutes")
    group.add_argument("--memory-limit", type=float, default=600, help="CPU seconds for each call")


def _peak(context: Context, name: str, n: int, eps: float) -> tuple[Peak | None, float | None]:
    """The measurement, or None and the CPU seconds after which it was given up, if it was."""
    options = context.options
    try:
        measured = peak(
            name,
            options.memory_workload,
            n,
            eps=eps,
            setting=options.memory_setting,
            errors=options.memory_errors,
            device=str(context.device),
            threads=options.threads,
            limit=options.memory_limit,
        )
        return measured, None
    except GaveUpError as error:
        print(f"{name}, n={n}: {error}", flush=True)
        return None, options.memory_limit
    except subprocess.SubprocessError as error:
        print(f"{name}, n={n}: {error}", flush=True)
        return None, None


def _row(context: Context, name: str, n: int) -> dict[str, Any]:
    options = context.options
    workload = workloads.WORKLOADS[options.memory_workload]
    eps = options.memory_eps or workload.eps[0]
    measured, given_up = _peak(context, name, n, eps)
    return {
        "workload": options.memory_workload,
        "title": workload.title,
        "n": n,
        "eps": eps,
        "peer": name,
        "setting": options.memory_setting,
        "threads": options.threads,
        "added_bytes": measured.added if measured else None,
        # One float32 matrix of n x n entries is the natural unit.
        "matrices": measured.added / (4 * n * n) if measured else None,
        "wall_seconds": measured.wall_seconds if measured else None,
        "cpu_seconds": measured.cpu_seconds if measured else None,
        "gradient_error": measured.gradient_error if measured else None,
        "given_up_seconds": given_up,
        "load_average": context.environment["load_average"],
        "command": context.environment["command"],
    }


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEYS)


def run(context: Context) -> dict[str, Any]:
    rows = {_identity(row): row for row in context.earlier().get("rows", [])}
    for n in context.options.memory_sizes:
        for name in context.supporting("divergence"):
            row = _row(context, name, n)
            rows[_identity(row)] = row
            context.save({"rows": list(rows.values())})
    return {"rows": sorted(rows.values(), key=lambda row: (row["workload"], row["n"]))}


def table(result: dict[str, Any]) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        problem = [f"{row['workload']}, eps={row['eps']:g}", str(row["n"])]
        peer = f"{row['peer']} {row['setting']}".strip()
        if row["added_bytes"] is None:
            seconds = row.get("given_up_seconds")
            outcome = f"not done after {seconds:.0f} s" if seconds else "failed"
            return [*problem, peer, outcome, "", "", ""]
        error = "" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"
        return [
            *problem,
            peer,
            f"{row['added_bytes'] / 2**20:.0f}",
            f"{row['matrices']:.2g}",
            milliseconds(row["cpu_seconds"]),
            error,
        ]

    header = ["problem", "n=m", "peer", "peak added, MiB", "in n x n float32 matrices"]
    return text_table([*header, "CPU time", "gradient error"], map(cells, result["rows"]))


def figure(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = fig.subplots()
    rows = [row for row in result["rows"] if row["workload"] == DEFAULT_WORKLOAD]
    for peer in dict.fromkeys(row["peer"] for row in rows):
        own = [r for r in rows if r["peer"] == peer and r["added_bytes"] is not None]
        sizes = [r["n"] for r in own]
        axes.plot(sizes, [r["added_bytes"] / 2**20 for r in own], "o-", label=peer)
    axes.set(xscale="log", yscale="log", xlabel="n = m", ylabel="peak memory added, MiB")
    axes.legend()
    axes.grid(alpha=0.3)
    return fig
