"""Random problems against a float64 oracle that proves itself (tests/certified.py).

    python -m tests.fuzz --out results.jsonl --count 20000      resumes where the file ends
    python -m tests.fuzz --seed 1234 --count 1                  one problem again, in full
    python -m tests.fuzz --report results.jsonl                 the table

Every seed is one problem: clouds, weights, cost, eps, options and a call, drawn over all that is
accepted. OT is the optimal value, which the oracle knows to lie in [low, high]; J the value that
is returned, e the marginal error of the potentials returned, in float64; m the plan's mass, R =
max C - min C, G the largest gradient of the cost between two points, u the machine epsilon of the
dtype. Rounding is r = 128 u (|J| + m (max C + rho)), 2 for max C with the cosine cost, and
relative to the plan w = u (128 + 16 k), k = (max|f| + max|g| + max C) / min(eps, rho). delta is
how far a dual value may be below OT.

check       | bound
refused     | a ValueError only for eps < 4 u max C (1 for the cosine cost, an upper bound where
            | costs are not stored) and for plans that overflow; no other exception
warnings    | none beside ConvergenceWarning
finite      | no NaN, no infinity
flag        | a ConvergenceWarning exactly where `converged` is False
converged   | if `converged`, e <= 1.1 tol, and 8 u max C / eps more where costs are made from
            | points, u (max|f| + max|g|) / eps more where a marginal is soft, since unequal totals
            | move f and g
error       | |marginal_error - e| <= 0.1 e + w
above       | J <= high + r: it is a dual value, converged or not
value       | if converged, J >= low - delta - r, with delta the smaller of 2 tol m (R + eps) (the
            | dual is concave, potentials differ by R) and, balanced, 20 tol |J| (docs/solver.md)
gap         | |J - OT| <= duality_gap, but for rounding in float64, of costs that a function makes
            | for r
sign        | a converged divergence is not negative, where e^(-C / eps) is positive definite
transport   | R (|P - P*| + e m) + w m max C + r, where |P - P*| <= sqrt(3 m delta / eps) in L1
            | (Pinsker), delta that of the potentials returned, or else the one of "value"
plan        | the gradient in C: that L1 distance + w m
points      | the gradient in x and y, norms summed over points: G times that, G of the whole call
            | for w
implicit    | those of transport values: times what the linear system makes of an error in the
            | plan
weights     | as dual potentials the gradients are within delta + r of OT, 8 delta in a
            | divergence; where the marginal is soft (rho + eps) sqrt(3 m (delta + r) / rho) in
            | L1(a)
together    | <a, da> + <b, db> is the derivative of the value as both weights grow, delta + r off
empty bins  | the gradient in a weight of 0 is the softmin of the other potential, 4 eps e m times
            | the largest density of the plan there off (tol for e of a loss), and 4 eps w
padding     | gradient 0 at points of weight 0
iterations  | L of them: 16 u L (m max C + <a, |f|> + <b, |g|>), m the largest total of the weights,
            | the plan and the marginals that it is held to; where a marginal is soft also 16 u
            | eps m_a m_b, and L times 16 u (rho + |f|) of each point of that marginal
unrolled    | their gradients: 2 w L m G, L times that if not at fixed potentials, and 1 + 2 max C
            | / eps times that for transport values

Where the oracle's interval is wider than 1e-6 of its value ("unproven") only values are judged.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .bounds import PROVEN, Judge
from .problems import draw, run


def examine(seed: int) -> dict[str, Any]:
    """All that is to be known of one seed, as a line of the results."""
    start = time.process_time()
    case = draw(seed)
    answer = run(case)
    used = time.process_time() - start
    judge = Judge(case, answer)
    outcome = judge.judge()
    failed = [name for name, ratio in judge.ratios.items() if ratio > 1]
    return {
        "seed": seed, "outcome": outcome, "proven": judge.proven, "failed": failed,
        "ratios": {k: float(f"{v:.3g}") for k, v in judge.ratios.items()}, "notes": judge.notes,
        "case": case.kind, "seconds": round(used, 3),
        "all_seconds": round(time.process_time() - start, 3),
    }  # fmt: skip


def replay(seed: int) -> str:
    return f"python -m tests.fuzz --seed {seed} --count 1"


def seeds_left(out: Path | None, first: int, count: int) -> Iterator[int]:
    done = set()
    if out is not None and out.exists():
        done = {json.loads(line)["seed"] for line in out.read_text().splitlines()}
    return (seed for seed in range(first, first + count) if seed not in done)


def report(lines: list[dict[str, Any]]) -> str:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--out", type=Path, help="JSON lines; seeds in it are not run again")
    parser.add_argument("--report", type=Path, help="only print the table of such a file")
    args = parser.parse_args()
    if args.report is not None:
        print(report([json.loads(line) for line in args.report.read_text().splitlines()]))
        return 0
    torch.set_num_threads(1)
    end, failures, lines = time.monotonic() + args.seconds, 0, []
    for seed in seeds_left(args.out, args.seed, args.count):
        if time.monotonic() > end:
            break
        line = examine(seed)
        lines.append(line)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if line["failed"] or args.count == 1:
            failures += bool(line["failed"])
            print(replay(seed), json.dumps(line, indent=1) if args.count == 1 else line["notes"])
            sys.stdout.flush()
    print(report(lines))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
