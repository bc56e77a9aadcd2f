"""Writes measurements into the documentation: ``python docs/figures.py``.

README.md and docs/*.md hold, between ``<!-- figures: NAME -->`` and ``<!-- end figures -->``, what
the function NAME below makes of ``benchmarks/results/cpu/*.json``, with the command that measured
it.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end figures -->)", re.DOTALL)
PEERS = {
    "otloss": "otloss",
    "geomloss": "GeomLoss",
    "pot": "POT",
    "ott": "OTT-JAX",
    "keops": "KeOps loop",
    "torch_logsumexp": "torch loop",
}
# The first table's choice of the accuracy suite's cases: workload, n, eps.
SELECTED = (
    ("fashion_blurred", 500, 10.0),
    ("fashion_blurred", 500, 1.0),
    ("fashion_blurred_euclidean", 500, 1.0),
    ("cosine_features", 1000, 0.002),
    ("gaussians_64d", 1000, 5.0),
    ("shapes_3d", 2000, 5e-3),
    ("shapes_3d", 2000, 2e-4),
    ("shapes_3d", 10_000, 5e-3),
)


def load(suite: str) -> tuple[dict[str, Any], str]:
    """A suite's result, and the sentence that says how it was measured."""
    document = json.loads((RESULTS / f"{suite}.json").read_text())
    environment = document["environment"]
    threads = "one thread" if environment["threads"] == 1 else f"{environment['threads']} threads"
    how = f"`{environment['command']}`, {threads} of an {device(environment)}, float32"
    return document["result"], how


def device(environment: dict[str, Any]) -> str:
    """The processor, whose name does not tell its generation, with what does."""
    level1 = environment.get("caches", {}).get("L1 Data", "")
    return environment["device"] + (f" with {level1} of L1" if level1 else "")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def number(value: float) -> str:
    """Two or three significant digits."""
    digits = 2 if value < 1 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def iteration() -> str:
    result, how = load("iteration")
    families = list(dict.fromkeys(row["family"] for row in result["rows"]))
    cells = {(r["n"], r["eps"], r["family"]): r["ns_per_entry"]["median"] for r in result["rows"]}
    rows = [
        [f"{n}, {eps:g}"]
        + [number(cells[n, eps, f]) if (n, eps, f) in cells else "overflows" for f in families]
        for n, eps in dict.fromkeys((row["n"], row["eps"]) for row in result["rows"])
    ]
    shares = [
        f"{p['bandwidth']['share']['otloss']['same size']:.0%} of the copy bandwidth at n={p['n']}"
        for p in {p["n"]: p for p in result["problems"] if p["bandwidth"]}.values()
    ]
    return (
        "Nanoseconds per entry and sweep, on a given cost matrix of squared distances between\n"
        f"images ({how}):\n\n"
        f"{table(['n = m, eps', *families], rows)}\n\n"
        f"otloss reads the matrix at {' and '.join(shares)}, measured on\n"
        "buffers of the size of the matrix.\n"
    )


def sweeps() -> str:
    from benchmarks.suites.sweeps import ROWS, cells

    result, how = load("sweeps")
    header = ["columns", "made from points", "given", "made, AVX2", "made, SSE2"]
    flushed = " and ".join(
        f"{row['over_flushed']:.2f} times (`{row['call']}`, n = {row['n']})"
        for row in result["denormals"]
    )
    return (
        f"Nanoseconds per entry and sweep of {ROWS} rows of whole vectors, in parentheses over\n"
        f"those of the rounded number of columns ({how}):\n\n{table(header, cells(result))}\n\n"
        f"Streamed solves in 3-D at a small ε take {flushed} the time that they\n"
        "take where torch flushes denormal numbers to 0.\n"
    )


def costs() -> str:
    result, how = load("costs")
    names = list(dict.fromkeys(row["cost"] for row in result["rows"]))
    cells: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        times = [row[part]["median"] for part in ("forward", "gradient")]
        rate = 2 * row["n"] ** 2 * row["d"] / times[0] / 1e9
        text = f"{milliseconds(times[0])} / {milliseconds(times[1])} ({rate:.0f})"
        cells.setdefault(f"n = {row['n']}, d = {row['d']}", {})[row["cost"]] = text
    rows = [[title, *(found[name] for name in names)] for title, found in cells.items()]
    return (
        "Milliseconds for a matrix of squared distances / for the matrix and the gradient of one\n"
        f"cloud; in parentheses the GFLOP/s of the product in the matrix ({how}):\n\n"
        f"{table(['', *names], rows)}\n"
    )


def products() -> str:
    from benchmarks.suites.products import cells

    result, how = load("products")
    header = ["n = m, d", "GFLOP/s", "torch's whole", "product, AVX-512", "AVX2", "SSE2"]
    return (
        "The time of torch over that of a cost matrix / of the gradient of one cloud: of all that\n"
        f"torch does for it, and of its product alone, by instruction set ({how}):\n\n"
        f"{table(header, cells(result))}\n"
    )


def products_two_threads() -> str:
    from benchmarks.suites.products import cells

    result, how = load("products_two_threads")
    header = ["n = m, d", "GFLOP/s", "torch's whole", "its product"]
    rows = [row[: len(header)] for row in cells(result)]
    return f"The same with two threads, by wall time ({how}):\n\n{table(header, rows)}\n"


def floors_two_threads() -> str:
    """The rows of another checkout are those of this one with one thread."""
    result, how = load("floors_two_threads")
    two, one = ([r for r in result["rows"] if r["against"] is single] for single in (False, True))
    rows = [
        [b["case"], milliseconds(a["both"]), milliseconds(b["both"])]
        + [number(a[part] / b[part]) for part in ("both", "floor")]
        for a, b in zip(one, two, strict=True)
    ]
    header = ["", "one thread", "two threads", "ratio", "ratio of torch's products"]
    return (
        "Milliseconds by the wall clock for the value and gradient of a minibatch's divergence\n"
        f"({how.removesuffix(', float32')}):\n\n{table(header, rows)}\n"
    )


def floors() -> str:
    result, how = load("floors")
    how, rows = how.removesuffix(", float32"), []
    before = {row["case"]: row["both"] for row in result["rows"] if row["against"]}
    for row in result["rows"]:
        if row["against"]:  # another checkout's times
            continue
        parts = (row["both"], row["forward"], row["both"] - row["forward"])
        times = [milliseconds(row[part]) for part in ("both", "floor")]
        ratios = [part / row["floor"] for part in parts] + [row["both"] / before[row["case"]]]
        rows.append([row["case"], *times, *map(number, ratios)])
    header = ["", "loss and gradient", "five products", "over these", "loss", "gradient"]
    header.append("over another checkout")
    return (
        "Milliseconds for the divergence of a minibatch and its gradient in one cloud, for five\n"
        "products by torch, and the first over the second, in all and in parts; last, over what\n"
        f"another checkout takes ({how}):\n\n"
        f"{table(header, rows)}\n"
    )


def overhead() -> str:
    result, how = load("overhead")
    rows = [
        [row["peer"], number(row["microseconds"]["median"]), f"{row['gradient_error']:.0e}"]
        for row in result["rows"]
    ]
    header = ["", "µs", "gradient error"]
    return (
        "One small call, value and gradient, n = m = 32, d = 8, 10 iterations or values of eps\n"
        f"({how}):\n\n{table(header, rows)}\n"
    )


def milliseconds(seconds: float) -> str:
    """In milliseconds, to two digits, never with an exponent."""
    rounded = 1e3 * float(f"{seconds:.2g}")
    return f"{rounded:.2g}" if rounded < 100 else f"{rounded:.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def problem_title(case: dict[str, Any]) -> str:
    return f"{case['title']}, n = {case['n']}, eps {case['eps']:g}"


def peer_time(case: dict[str, Any], peer: str, target: float) -> str:
    """Milliseconds to the target; or how long a peer was given, and the error it had."""
    found = (t for t in case["targets"] if (t["peer"], t["target"]) == (peer, target))
    entry = next(found, None)
    if entry is None:
        return ""
    if entry["seconds"]:
        return milliseconds(entry["seconds"]["median"])
    closest = entry["closest"]
    fails = closest is None or closest["gradient_error"] > 1e3
    error = "fails" if fails else f"error {percent(closest['gradient_error'])}"
    return f"> {milliseconds(entry['at_least'])} ({error})" if entry["at_least"] else f"- ({error})"


def peer_times(cases: list[dict[str, Any]], target: float) -> str:
    rows = [
        [problem_title(case)]
        + [peer_time(case, peer, target) for peer in PEERS]
        + [milliseconds(case["floor"]["median"]) if case["floor"] else ""]
        for case in cases
    ]
    return table(["", *PEERS.values(), "products"], rows)


def accuracy_cases(threads: int) -> tuple[list[dict[str, Any]], str]:
    result, _ = load("accuracy")
    document = json.loads((RESULTS / "accuracy.json").read_text())
    cases = [case for case in result["cases"] if case["threads"] == threads]
    clocks = {stamp["clock"] for case in cases for stamp in case["measured"].values()}
    clock = "CPU time" if clocks == {"cpu"} else "wall time"
    many = "one thread" if threads == 1 else f"{threads} threads"
    how = f"`python -m benchmarks.run accuracy`, {clock}, {many} of an "
    return cases, f"{how}{device(document['environment'])}, float32"


def accuracy() -> str:
    cases, how = accuracy_cases(1)
    chosen = [c for c in cases if (c["workload"], c["n"], c["eps"]) in SELECTED]
    return (
        "Milliseconds for a Sinkhorn divergence and its gradient to 1%, each library at its\n"
        f"cheapest setting that gets there ({how}):\n\n{peer_times(chosen, 0.01)}\n\n"
        '"> 100 (error 5%)" was given 100 ms and still had an error of 5%, "-" has no setting\n'
        'that gets there. "Products" are five matrix products, three for costs and two for\n'
        "gradients.\n"
    )


def accuracy_all() -> str:
    parts = []
    for target in (0.01, 0.001):
        cases, how = accuracy_cases(1)
        parts.append(f"Milliseconds to a gradient error of {percent(target)} ({how}):\n")
        parts.append(peer_times(cases, target) + "\n")
    return "\n".join(parts)


def accuracy_bars() -> str:
    result, _ = load("accuracy")
    columns = sorted({(bar["threads"], -bar["target"]) for bar in result["bars"]})
    cells: dict[tuple[Any, ...], dict[Any, str]] = {}
    for bar in result["bars"]:
        key = (bar["workload"], bar["n"], bar["eps"])
        cells.setdefault(key, {})[bar["threads"], -bar["target"]] = bar_cell(bar)
    titles = {(c["workload"], c["n"], c["eps"]): problem_title(c) for c in result["cases"]}
    rows = [
        [titles[key], *(found.get(column, "") for column in columns)]
        for key, found in cells.items()
    ]
    heads = [
        f"{threads} thread{'s' * (threads > 1)}, {percent(-target)}" for threads, target in columns
    ]
    judged = [bar["met"] for bar in result["bars"] if bar["met"] is not None]
    met = f"All {len(judged)}" if all(judged) else f"{sum(judged)} of {len(judged)}"
    return f"{table(['', *heads], rows)}\n\n{met} targets are met. A missed one is in bold.\n"


def bar_cell(bar: dict[str, Any]) -> str:
    more = "" if bar["best_reaches_it"] else "> "
    ratio = f"{more}{bar['ratio']:.1f}x {PEERS[bar['best_peer']]}" if bar["ratio"] else "no peer"
    floor = f", {bar['floor_ratio']:.1f}x floor" if bar["floor_ratio"] else ""
    return f"**{ratio}{floor}**" if bar["met"] is False else f"{ratio}{floor}"


def accuracy_passes() -> str:
    cases, _ = accuracy_cases(1)

    def cell(case: dict[str, Any], peer: str) -> str:
        entries = {t["target"]: t for t in case["targets"] if t["peer"] == peer}
        counts = [str(entries[t]["passes"] or "-") for t in (0.01, 0.001) if t in entries]
        return " / ".join(counts)

    rows = [[problem_title(case), *(cell(case, peer) for peer in PEERS)] for case in cases]
    text = table(["", *PEERS.values()], rows)
    return f"Passes to an error of 1% / 0.1%, at the settings timed above:\n\n{text}\n"


def training_step() -> str:
    result, how = load("training_step")
    parts = list(result["rows"][0]["seconds"])
    rows = [
        [row["loss"]]
        + [number(1e3 * row["seconds"][part]["median"]) for part in parts]
        + [f"{row['share']:.0%}", f"{row['floor_share']:.0%}"]
        for row in result["rows"]
    ]
    header = ["loss", *parts, "share of the loss", "share of its products alone"]
    return (
        "Milliseconds in one training step of an MLP generator of 28x28 images\n"
        f"({result['data']}; {how}):\n\n"
        f"{table(header, rows)}\n"
    )


def memory() -> str:
    result, _ = load("memory")
    small: dict[str, dict[str, str]] = {}
    large = []
    for row in result["rows"]:
        problem = f"{row['title']}, n = {row['n']}, eps {row['eps']:g}"
        added = row["added_bytes"] and f"{row['added_bytes'] / 2**20:.0f}"
        peer = f"{PEERS[row['peer']]} {row['setting']}".strip()
        if added and row["gradient_error"] is not None:
            cells = [added, number(row["cpu_seconds"]), percent(row["gradient_error"])]
            large.append([problem, peer, *cells])
        elif added:  # a time without its error says nothing, and small ones contain first calls
            small.setdefault(problem, {})[row["peer"]] = added
        elif row.get("given_up_seconds"):
            given_up = f"not done after {row['given_up_seconds']:.0f}"
            large.append([problem, peer, "", given_up, ""])
    peers = [peer for peer in PEERS if any(peer in found for found in small.values())]
    rows = [[name, *(found.get(peer, "") for peer in peers)] for name, found in small.items()]
    header = ["", "", "peak memory added, MiB", "CPU seconds", "gradient error"]
    return (
        "Peak memory added by one divergence and its gradient, MiB, each in a process of its own\n"
        "on one thread (`python -m benchmarks.run memory`):\n\n"
        f"{table(['', *(PEERS[peer] for peer in peers)], rows)}\n\n"
        f"A large problem, with its time and error:\n\n{table(header, large)}\n"
    )


def passes() -> str:
    result, _ = load("passes")
    names = list(result["rows"][0]["passes"])
    names.sort(key=lambda name: (name.split()[0], -float(name.split()[1])))
    rows = [
        [f"{r['workload']}, {r['eps']:g} ({r['hardness']:.2g}), {r['method']}"]
        + [str(r["passes"].get(name, "-")) for name in names]
        for r in result["rows"]
    ]
    header = ["workload, eps (eps / sigma), method", *names]
    return (
        "Passes for the problem between two clouds until an error is reached (of value and\n"
        "gradient relative to the divergence's), in float64, searches for large entries counted\n"
        f"as two: `python -m benchmarks.run passes`.\n\n{table(header, rows)}\n"
    )


def large() -> str:
    from benchmarks.suites import large as suite

    result, how = load("large")
    rows, where = result["rows"], how.rpartition("`, ")[2]
    sizes = sorted({row["n"] for row in rows})
    lines = []
    for key in dict.fromkeys((r["title"], r["eps"], r["method"]) for r in rows):
        own = {r["n"]: r for r in rows if (r["title"], r["eps"], r["method"]) == key}
        cells = [_seconds_and_error(own[n]) if n in own else "" for n in sizes]
        method = key[2].removeprefix("otloss ").replace("geomloss", "GeomLoss")
        head = [f"{key[0]}, blur {suite.blur(key[1])}", method]
        lines.append([*head, *cells, *_growth([r for r in own.values() if "cpu_seconds" in r])])
    header = ["", "method", *(f"{n:,}" for n in sizes), "exponent", "MiB"]
    return (
        "CPU seconds of a divergence and its gradient in one cloud of n = m points, and the error\n"
        "of the gradient; the exponent of n from 30,000 points on, and the memory that the call\n"
        f"adds with most points. Each in a process of its own, {where}\n"
        "(`python -m benchmarks.run large`, in parts: `benchmarks/results/cpu/large.json` has the\n"
        "command of each). The gradient is compared with the converged one, beyond 10,000 points\n"
        "in 256 rows, computed in float64 from all pairs.\n\n"
        f"{table(header, lines)}\n"
    )


def _seconds_and_error(row: dict[str, Any]) -> str:
    if "cpu_seconds" not in row:
        return str(row["outcome"])
    error = row["gradient_error"]
    return number(row["cpu_seconds"]) + ("" if error is None else f" s, {percent(error)}")


def _growth(rows: list[dict[str, Any]]) -> list[str]:
    """The exponent of n, from 30,000 on, and the memory of the largest."""
    if not rows:
        return ["", ""]
    last, exponent = rows[-1], ""
    first = next((row for row in rows if row["n"] >= 30_000), last)
    if first is not last:
        times = math.log(last["cpu_seconds"] / first["cpu_seconds"])
        exponent = f"{times / math.log(last['n'] / first['n']):.2f}"
    return [exponent, f"{last['added_bytes'] / 2**20:.0f}"]


def choice() -> str:
    from benchmarks.choice import N, table

    document = json.loads((RESULTS.parent / "choice.json").read_text())
    environment, rows = document["environment"], document["result"]
    return (
        f"CPU time of a divergence and its gradient, streamed over multiscale, of {N} points,\n"
        f"one thread (`{environment['command']}`):\n\n{table(rows)}\n"
    )


def pairs() -> str:
    from benchmarks.pairs import table

    document = json.loads((RESULTS.parent / "pairs.json").read_text())
    return (
        "CPU milliseconds of the plan and the draw on one thread, and the mean cost of the pairs\n"
        f"(`{document['environment']['command']}`: noise and four clusters, float32,\n"
        "`tol=1e-2`):\n\n"
        f"{table(document['result'])}\n"
    )


FIGURES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        iteration,
        sweeps,
        costs,
        products,
        products_two_threads,
        floors,
        floors_two_threads,
        overhead,
        accuracy,
        accuracy_all,
        accuracy_bars,
        accuracy_passes,
        training_step,
        memory,
        passes,
        large,
        choice,
        pairs,
    )
}


def main() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        old = page.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda m: f"{m[1]}\n{FIGURES[m[2]]()}\n{m[3]}", old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
