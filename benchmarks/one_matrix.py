"""One cost matrix against many weights, beside a copy of the matrix for every problem: time and
peak memory.

    python -m benchmarks.one_matrix [--problems B] [--n N] [--threads T]

Each call has a process of its own, as in ``benchmarks.memory``; bytes are what it added.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch

import otloss
from benchmarks.memory import ROOT, resident_peak

GRADIENTS = ("none", "weights", "matrix")


def measure(matrices: str, wanted: str, problems: int, n: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    C, (a, b) = torch.rand(n, n), (torch.rand(problems, n).softmax(-1) for _ in "ab")
    C.requires_grad_(wanted == "matrix")
    a.requires_grad_(wanted == "weights")
    otloss.solve(C[:9, :9], 0.05)  # what is loaded at the first call
    before, start, cpu = resident_peak(), time.perf_counter(), time.process_time()
    given = C if matrices == "one" else C.expand(problems, n, n).contiguous()
    value = otloss.solve(given, 0.05, a=a, b=b).value.sum()
    if wanted != "none":
        value.backward()
    return {
        "matrices": matrices,
        "gradient": wanted,
        "wall_seconds": round(time.perf_counter() - start, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "added_MB": round((resident_peak() - before) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = args.problems, args.n, args.threads
    if args.child:
        print(json.dumps(measure(*args.child, *sizes)))
        return
    for wanted in GRADIENTS:
        for matrices in ("copies", "one"):
            command = [sys.executable, "-m", "benchmarks.one_matrix", "--child", matrices, wanted]
            for name, value in zip(("problems", "n", "threads"), sizes, strict=True):
                command += [f"--{name}", str(value)]
            run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            print(run.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
