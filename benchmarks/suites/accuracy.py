"""Time and passes to a stated accuracy: value and x-gradient of the Sinkhorn divergence.

Each way to use a peer (a family) has a ladder of settings, from cheap to exact. The cheapest rung
whose gradient is within a target of the converged float64 gradient (relative, Frobenius norm) is
found by galloping up the ladder and bisecting back. Then, for each target, the peers' fastest rungs
that meet it are timed against otloss and against the problem's floor, the five matrix products that
nobody can avoid, in interleaved rounds. otloss's plain call is timed as well.

A run adds to the result of earlier ones: what is already measured is skipped (``--again`` times it
once more), so that a run can be cut short, and made in parts. Every case is timed together with
otloss and the floor, whose times are those of the last run; ratios stay those of the run that
measured the peer.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import reference, timing, workloads
from benchmarks.peers import ValueAndGradient, Variant, storable
from benchmarks.suites import Context, integers, milliseconds, numbers, text_table

TITLE = "Time to accuracy: value and gradient of the Sinkhorn divergence"
TARGETS = (1e-2, 1e-3)
OWN, FLOOR, DEFAULT = "otloss", "floor", "default"
STRIDE = 4  # rungs climbed at once
REPEAT_BELOW = 0.5  # seconds: a shorter first idea of a time is taken twice
LONGEST_COMPILATION = 60.0  # a family's first call, if shorter, is repeated
PATIENCE = 40.0  # a peer whose call lasts this many times otloss's to the last target is out
SHORTEST_PATIENCE = 0.3  # seconds
FAILED = 1e9  # the error of a result that is not finite
CLOSE = 2.0  # families whose first idea is within this factor of the best are timed in full
BUDGET_SECONDS = 2.0  # per call and case, for the full timing

# The bars. Up to MOST_SMALL points: this many times faster than the best peer, or within this
# factor of the floor. In 3-D from LEAST_LARGE points on: faster than GeomLoss, there on KeOps.
MOST_SMALL, SMALL_BAR, FLOOR_BAR = 2048, 30.0, 2.0
LEAST_LARGE, LARGE_DIMENSION, LARGE_BAR, LARGE_PEER = 10_000, 3, 5.0, "geomloss"

DEFAULT_WORKLOADS = (
    "fashion_blurred",
    "fashion_blurred_euclidean",
    "shapes_3d",
    "gaussians_64d",
    "cosine_features",
)
QUICK = {"workloads": ("fashion_blurred", "shapes_3d"), "sizes": (200, 2000), "eps": (10.0, 5e-3)}

Rung = dict[str, Any]
Key = tuple[str, str]  # peer, setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("accuracy")
    group.add_argument(
        "--workloads",
        type=lambda text: tuple(text.split(",")),
        default=DEFAULT_WORKLOADS,
        help="of benchmarks/workloads.py, comma-separated, or 'all'",
    )
    group.add_argument("--accuracy-sizes", type=integers, help="only these of a workload's own")
    group.add_argument("--accuracy-eps", type=numbers, help="only these of a workload's own")
    group.add_argument("--quick", action="store_true", help="two small cases, short searches")
    group.add_argument("--again", action="store_true", help="time again what the result has")
    group.add_argument("--search-again", action="store_true", help="and find the settings again")
    group.add_argument(
        "--longest-call",
        type=float,
        default=10.0,
        help=f"seconds after which a peer climbs no further up its ladder; {PATIENCE:g} times "
        "otloss's time if that is less",
    )
    group.add_argument(
        "--search-seconds", type=float, default=15.0, help="for one family's ladder in one case"
    )


# ----------------------------------------------------------------------------------- the search


@dataclass
class _Ladder:
    """The rungs of one family that have been tried, each with its errors and a first time."""

    variants: list[Variant]
    solution: reference.Solution
    context: Context
    longest: float  # seconds: a call that lasts longer is the last one
    rungs: dict[int, Rung] = field(default_factory=dict)
    first_call_seconds: float | None = None
    stop: str | None = None  # why no more rungs are tried

    def try_rung(self, index: int) -> Rung | None:
        if index not in self.rungs and self.stop is None:
            try:
                self.rungs[index] = self._measure(self.variants[index])
            except Exception as error:  # whatever a peer raises, the others are measured
                self.stop = f"fails: {(str(error) or repr(error)).splitlines()[0][:80]}"
            else:
                self._check_budget(self.rungs[index]["rough_seconds"])
        return self.rungs.get(index)

    def _measure(self, variant: Variant) -> Rung:
        results: list[ValueAndGradient] = []
        timer = self.context.timer

        def call() -> None:
            results.append(variant.call())

        seconds = timer.seconds(call)
        first = self.first_call_seconds is None
        if first:
            # Loads or compiles what later calls reuse.
            self.first_call_seconds = seconds
        if seconds < (LONGEST_COMPILATION if first else REPEAT_BELOW):
            seconds = min(seconds, timer.seconds(call))
        errors = self.solution.errors(*results[-1])
        finite = {k: v if math.isfinite(v) else FAILED for k, v in errors.items()}
        return {"setting": variant.label, "rough_seconds": seconds, **finite}

    def _check_budget(self, last: float) -> None:
        most = self.context.options.search_seconds
        spent = sum(rung["rough_seconds"] for rung in self.rungs.values())
        if last > self.longest:
            self.stop = f"more than {self.longest:.2g} s"
        elif spent > most:
            self.stop = f"{most:g} s of search"

    def climb(self, target: float, start: int) -> int | None:
        """The index of the first rung from ``start`` on that meets the target."""
        low, high, last = start - 1, start, len(self.variants) - 1
        while not self._meets(high, target):
            if high == last and self.stop is None:
                self.stop = "not reached"
            if self.stop is not None:
                return None
            low, high = high, min(high + STRIDE, last)
        while high - low > 1 and self.stop is None:
            middle = (low + high) // 2
            low, high = (low, middle) if self._meets(middle, target) else (middle, high)
        return high

    def _meets(self, index: int, target: float) -> bool:
        rung = self.try_rung(index)
        return rung is not None and rung["gradient_error"] <= target


def _search(
    variants: list[Variant], solution: reference.Solution, context: Context, longest: float
) -> Rung:
    """The family's rungs and, for each target, the setting that reaches it."""
    ladder = _Ladder(variants, solution, context, longest)
    reached: dict[str, str] = {}
    index: int | None = 0
    for target in TARGETS:
        index = None if index is None else ladder.climb(target, index)
        if index is None:
            break
        reached[f"{target:g}"] = variants[index].label
    return {
        "first_call_seconds": ladder.first_call_seconds,
        "stop": ladder.stop if len(reached) < len(TARGETS) else None,
        "reached": reached,
        "rungs": [ladder.rungs[i] for i in sorted(ladder.rungs)],
    }


# -------------------------------------------------------------------------------- one case


def _floor(problem: workloads.Problem) -> Callable[[], None] | None:
    """Three cost matrices' inner products and two gradients' products with a plan."""
    if not storable(problem):
        return None
    x, y = problem.x, problem.y
    pairs = ((x, y), (x, x), (y, y))
    matrices = [p @ q.T for p, q in pairs]
    gradient = torch.empty_like(x)

    def products() -> None:
        for C, (p, q) in zip(matrices, pairs, strict=True):
            torch.mm(p, q.T, out=C)
        for C, q in ((matrices[0], y), (matrices[1], x)):
            torch.mm(C, q, out=gradient)

    return products


def _families(variants: list[Variant]) -> dict[str, list[Variant]]:
    found: dict[str, list[Variant]] = {}
    for variant in variants:
        found.setdefault(variant.family, []).append(variant)
    return found


def _candidates(families: list[Rung], target: str) -> list[str]:
    """The settings, one of a family, that may be the peer's fastest at a target."""
    rough = {
        rung["setting"]: rung["rough_seconds"]
        for family in families
        for rung in family["rungs"]
        if rung["setting"] == family["reached"].get(target)
    }
    return [s for s, seconds in rough.items() if seconds <= CLOSE * min(rough.values())]


def _closest(families: list[Rung]) -> Rung:
    """How far a peer came that does not reach a target, and what time it would at least need."""
    # A family that might get there with more time is not one that cannot.
    slow = [f for f in families if f["stop"] and ("search" in f["stop"] or "more" in f["stop"])]
    stops = [f["stop"] for f in (slow or families) if f["stop"]]
    rungs = [rung for f in families for rung in f["rungs"]]
    best = min(rungs, key=lambda rung: rung["gradient_error"], default=None)
    return {
        "miss": (stops or ["not reached"])[0],
        "closest": best and {k: best[k] for k in ("setting", "rough_seconds", "gradient_error")},
        "at_least": min(
            (max(rung["rough_seconds"] for rung in f["rungs"]) for f in slow), default=None
        ),
    }


class _Case:
    """A problem with its solution, in one run."""

    def __init__(self, context: Context, problem: workloads.Problem) -> None:
        self.context, self.problem = context, problem
        self.solution = reference.divergence(
            problem.x, problem.y, problem.a, problem.b, problem.cost, problem.eps
        )
        moved = problem.to(context.device)
        self.floor = _floor(moved)
        self.families = {
            name: _families(peer.divergence(moved))
            for name, peer in context.supporting("divergence").items()
        }

    def search(self, peers: list[str], known: dict[str, list[Rung]]) -> dict[str, list[Rung]]:
        """The families of each peer, as found before or now; otloss's always now, and first."""
        longest = self.context.options.longest_call
        found: dict[str, list[Rung]] = {}
        for peer in peers:
            if peer in known and peer != OWN and not self.context.options.search_again:
                found[peer] = known[peer]
                continue
            found[peer] = [
                {
                    "peer": peer,
                    "family": name,
                    **_search(variants, self.solution, self.context, longest),
                }
                for name, variants in self.families[peer].items()
                if name != DEFAULT
            ]
            if peer == OWN:
                longest = min(longest, self._patience(found[OWN]))
        return found

    def _patience(self, own: list[Rung]) -> float:
        """Seconds after which a call of a peer has lost against all bars."""
        settings = _candidates(own, f"{min(TARGETS):g}")
        rough = [r["rough_seconds"] for f in own for r in f["rungs"] if r["setting"] in settings]
        return max(SHORTEST_PATIENCE, PATIENCE * min(rough, default=math.inf))

    def _variants(self) -> dict[Key, Variant]:
        return {
            (peer, variant.label): variant
            for peer, families in self.families.items()
            for variants in families.values()
            for variant in variants
        }

    def time(self, searched: dict[str, list[Rung]]) -> dict[Key, Any]:
        """Seconds of the candidates, of otloss's plain call and of the floor."""
        variants = self._variants()
        calls: dict[Key, timing.Call] = {
            (peer, setting): variants[peer, setting].call
            for peer, families in searched.items()
            for target in TARGETS
            for setting in _candidates(families, f"{target:g}")
        }
        rough = {
            (peer, rung["setting"]): rung["rough_seconds"]
            for peer, families in searched.items()
            for family in families
            for rung in family["rungs"]
        }
        if (OWN, DEFAULT) in variants:
            calls[OWN, DEFAULT] = variants[OWN, DEFAULT].call
            rough[OWN, DEFAULT] = max(s for (peer, _), s in rough.items() if peer == OWN)
        if self.floor:
            calls[FLOOR, ""] = self.floor
        options = self.context.options
        return timing.interleaved(
            calls, options.repetitions, self.context.timer, budget=BUDGET_SECONDS, expected=rough
        )

    def passes(self, peer: str, setting: str) -> int | None:
        count = self._variants()[peer, setting].passes
        return None if count is None else count()

    def default_errors(self) -> dict[str, float]:
        return self.solution.errors(*self._variants()[OWN, DEFAULT].call())


def _target(
    case: _Case, peer: str, families: list[Rung], target: float, samples: dict[Key, Any]
) -> Rung:
    """What a peer needs for a target: its fastest setting, time and passes; or why it has none."""
    entry: Rung = {"peer": peer, "target": target}
    timed = {s: samples[peer, s] for s in _candidates(families, f"{target:g}")}
    if not timed:
        return {**entry, "setting": None, "seconds": None, "passes": None, **_closest(families)}
    setting = min(timed, key=lambda s: float(timing.statistics(timed[s])["median"]))
    rungs = {rung["setting"]: rung for family in families for rung in family["rungs"]}
    return {
        **entry,
        "setting": setting,
        "gradient_error": rungs[setting]["gradient_error"],
        "seconds": timing.statistics(timed[setting]),
        "passes": case.passes(peer, setting),
    }


def _add_ratios(targets: list[Rung], floor: dict[str, float] | None) -> None:
    """How many times otloss's time and the floor's a peer takes, or took before it gave up."""
    own = {
        t["target"]: t["seconds"]["median"] for t in targets if t["peer"] == OWN and t["seconds"]
    }
    for entry in targets:
        ours = own.get(entry["target"])
        seconds = entry["seconds"]["median"] if entry["seconds"] else entry["at_least"]
        entry["ratio_to_otloss"] = seconds / ours if seconds and ours else None
        entry["ratio_to_floor"] = seconds / floor["median"] if seconds and floor else None


def _measure(case: _Case, peers: list[str], known: dict[str, list[Rung]]) -> Rung:
    """The parts of a case's record that this run makes."""
    searched = case.search(peers, known)
    samples = case.time(searched)
    floor = timing.statistics(samples[FLOOR, ""]) if case.floor else None
    targets = [
        _target(case, peer, searched[peer], target, samples)
        for peer in peers
        for target in TARGETS
        if searched[peer]
    ]
    _add_ratios(targets, floor)
    default = None
    if (OWN, DEFAULT) in samples:
        default = {
            "seconds": timing.statistics(samples[OWN, DEFAULT]),
            **case.default_errors(),
        }
    return {
        "floor": floor,
        "default": default,
        "families": [family for peer in peers for family in searched[peer]],
        "targets": targets,
    }


# -------------------------------------------------------------------------------- all cases


def _identity(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case[k] for k in ("workload", "n", "eps", "threads"))


def _selected(context: Context) -> list[tuple[str, int, float]]:
    options = context.options
    names, sizes, values = options.workloads, options.accuracy_sizes, options.accuracy_eps
    if options.quick:
        names, sizes, values = QUICK["workloads"], QUICK["sizes"], QUICK["eps"]
    if names == ("all",):
        names = tuple(workloads.WORKLOADS)
    return [
        (name, n, eps)
        for name in names
        for n in workloads.WORKLOADS[name].sizes
        for eps in workloads.WORKLOADS[name].eps
        if (not sizes or n in sizes) and (not values or eps in values)
    ]


def _describe(problem: workloads.Problem, solution: reference.Solution) -> dict[str, Any]:
    return {
        "title": workloads.WORKLOADS[problem.name].title,
        "data": problem.data,
        "d": problem.x.shape[1],
        "cost": problem.cost,
        "hardness": workloads.hardness(problem),
        "reference_marginal_error": solution.marginal_error,
        "reference_rows": None if solution.rows is None else len(solution.rows),
    }


def _known(cases: list[dict[str, Any]], case: dict[str, Any]) -> dict[str, list[Rung]]:
    """Families found before for the same problem, whatever the number of threads."""
    found: dict[str, list[Rung]] = {}
    for other in cases:
        if _identity(other)[:3] == _identity(case)[:3]:
            for peer in {f["peer"] for f in other["families"]}:
                found[peer] = [f for f in other["families"] if f["peer"] == peer]
    return found


def _merge(old: dict[str, Any], new: dict[str, Any], peers: list[str]) -> dict[str, Any]:
    """Peers measured now replace what was known of them; the others stay."""
    merged = {**old, **new}
    for part in ("families", "targets"):
        kept = [entry for entry in old.get(part, []) if entry["peer"] not in peers]
        merged[part] = new[part] + kept
    merged["measured"] = old.get("measured", {}) | new["measured"]
    return merged


def _short(value: Any) -> Any:
    """Numbers to four digits: the result is long."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_short(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _save(context: Context, case: dict[str, Any], peers: list[str]) -> None:
    """Put one case into the result on disk, which another run may have changed meanwhile."""
    cases = context.earlier().get("cases", [])
    old = next((c for c in cases if _identity(c) == _identity(case)), {})
    cases = [c for c in cases if c is not old] + [_merge(old, case, peers)]
    order = list(workloads.WORKLOADS)
    cases.sort(key=lambda c: (c["threads"], order.index(c["workload"]), c["n"], -c["eps"]))
    bars = [_bar(c, target) for c in cases for target in TARGETS]
    context.save({"cases": [_short(c) for c in cases], "bars": bars, "targets": list(TARGETS)})


def _bar(case: dict[str, Any], target: float) -> dict[str, Any]:
    """The case against its bar at a target: otloss, its best rival, the ratios, the verdict.

    A rival that gave up counts with the time it had taken. ``met`` is None where there is no bar,
    and where that time is too short to tell.
    """
    entries = [t for t in case["targets"] if t["target"] == target]
    own = next((t for t in entries if t["peer"] == OWN), None)
    rivals = [t for t in entries if t["peer"] != OWN and t["ratio_to_otloss"]]
    large = case["n"] >= LEAST_LARGE and case["d"] == LARGE_DIMENSION
    if large:
        rivals = [t for t in rivals if t["peer"] == LARGE_PEER]
    best = min(rivals, key=lambda t: t["ratio_to_otloss"], default=None)
    ratio = best["ratio_to_otloss"] if best else None
    floor = own and own["ratio_to_floor"]
    bar = LARGE_BAR if large else SMALL_BAR if case["n"] <= MOST_SMALL else None
    near_floor = not large and floor is not None and floor <= FLOOR_BAR
    met: bool | None = None
    if own is None or own["seconds"] is None:
        met = False
    elif bar is not None:
        met = near_floor or best is None or best["ratio_to_otloss"] >= bar
        if not met and best is not None and best["seconds"] is None:
            met = None
    return {
        **{key: case[key] for key in ("workload", "n", "eps", "threads")},
        "target": target,
        "best_peer": best and best["peer"],
        "best_reaches_it": bool(best and best["seconds"]),
        "ratio": ratio,
        "floor_ratio": floor,
        "met": met,
    }


def _missing(context: Context, old: dict[str, Any] | None) -> list[str]:
    """The peers to measure, with otloss as the yardstick of each."""
    peers = list(context.supporting("divergence"))
    if context.options.again or context.options.search_again or old is None:
        return peers
    missing = [peer for peer in peers if peer not in old["measured"]]
    return [OWN] * (OWN in peers) + [p for p in missing if p != OWN] if missing else []


def _run_case(context: Context, name: str, n: int, eps: float) -> None:
    identity = {"workload": name, "n": n, "eps": eps, "threads": context.options.threads}
    cases = context.earlier().get("cases", [])
    old = next((c for c in cases if _identity(c) == _identity(identity)), None)
    peers = _missing(context, old)
    if not peers:
        return
    problem = workloads.make(name, n, eps)
    case = _Case(context, problem)
    keys = ("date", "commit", "load_average", "clock")
    stamp = {key: context.environment[key] for key in keys}
    measured = {
        **identity,
        **_describe(problem, case.solution),
        **_measure(case, peers, _known(cases, identity)),
        "measured": dict.fromkeys(peers, stamp),
    }
    _save(context, measured, peers)
    print(_case_table([measured]), flush=True)


def run(context: Context) -> dict[str, Any]:
    if context.options.quick:
        context.options.search_seconds = min(context.options.search_seconds, 4.0)
    for name, n, eps in _selected(context):
        try:
            _run_case(context, name, n, eps)
        except workloads.UnavailableError as error:
            context.skipped[f"{name}, n={n}"] = str(error)
            print(f"{name}, n={n}: skipped, {error}", flush=True)
    return context.earlier()


# ------------------------------------------------------------------------------ what it says


def problem_title(case: dict[str, Any]) -> str:
    return f"{case['workload']}, n={case['n']}, eps={case['eps']:g}"


def _cells(case: dict[str, Any], entry: Rung) -> list[str]:
    seconds, ratio = entry["seconds"], entry["ratio_to_otloss"]
    closest = entry.get("closest")
    missed = f" at {closest['gradient_error']:.1e}" if closest else ""
    return [
        f"{problem_title(case)} (h={case['hardness']:.2g}), {case['threads']} thread(s)",
        f"{entry['target']:g}",
        entry["peer"],
        entry["setting"] or f"{entry['miss']}{missed}",
        milliseconds(seconds["median"]) if seconds else "",
        f"{(seconds['q3'] - seconds['q1']) / seconds['median']:.0%}" if seconds else "",
        "" if entry["passes"] is None else str(entry["passes"]),
        (f"{ratio:.1f}x" if seconds else f"> {ratio:.1f}x") if ratio else "",
        f"{entry['ratio_to_floor']:.1f}x" if seconds and entry["ratio_to_floor"] else "",
    ]


def _case_table(cases: list[dict[str, Any]]) -> str:
    rows = [
        _cells(case, entry)
        for case in cases
        for entry in sorted(case["targets"], key=lambda t: -t["target"])
    ]
    header = ["problem", "gradient error", "peer", "setting", "time", "spread", "passes"]
    return text_table([*header, "time / otloss's", "time / floor"], rows)


def _default_rows(cases: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            f"{problem_title(case)}, {case['threads']} thread(s)",
            milliseconds(case["default"]["seconds"]["median"]),
            f"{case['default']['value_error']:.1e}",
            f"{case['default']['gradient_error']:.1e}",
        ]
        for case in cases
        if case["default"]
    ]


def _verdict(bar: dict[str, Any]) -> str:
    more = "" if bar["best_reaches_it"] else "more than "
    best = f"{more}{bar['ratio']:.1f}x {bar['best_peer']}" if bar["ratio"] else "no peer reaches it"
    floor = f", {bar['floor_ratio']:.1f}x the floor" if bar["floor_ratio"] else ""
    said = {True: ": met", False: ": NOT met", None: ""}[bar["met"]]
    return (
        f"{problem_title(bar)}, {bar['threads']} thread(s), {bar['target']:g}: {best}{floor}{said}"
    )


def table(result: dict[str, Any]) -> str:
    header = ["otloss, default call", "time", "value error", "gradient error"]
    parts = [
        _case_table(result["cases"]),
        text_table(header, _default_rows(result["cases"])),
        f"Bars: {SMALL_BAR:g}x the best peer or within {FLOOR_BAR:g}x of the floor up to "
        f"n={MOST_SMALL}; {LARGE_BAR:g}x GeomLoss on KeOps in 3-D from n={LEAST_LARGE} on.\n"
        + "\n".join(map(_verdict, result["bars"])),
    ]
    return "\n\n".join(parts)


def figure(result: dict[str, Any]) -> Any:
    """One work-precision diagram per problem: every rung's error against its first time."""
    from matplotlib.figure import Figure

    cases = [case for case in result["cases"] if case["threads"] == 1]
    columns = min(4, len(cases)) or 1
    lines = max(1, -(-len(cases) // columns))
    fig = Figure(figsize=(3.4 * columns, 2.8 * lines + 0.4), layout="constrained")
    grid = fig.subplots(lines, columns, squeeze=False)
    families = [(f["peer"], f["family"]) for case in cases for f in case["families"]]
    colours = {key: f"C{i % 10}" for i, key in enumerate(dict.fromkeys(families))}
    for axes, case in zip(grid.flat, cases, strict=False):
        _work_precision(axes, case, colours)
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    return fig


def _work_precision(axes: Any, case: dict[str, Any], colours: dict[Key, str]) -> None:
    for family in case["families"]:
        key = family["peer"], family["family"]
        seconds = [rung["rough_seconds"] for rung in family["rungs"]]
        errors = [rung["gradient_error"] for rung in family["rungs"]]
        label = " ".join(key).strip()
        axes.plot(seconds, errors, marker="o", ms=3, lw=1, color=colours[key], label=label)
    if case["floor"]:
        axes.axvline(case["floor"]["median"], color="grey", ls=":", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="gradient error", ylim=(1e-4, 2))
    axes.set_title(f"{problem_title(case)} (h={case['hardness']:.2g})", fontsize=8)
    axes.grid(alpha=0.3)
