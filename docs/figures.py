"""Writes measurements into the documentation: ``python docs/figures.py``.

README.md and docs/*.md hold, between ``<!-- figures: NAME -->`` and ``<!-- end figures -->``, what
the function NAME below makes of ``benchmarks/results/cpu/*.json``, with the command that measured
it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end figures -->)", re.DOTALL)
PEERS = {"otloss": "otloss", "geomloss": "GeomLoss", "pot": "POT", "torch_logsumexp": "torch loop"}
SIZE = 512  # points of each cloud in the divergence table


def load(suite: str) -> tuple[dict[str, Any], str]:
    """A suite's result, and the sentence that says how it was measured."""
    document = json.loads((RESULTS / f"{suite}.json").read_text())
    environment = document["environment"]
    threads = "one thread" if environment["threads"] == 1 else f"{environment['threads']} threads"
    how = f"`{environment['command']}`, {threads} of an {environment['device']}, float32"
    return document["result"], how


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
        "Nanoseconds per entry and full iteration on a given cost matrix of squared distances\n"
        f"between images ({how}):\n\n"
        f"{table(['n = m, eps', *families], rows)}\n\n"
        f"otloss reads the cost at {' and '.join(shares)}, on buffers of that size.\n"
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


def divergence() -> str:
    result, how = load("divergence")
    rows = []
    for case in result["cases"]:
        if case["n"] != SIZE:
            continue
        targets = {t["peer"]: t for t in case["targets"] if t["target"] == 0.01}
        cells = [
            number(1e3 * targets[p]["seconds"]["median"])
            if targets[p]["seconds"]
            else targets[p]["miss"]
            for p in PEERS
        ]
        rows.append([f"{case['title']}, eps {case['eps']:g}", *cells])
    return (
        f"Milliseconds for a divergence and its gradient to 1%, n = m = {SIZE}, each library at\n"
        f"its cheapest setting that gets there ({how}):\n\n{table(['', *PEERS.values()], rows)}\n"
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
        "Passes for the problem between two clouds until an error is reached (relative for value\n"
        f"and gradient), in float64: `python -m benchmarks.run passes`.\n\n{table(header, rows)}\n"
    )


FIGURES: dict[str, Callable[[], str]] = {
    function.__name__: function for function in (iteration, overhead, divergence, passes)
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
