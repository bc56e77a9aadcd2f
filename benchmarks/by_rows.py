"""A learned cost function on clouds whose matrix is not stored: time and peak memory.

    python -m benchmarks.by_rows [N ...] [--threads T] [--out FILE]

Each call, a value and the gradient of the points and of the function's parameters, has a process of
its own, as in ``benchmarks.memory``: bytes are peaks of resident memory, torch itself included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import otloss
from benchmarks.environment import record
from benchmarks.memory import ROOT, resident_peak

LOSSES = ("sinkhorn_loss", "sinkhorn_divergence")


def measure(name: str, n: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    to_features = torch.nn.Linear(3, 8)

    def cost(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cdist(to_features(x), to_features(y))

    x, y = torch.randn(n, 3, requires_grad=True), 0.7 * torch.randn(n, 3) + 0.5
    before, start, cpu = resident_peak(), time.perf_counter(), time.process_time()
    options = {"symmetric": True} if name == "sinkhorn_divergence" else {}
    loss = getattr(otloss, name)(x, y, 0.1, cost=cost, method="streamed", **options)
    loss.backward()
    return {
        "loss": name,
        "n": n,
        "threads": threads,
        "value": float(loss.detach()),
        "sweeps": otloss.last_status().n_iters,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_bytes": resident_peak(),
        "added_bytes": resident_peak() - before,
        "matrix_bytes": 4 * n * n,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int, nargs="*", default=[5000, 20_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], int(args.child[1]), args.threads)))
        return
    rows = []
    for n in args.n:
        for name in LOSSES:
            command = [sys.executable, "-m", "benchmarks.by_rows", "--child", name, str(n)]
            command += ["--threads", str(args.threads)]
            run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            rows.append(json.loads(run.stdout))
            print(rows[-1], flush=True)
    if args.out:
        found = {"environment": record({}, torch.device("cpu")), "rows": rows}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
