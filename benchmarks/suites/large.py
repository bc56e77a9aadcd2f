"""Value and gradient of a divergence of large clouds in few dimensions, each in a fresh process:
the multiscale engine, streamed sweeps and GeomLoss, at the accuracy that each is usually asked for.

A run adds its rows to those of earlier runs. CPU seconds: other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import math
import subprocess
from collections.abc import Iterator
from typing import Any

from benchmarks import workloads
from benchmarks.large import FINE, GaveUpError, measure
from benchmarks.suites import Context, integers, numbers, text_table

TITLE = "Divergences of large clouds, value and gradient"
KEYS = ("workload", "eps", "n", "method", "threads")
METHODS = {
    "multiscale-fine": FINE,
    "multiscale": "otloss multiscale, tol=0.001",
    "streamed": "otloss streamed, tol=0.01",
    "streamed-fine": "otloss streamed, tol=0.001",
    "geomloss": "geomloss multiscale, scaling=0.502",
}
WORKLOADS = ("shapes_unit", "mixtures_2d")
MOST_STREAMED = 100_000  # beyond this all pairs take hours


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("large")
    group.add_argument("--large-sizes", type=integers, default=(10_000, 30_000, 100_000, 1_000_000))
    group.add_argument("--large-eps", type=numbers, help="instead of each workload's")
    group.add_argument("--large-methods", default="multiscale,streamed", help=", ".join(METHODS))
    group.add_argument("--large-workloads", default=",".join(WORKLOADS))
    group.add_argument("--large-limit", type=float, default=1800, help="CPU seconds for each call")


def _cases(options: argparse.Namespace) -> Iterator[tuple[str, float, int, str]]:
    for name in options.large_workloads.split(","):
        for n in options.large_sizes:
            for eps in options.large_eps or workloads.WORKLOADS[name].eps:
                for method in options.large_methods.split(","):
                    if method.startswith("multiscale") or n <= MOST_STREAMED:
                        yield name, eps, n, METHODS[method]


def run(context: Context) -> dict[str, Any]:
    options = context.options
    rows = {tuple(row[k] for k in KEYS): row for row in context.earlier().get("rows", [])}
    for case in _cases(options):
        name, eps, n, method = case
        row: dict[str, Any] = dict(zip(KEYS, (*case, options.threads), strict=True))
        row |= {"title": workloads.WORKLOADS[name].title, "outcome": "measured"}
        try:
            limits = {"threads": options.threads, "limit": options.large_limit}
            row |= measure(method, name, n, eps, **limits)._asdict()
        except GaveUpError as error:
            row["outcome"] = str(error)
        except subprocess.SubprocessError as error:
            row["outcome"] = f"failed: {error}"
        row |= {k: context.environment[k] for k in ("command", "commit", "load_average")}
        print("  ".join(_cells(row, {})), flush=True)
        rows[tuple(row[k] for k in KEYS)] = row
        context.save(_result(rows))
    return _result(rows)


def _result(rows: dict[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    return {"rows": [rows[key] for key in sorted(rows)]}


def exponents(rows: list[dict[str, Any]]) -> dict[int, float]:
    """By the index of a row: log of the time over log of the size, from the next smaller size."""
    found = {}
    for i, row in enumerate(rows):
        smaller = [
            r
            for r in rows
            if r["n"] < row["n"]
            and all(r[k] == row[k] for k in KEYS if k != "n")
            and "cpu_seconds" in r
        ]
        if smaller and "cpu_seconds" in row:
            last = max(smaller, key=lambda r: r["n"])
            ratio = row["cpu_seconds"] / last["cpu_seconds"]
            found[i] = math.log(ratio) / math.log(row["n"] / last["n"])
    return found


def blur(eps: float) -> str:
    """GeomLoss's name for it."""
    return f"{math.sqrt(eps / 2):.2g}"


def _cells(row: dict[str, Any], exponent: dict[str, str]) -> list[str]:
    head = [f"{row['title']}, blur {blur(row['eps'])}", str(row["n"]), row["method"]]
    head.append(str(row["threads"]))
    if "cpu_seconds" not in row:
        return [*head, row["outcome"]]
    errors = (row["gradient_error"], row["value_error"], row["marginal_error"])
    return [
        *head,
        f"{row['cpu_seconds']:.3g}",
        f"{row['wall_seconds']:.3g}",
        exponent.get("text", ""),
        f"{row['added_bytes'] / 2**20:.0f}",
        *("" if error is None else f"{error:.1e}" for error in errors),
        row["checked_by"],
    ]


def table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    found = exponents(rows)
    header = ["problem", "n=m", "method", "threads", "CPU s", "wall s", "exponent", "added, MiB"]
    header += ["gradient error", "value error", "sampled marginal error", "against"]
    cells = [
        _cells(row, {"text": f"{found[i]:.2f}"} if i in found else {}) for i, row in enumerate(rows)
    ]
    return text_table(header, (line + [""] * (len(header) - len(line)) for line in cells))


def figure(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    rows = [
        r
        for r in result["rows"]
        if "cpu_seconds" in r and r["threads"] == 1 and r["method"] != FINE
    ]
    problems = list(dict.fromkeys((r["title"], r["eps"]) for r in rows))
    fig = Figure(figsize=(7.4, 1 + 2.7 * -(-len(problems) // 2)), layout="constrained")
    panels = fig.subplots(-(-len(problems) // 2), 2, squeeze=False, sharex=True, sharey=True).flat
    for (title, eps), axes in zip(problems, panels, strict=False):
        own = [r for r in rows if (r["title"], r["eps"]) == (title, eps)]
        for method in dict.fromkeys(r["method"] for r in own):
            line = sorted((r["n"], r["cpu_seconds"]) for r in own if r["method"] == method)
            axes.plot(*zip(*line, strict=True), "o-", label=method.removeprefix("otloss "))
        axes.set(xscale="log", yscale="log", xlabel="n = m", ylabel="CPU seconds")
        axes.set_title(f"{title}, blur {blur(eps)}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return fig
