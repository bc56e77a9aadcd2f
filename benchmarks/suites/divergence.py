"""Time to a stated accuracy: value and x-gradient of the Sinkhorn divergence.

Each peer has a ladder of settings, from cheap to exact. Every rung's gradient error against the
converged float64 gradient (relative, Frobenius norm) is measured first; then, for each target,
the fastest rung that meets it is timed against those of the other peers, in interleaved rounds.
otloss's plain call, with no accuracy argument, is timed as well.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import reference, timing, workloads
from benchmarks.peers import ValueAndGradient, Variant
from benchmarks.suites import Context, integers, milliseconds, text_table

TITLE = "Time to accuracy: value and gradient of the Sinkhorn divergence"
TARGETS = (1e-2, 1e-3)
DEFAULT = "default"
REPEAT_BELOW = 0.5
BUDGET_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("divergence")
    group.add_argument(
        "--workloads",
        type=lambda text: tuple(text.split(",")),
        default=("random_images", "perturbed_digits", "fashion_blurred"),
        help="of benchmarks/workloads.py, comma-separated, or 'all'",
    )
    group.add_argument("--divergence-sizes", type=integers, help="instead of each workload's own")
    group.add_argument(
        "--longest-call",
        type=float,
        default=3.0,
        help="seconds after which a peer climbs no further up its ladder",
    )


def _rung(
    peer: str, variant: Variant, solution: reference.Solution, context: Context
) -> dict[str, Any]:
    """One setting: its errors, and a first idea of its time."""
    results: list[ValueAndGradient] = []

    def call() -> None:
        results.append(variant.call())

    seconds = context.timer.seconds(call)
    if seconds < REPEAT_BELOW:
        # The first call of a kind pays for what is loaded or cached once.
        seconds = min(seconds, context.timer.seconds(call))
    value, gradient = results[-1]
    difference = (gradient.double().cpu() - solution.gradient).norm()
    return {
        "peer": peer,
        "setting": variant.label,
        "rough_seconds": seconds,
        "value_error": abs(value.item() - solution.value) / abs(solution.value),
        "gradient_error": (difference / solution.gradient.norm()).item(),
    }


def _climb(
    peer: str, ladder: list[Variant], solution: reference.Solution, context: Context
) -> list[dict[str, Any]]:
    """The rungs up to the last target, or until a call lasts too long."""
    rungs = []
    for variant in ladder:
        rungs.append(_rung(peer, variant, solution, context))
        if variant.label == DEFAULT:
            continue
        done = rungs[-1]["gradient_error"] <= min(TARGETS)
        if done or rungs[-1]["rough_seconds"] > context.options.longest_call:
            break
    return rungs


def _chosen(rungs: list[dict[str, Any]], target: float) -> dict[str, Any] | None:
    """The first rung of the ladder that meets the target: the cheapest one."""
    meeting = (
        rung for rung in rungs if rung["setting"] != DEFAULT and rung["gradient_error"] <= target
    )
    return next(meeting, None)


def _miss(rungs: list[dict[str, Any]], context: Context) -> str:
    """Why a peer has no setting for a target."""
    longest = context.options.longest_call
    too_long = rungs and rungs[-1]["rough_seconds"] > longest
    return f"more than {longest:g} s" if too_long else "not reached"


def _case(context: Context, problem: workloads.Problem) -> dict[str, Any]:
    solution = reference.divergence(
        problem.x, problem.y, problem.a, problem.b, problem.cost, problem.eps
    )
    moved = problem.to(context.device)
    rungs, calls, targets = [], {}, []
    for peer, module in context.supporting("divergence").items():
        ladder = module.divergence(moved)
        climbed = _climb(peer, ladder, solution, context)
        rungs += climbed
        by_label = {variant.label: variant.call for variant in ladder}
        for target in TARGETS:
            rung = _chosen(climbed, target)
            setting = rung["setting"] if rung else None
            miss = None if rung else _miss(climbed, context)
            targets.append({"peer": peer, "target": target, "setting": setting, "miss": miss})
            if rung:
                calls[peer, setting] = by_label[setting]
        if DEFAULT in by_label:
            calls[peer, DEFAULT] = by_label[DEFAULT]
    samples = timing.interleaved(
        calls, context.options.repetitions, context.timer, budget=BUDGET_SECONDS
    )
    for entry in (*rungs, *targets):
        measured = samples.get((entry["peer"], entry["setting"]))
        entry["seconds"] = None if measured is None else timing.statistics(measured)
    _add_ratios(targets)
    return {
        "workload": problem.name,
        "title": workloads.WORKLOADS[problem.name].title,
        "n": problem.sizes[0],
        "cost": problem.cost,
        "eps": problem.eps,
        "hardness": workloads.hardness(problem),
        "reference_marginal_error": solution.marginal_error,
        "rungs": rungs,
        "targets": targets,
    }


def _add_ratios(targets: list[dict[str, Any]]) -> None:
    """How many times longer each peer takes than otloss to the same target."""
    own = {t["target"]: t["seconds"] for t in targets if t["peer"] == "otloss"}
    for entry in targets:
        ours, theirs = own.get(entry["target"]), entry["seconds"]
        entry["ratio_to_otloss"] = theirs["median"] / ours["median"] if ours and theirs else None


def run(context: Context) -> dict[str, Any]:
    names = context.options.workloads
    names = tuple(workloads.WORKLOADS) if names == ("all",) else names
    cases, unavailable = [], {}
    for name in names:
        workload = workloads.WORKLOADS[name]
        for n in context.options.divergence_sizes or workload.sizes:
            for eps in workload.eps:
                try:
                    problem = workloads.make(name, n, eps)
                except workloads.UnavailableError as error:
                    unavailable[f"{name}, n={n}"] = str(error)
                    break
                cases.append(_case(context, problem))
                print(f"{name}, n={n}, eps={eps:g}: done", flush=True)
    return {"cases": cases, "unavailable": unavailable, "targets": list(TARGETS)}


def _cells(case: dict[str, Any], target: dict[str, Any]) -> list[str]:
    seconds, ratio = target["seconds"], target["ratio_to_otloss"]
    return [
        f"{case['workload']}, n={case['n']}, eps={case['eps']:g} (h={case['hardness']:.2g})",
        f"{target['target']:g}",
        target["peer"],
        target["setting"] or target["miss"],
        milliseconds(seconds["median"]) if seconds else "",
        f"{ratio:.1f}x" if ratio else "",
    ]


def _case_table(cases: list[dict[str, Any]]) -> str:
    rows = [
        _cells(case, target)
        for case in cases
        for target in sorted(case["targets"], key=lambda t: -t["target"])
    ]
    header = ["problem", "gradient error", "peer", "setting", "time", "time / otloss's"]
    return text_table(header, rows)


def _default_rows(cases: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            f"{case['workload']}, n={case['n']}, eps={case['eps']:g}",
            milliseconds(rung["seconds"]["median"]),
            f"{rung['value_error']:.1e}",
            f"{rung['gradient_error']:.1e}",
        ]
        for case in cases
        for rung in case["rungs"]
        if rung["setting"] == DEFAULT
    ]


def table(result: dict[str, Any]) -> str:
    parts = [_case_table(result["cases"])]
    defaults = _default_rows(result["cases"])
    if defaults:
        header = ["otloss, default call", "time", "value error", "gradient error"]
        parts.append(text_table(header, defaults))
    parts += [f"{name}: skipped, {why}" for name, why in result["unavailable"].items()]
    return "\n\n".join(parts)


def figure(result: dict[str, Any]) -> Any:
    """One work-precision diagram per problem: every rung's error against its time."""
    from matplotlib.figure import Figure

    cases = result["cases"]
    columns = min(4, len(cases)) or 1
    lines = max(1, -(-len(cases) // columns))
    fig = Figure(figsize=(3.4 * columns, 2.8 * lines + 0.4), layout="constrained")
    grid = fig.subplots(lines, columns, squeeze=False, sharex=True)
    peers = list(dict.fromkeys(r["peer"] for case in cases for r in case["rungs"]))
    for axes, case in zip(grid.flat, cases, strict=False):
        _work_precision(axes, case, peers)
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    if cases:
        handles, labels = grid.flat[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=len(peers))
    return fig


def _work_precision(axes: Any, case: dict[str, Any], peers: list[str]) -> None:
    for index, peer in enumerate(peers):
        rungs = [r for r in case["rungs"] if r["peer"] == peer and r["setting"] != DEFAULT]
        seconds = [r["seconds"]["median"] if r["seconds"] else r["rough_seconds"] for r in rungs]
        errors = [r["gradient_error"] for r in rungs]
        axes.plot(seconds, errors, marker="o", ms=3, color=f"C{index}", label=peer)
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="gradient error")
    title = f"{case['workload']}\nn={case['n']}, eps={case['eps']:g} (h={case['hardness']:.2g})"
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.3)
