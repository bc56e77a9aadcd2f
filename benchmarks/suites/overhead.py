"""What one call costs when there is next to nothing to compute: n = m = 32, d = 8.

Value and x-gradient of the Sinkhorn divergence after 10 iterations, against GeomLoss's
tensorized SamplesLoss with a schedule of 10 values of eps. The error of each gradient against the
converged one is shown, so that no peer gains by stopping early.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import reference, timing, workloads
from benchmarks.peers import Variant
from benchmarks.suites import Context, text_table, verdict

TITLE = "Cost of one small call: value and gradient, n = m = 32, d = 8, 10 iterations"
BAR = 10.0
BARRED = "GeomLoss SamplesLoss"
SIZE = 32
ITERATIONS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def _all_errors(
    variants: list[Variant], solution: reference.Solution, context: Context
) -> dict[str, dict[str, float]]:
    """The errors of the variants that work; the others are reported as skipped."""
    errors = {}
    for variant in variants:
        try:
            errors[variant.label] = solution.errors(*variant.call())
        except NotImplementedError as error:
            context.skipped[variant.label] = str(error)
            print(f"{variant.label}: skipped, {error}")
    return errors


def run(context: Context) -> dict[str, Any]:
    problem = workloads.make("low_dimensional", SIZE)
    solution = reference.divergence(
        problem.x, problem.y, problem.a, problem.b, problem.cost, problem.eps
    )
    moved = problem.to(context.device)
    variants = [
        variant
        for peer in context.supporting("overhead").values()
        for variant in peer.overhead(moved, ITERATIONS)
    ]
    errors = _all_errors(variants, solution, context)
    calls = {v.label: v.call for v in variants if v.label in errors}
    samples = timing.interleaved(calls, 2 * context.options.repetitions, context.timer)
    rows = [
        {"peer": label, "microseconds": timing.statistics(s, 1e6), **errors[label]}
        for label, s in samples.items()
    ]
    return {"rows": rows, "eps": problem.eps, "bars": _bars(rows)}


def _bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    medians = {row["peer"]: row["microseconds"]["median"] for row in rows}
    if BARRED not in medians:
        return []
    return [
        {"peer": peer, "against": BARRED, "ratio": medians[BARRED] / median, "bar": BAR}
        for peer, median in medians.items()
        if peer.startswith("otloss")
    ]


def table(result: dict[str, Any]) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        us = row["microseconds"]
        return [
            row["peer"],
            f"{us['median']:.0f} [{us['q1']:.0f}, {us['q3']:.0f}]",
            f"{row['value_error']:.1e}",
            f"{row['gradient_error']:.1e}",
        ]

    header = ["peer", "microseconds per call [quartiles]", "value error", "gradient error"]
    lines = [text_table(header, map(cells, result["rows"]))]
    lines += [
        f"{bar['peer']} against {bar['against']}: {verdict(bar['ratio'], bar['bar'])}"
        for bar in result["bars"]
    ]
    return "\n".join(lines)


def figure(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    rows = sorted(result["rows"], key=lambda row: -row["microseconds"]["median"])
    us = [row["microseconds"] for row in rows]
    fig = Figure(figsize=(6.4, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = fig.subplots()
    median = [s["median"] for s in us]
    errors = [[s["median"] - s["q1"] for s in us], [s["q3"] - s["median"] for s in us]]
    bars = axes.barh([row["peer"] for row in rows], median, xerr=errors, height=0.6)
    axes.bar_label(bars, [f" {m:.0f}" for m in median])
    axes.set(xlabel="microseconds per call (value and gradient)")
    axes.margins(x=0.2)
    return fig
