"""The command line of the fuzzers: problem after problem, results in a file, a table of them."""

from __future__ import annotations

import argparse
import collections
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .bounds import PROVEN

Lines = list[dict[str, Any]]  # of results: a seed, its outcome, ratios to bounds


def arguments(description: str | None, count: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--out", type=Path, help="JSON lines; seeds in it are not run again")
    parser.add_argument("--report", type=Path, help="only print the table of such a file")
    return parser


def lines_of(file: Path | None) -> Lines:
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(
    args: argparse.Namespace, module: str, examine: Callable[[int], Any], table: Callable[..., str]
) -> int:
    """``examine(seed)`` makes the line of a problem, ``table(lines)`` what is said of all."""
    if args.report is not None:
        print(table(lines_of(args.report)))
        return 0
    torch.set_num_threads(1)
    done = {line["seed"] for line in lines_of(args.out)}
    end, lines = time.monotonic() + args.seconds, list[dict[str, Any]]()
    for seed in range(args.seed, args.seed + args.count):
        if time.monotonic() > end:
            break
        if seed in done:
            continue
        line = examine(seed)
        lines.append(line)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if args.count == 1:
            print(json.dumps(line, indent=1))
        elif line["failed"]:
            print(f"python -m {module} --seed {seed} --count 1", line["notes"], flush=True)
    print(table(lines))
    return int(any(line["failed"] for line in lines))


def report(lines: Lines) -> str:
    """The table of results, in Markdown."""
    outcomes = collections.Counter(line["outcome"] for line in lines)
    text = [f"{len(lines)} problems: " + ", ".join(f"{n} {k}" for k, n in outcomes.most_common())]
    unproven = sum(not line["proven"] for line in lines)
    text += [f"{unproven} that the oracle does not prove to {PROVEN:g}.", ""]
    text += [
        "| check | problems | outside | worst ratio to the bound | 99% |",
        "|---|---:|---:|---:|---:|",
    ]
    names = sorted({name for line in lines for name in line["ratios"]})
    for name in names:
        ratios = sorted(line["ratios"][name] for line in lines if name in line["ratios"])
        outside = sum(ratio > 1 for ratio in ratios)
        high = ratios[int(0.99 * (len(ratios) - 1))]
        text.append(f"| {name} | {len(ratios)} | {outside} | {ratios[-1]:.2g} | {high:.2g} |")
    return "\n".join(text)
