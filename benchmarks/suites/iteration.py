"""Time per full Sinkhorn iteration (an f update, then a g update) on a given cost matrix.

float32, uniform weights, costs |x-y|^2 between d=784 images. The time of 50 iterations less that
of 10, over 40, leaves out everything that is paid once per call. Before it is timed, each
variant's potentials are compared with float64 ones after the same number of iterations: all do
the same work.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import timing, workloads
from benchmarks.peers import IterationVariant
from benchmarks.reference import cost_matrix
from benchmarks.suites import Context, integers, numbers, text_table, verdict

TITLE = "Time per Sinkhorn iteration on a given cost matrix"
BAR = 12.0
# The families that the bar is about; the kernel-domain solver is shown beside them.
BARRED = ("POT sinkhorn_log", "torch.logsumexp")
TOTALS = (10, 50)
LARGE_COPY = 1 << 28
# Larger than this, the iterates are wrong, not rounded: a variant that overflowed is not timed.
LARGEST_ERROR = 1e-2
BANDWIDTH_FROM = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("iteration")
    group.add_argument("--iteration-sizes", type=integers, default=(200, 512, 1024, 2048))
    group.add_argument("--iteration-eps", type=numbers, default=(100.0, 10.0))


def _cost(n: int, eps: float) -> Tensor:
    problem = workloads.make("random_images", n, eps)
    return cost_matrix(problem.x.double(), problem.y.double(), problem.cost).float()


def _iterates(C: Tensor, eps: float, k: int, first: str) -> Tensor:
    """f_i + g_j after k iterations in float64, by plain log-sum-exp."""
    if first == "g":
        return _iterates(C.T, eps, k, "f").T
    C = C.double()
    n, m = C.shape
    f, g = C.new_zeros(n), C.new_zeros(m)
    for _ in range(k):
        f = -eps * (torch.logsumexp((g - C) / eps, 1) - np.log(m))
        g = -eps * (torch.logsumexp((f[:, None] - C) / eps, 0) - np.log(n))
    return f[:, None] + g


def _error(variant: IterationVariant, C: Tensor, eps: float, k: int = 10) -> float:
    """Largest error of (f_i + g_j)/eps, which is the relative error of the plan's entries."""
    f, g = variant.potentials(variant.run(k))
    sums = f.double()[:, None].cpu() + g.double().cpu()
    return ((sums - _iterates(C.cpu(), eps, k, variant.first)).abs().max() / eps).item()


def _fastest(
    variants: list[IterationVariant], timer: timing.Timer
) -> tuple[list[IterationVariant], dict[str, float]]:
    """The fastest variant of each family, by three short runs of each; and those times."""
    families: dict[str, list[IterationVariant]] = {}
    for variant in variants:
        families.setdefault(variant.family or variant.label, []).append(variant)
    kept, seconds = [], {}
    for family in families.values():
        if len(family) > 1:
            calls = {v.label: partial(v.run, TOTALS[0]) for v in family}
            samples = timing.interleaved(calls, 3, timer)
            seconds |= {label: float(s.min()) for label, s in samples.items()}
            family = sorted(family, key=lambda v: seconds[v.label])
        kept.append(family[0])
    return kept, seconds


def _slope(
    variant: IterationVariant, samples: dict[Any, np.ndarray]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Seconds per iteration in every round, from the pair of counts that favours the variant."""
    slopes = {
        pair: (samples[variant.label, pair[1]] - samples[variant.label, pair[0]])
        / (pair[1] - pair[0])
        for pair in variant.pairs
    }
    best = min(slopes, key=lambda pair: np.median(slopes[pair]))
    return slopes[best], best


def _row(
    variant: IterationVariant,
    samples: dict[Any, np.ndarray],
    n: int,
    eps: float,
    error: float,
) -> dict[str, Any]:
    per_iteration, pair = _slope(variant, samples)
    return {
        "peer": variant.label,
        "family": variant.family or variant.label,
        "n": n,
        "eps": eps,
        "ns_per_entry": timing.statistics(per_iteration, 1e9 / n**2),
        "from_counts": list(pair),
        "seconds": {str(k): timing.statistics(samples[variant.label, k]) for k in TOTALS},
        "plan_error": error,
    }


def _bandwidth(
    rows: list[dict[str, Any]], samples: dict[Any, np.ndarray], n: int, eps: float
) -> dict[str, Any]:
    """Copy bandwidth, and the share of it at which each solver reads the cost once."""
    sizes = {"same size": 4 * n * n, "memory": LARGE_COPY}
    copies = {key: 2 * size / np.median(samples["copy", key]) for key, size in sizes.items()}
    shares = {}
    for row in rows:
        rate = 4e9 / row["ns_per_entry"]["median"]
        shares[row["peer"]] = {key: rate / copy for key, copy in copies.items()}
    return {"n": n, "eps": eps, "copy_bytes_per_second": copies, "share": shares}


def _measure(context: Context, n: int, eps: float) -> dict[str, Any]:
    """The rows of one problem, and what was left out of them."""
    device = context.device
    C = _cost(n, eps).to(device)
    variants = [
        variant
        for peer in context.supporting("iteration").values()
        for variant in peer.iteration(C, eps)
    ]
    errors = {v.label: _error(v, C, eps) for v in variants}
    # `not <=` rather than `>`: an overflow may end as NaN.
    wrong = {label: e for label, e in errors.items() if not e <= LARGEST_ERROR}
    variants, preselection = _fastest([v for v in variants if v.label not in wrong], context.timer)
    calls: dict[Any, timing.Call] = {
        (v.label, k): partial(v.run, k)
        for v in variants
        for k in {*TOTALS, *(k for pair in v.pairs for k in pair)}
    }
    if n >= BANDWIDTH_FROM:
        calls["copy", "same size"] = timing.copy_call(4 * n * n, device)
        calls["copy", "memory"] = timing.copy_call(LARGE_COPY, device)
    samples = timing.interleaved(
        calls, context.options.repetitions, context.timer, budget=float("inf")
    )
    rows = [_row(v, samples, n, eps, errors[v.label]) for v in variants]
    return {
        "n": n,
        "eps": eps,
        "rows": rows,
        "bandwidth": _bandwidth(rows, samples, n, eps) if n >= BANDWIDTH_FROM else None,
        "preselection_seconds": preselection,
        "not_timed_for_error": {label: repr(e) for label, e in wrong.items()},
    }


def run(context: Context) -> dict[str, Any]:
    options = context.options
    problems: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for n in options.iteration_sizes:
        for eps in options.iteration_eps:
            problem = _measure(context, n, eps)
            rows += problem.pop("rows")
            problems.append(problem)
            result = {"rows": rows, "problems": problems, "bars": _bars(rows)}
            context.save(result)  # a limit on the time may end the run
    return result


def _bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times faster otloss is than each family, at each size and eps."""
    own = {
        (row["n"], row["eps"]): row["ns_per_entry"]["median"]
        for row in rows
        if row["peer"] == "otloss"
    }
    return [
        {
            "n": row["n"],
            "eps": row["eps"],
            "peer": row["peer"],
            "ratio": row["ns_per_entry"]["median"] / own[row["n"], row["eps"]],
            "bar": BAR if row["family"] in BARRED else None,
        }
        for row in rows
        if (row["n"], row["eps"]) in own and row["peer"] != "otloss"
    ]


def _cells(row: dict[str, Any], bar: dict[str, Any] | None) -> list[str]:
    ns, ratio = row["ns_per_entry"], ""
    if bar:
        ratio = verdict(bar["ratio"], bar["bar"]) if bar["bar"] else f"{bar['ratio']:.1f}x"
    return [
        str(row["n"]),
        f"{row['eps']:g}",
        row["peer"],
        f"{ns['median']:.3f} [{ns['q1']:.3f}, {ns['q3']:.3f}]",
        ratio,
        f"{row['seconds']['50']['median'] * 1e3:.3g}",
        f"{row['plan_error']:.1e}",
    ]


def _notes(problem: dict[str, Any]) -> list[str]:
    name = f"n=m={problem['n']}, eps={problem['eps']:g}"
    notes = [
        f"{name}: {label} is not timed, its iterates are wrong (error {error})"
        for label, error in problem["not_timed_for_error"].items()
    ]
    copy = problem["bandwidth"]
    if copy and "otloss" in copy["share"]:
        speed = copy["copy_bytes_per_second"]
        text = ", ".join(
            f"{share:.0%} of the copy bandwidth ({key}: {speed[key] / 1e9:.0f} GB/s)"
            for key, share in copy["share"]["otloss"].items()
        )
        notes.append(f"{name}: otloss reads the cost at {text}")
    return notes


def table(result: dict[str, Any]) -> str:
    bars = {(bar["n"], bar["eps"], bar["peer"]): bar for bar in result["bars"]}
    header = ["n=m", "eps", "peer", "ns/entry/iteration [quartiles]", "otloss is faster by"]
    rows = [_cells(r, bars.get((r["n"], r["eps"], r["peer"]))) for r in result["rows"]]
    lines = [text_table([*header, "50 iterations, ms", "error"], rows)]
    return "\n".join(lines + [note for p in result["problems"] for note in _notes(p)])


def figure(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    epsilons = list(dict.fromkeys(row["eps"] for row in result["rows"]))
    fig = Figure(figsize=(4.4 * len(epsilons), 4.2), layout="constrained")
    grid = fig.subplots(1, len(epsilons), sharey=True, squeeze=False)
    families = list(dict.fromkeys(row["family"] for row in result["rows"]))
    for axes, eps in zip(grid.flat, epsilons, strict=True):
        for index, family in enumerate(families):
            rows = [r for r in result["rows"] if r["family"] == family and r["eps"] == eps]
            _line(axes, rows, family, f"C{index}")
        axes.set(xscale="log", yscale="log", xlabel="n = m", title=f"eps = {eps:g}")
        axes.set_xticks(sorted({row["n"] for row in result["rows"]}), minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3)
    grid.flat[0].set_ylabel("ns per entry per iteration")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2)
    return fig


def _line(axes: Any, rows: list[dict[str, Any]], label: str, color: str) -> None:
    ns = [row["ns_per_entry"] for row in rows]
    median = np.array([s["median"] for s in ns])
    spread = np.abs(np.array([[s["q1"] for s in ns], [s["q3"] for s in ns]]) - median)
    options = {"marker": "o", "ms": 4, "capsize": 3, "color": color}
    axes.errorbar([r["n"] for r in rows], median, spread, label=label, **options)
