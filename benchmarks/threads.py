"""Two threads for one large problem, beside what the machine's two threads can do at all.

    python -m benchmarks.threads            # 100 000 points, blur .05 and .01

Speed-up is wall time of one thread over that of two. Where other work takes the machine's time wall
time says little: "balanced" is CPU time of one thread over that of the busier of two, what the
speed-up would be if both ran. The limit is that of hashing in two threads, which shares nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.memory import ROOT
from benchmarks.process import set_thread_variables

ROUNDS = 3


def busiest() -> float:
    """CPU seconds of this process's busiest thread."""
    ticks = os.sysconf("SC_CLK_TCK")
    fields = [
        p.read_text().rpartition(")")[2].split() for p in Path("/proc/self/task").glob("*/stat")
    ]
    return max(int(f[11]) + int(f[12]) for f in fields) / ticks


def hashing(threads: int) -> Callable[[], None]:
    def work() -> None:
        hashlib.pbkdf2_hmac("sha256", b"otloss", b"salt", 6_000_000 // threads)

    def call() -> None:
        each = [threading.Thread(target=work) for _ in range(threads - 1)]
        for thread in each:
            thread.start()
        work()
        for thread in each:
            thread.join()

    return call


def solving(n: int, eps: float) -> Callable[[], None]:
    import torch

    import otloss
    from benchmarks import workloads

    problem = workloads.make("shapes_unit", n, eps)

    def call() -> None:
        x = problem.x.detach().requires_grad_()
        value = otloss.sinkhorn_divergence(x, problem.y, eps, method="multiscale")
        torch.autograd.grad(value, x)

    return call


def child(n: int, eps: float, threads: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    call = solving(n, eps) if n else hashing(threads)
    before, wall = busiest(), time.perf_counter()
    call()
    return {"wall": time.perf_counter() - wall, "busiest": busiest() - before}


def measured(n: int, eps: float, threads: int) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.threads",
        "--child",
        str(n),
        str(eps),
        str(threads),
    ]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # waiting is no work
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        n, eps, threads = args.child
        set_thread_variables(int(threads))
        print(json.dumps(child(int(n), float(eps), int(threads))))
        return
    print(f"{'':>20}{'wall 1':>9}{'wall 2':>9}{'speed-up':>10}{'balanced':>10}")
    for name, n, eps in (
        ("hashing", 0, 0.0),
        ("blur .05", args.points, 5e-3),
        ("blur .01", args.points, 2e-4),
    ):
        rounds = [[measured(n, eps, threads) for threads in (1, 2)] for _ in range(ROUNDS)]
        one, two = (
            {k: statistics.median(r[t][k] for r in rounds) for k in ("wall", "busiest")}
            for t in (0, 1)
        )
        row = one["wall"], two["wall"], one["wall"] / two["wall"], one["busiest"] / two["busiest"]
        print(f"{name:>20}" + "".join(f"{v:>10.2f}" for v in row))


if __name__ == "__main__":
    main()
