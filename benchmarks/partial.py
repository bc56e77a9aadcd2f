"""Partial transport next to balanced transport: CPU seconds of a sweep, and memory.

``mass=`` adds a dummy point to either side. By kernels, dense and streamed, a sweep should take
what one of the balanced problem takes, and a call no matrix more. Prints a row for each way: the
nanoseconds per pair and sweep of both (those of 25 iterations less those of 5), of the gradient,
and the peak memory that a partial solve and its gradient add, in a process of its own.

    python -m benchmarks.partial [--points 3000]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import otloss
from benchmarks.memory import resident_peak

WAYS = ("matrix", "streamed")
FEW, MANY, ROUNDS = 5, 25, 5


def problem(way: str, n: int) -> tuple[torch.Tensor, ...]:
    x, y = torch.rand(2, n, 3, generator=torch.Generator().manual_seed(0))
    if way == "streamed":
        return x.clone().requires_grad_(), y
    return (otloss.cost_matrix(x, y).requires_grad_(),)


def solve(way: str, given: tuple[torch.Tensor, ...], **options: Any) -> torch.Tensor:
    if way == "matrix":
        return otloss.solve(*given, 0.05, **options).value
    return otloss.solve_sample(*given, 0.05, method="streamed", **options).value


def cpu_seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def nanoseconds(way: str, n: int, **options: Any) -> tuple[float, float]:
    """Of a sweep and of a gradient, per pair of points."""
    given = problem(way, n)

    def call(count: int) -> torch.Tensor:
        return solve(way, given, n_iters=count, backward="envelope", **options)

    sweeps = cpu_seconds(lambda: call(MANY)) - cpu_seconds(lambda: call(FEW))
    value = call(FEW)
    back = cpu_seconds(lambda: torch.autograd.grad(value, given[0], retain_graph=True))
    return sweeps / (MANY - FEW) / n**2 * 1e9, back / n**2 * 1e9


def added_memory(way: str, n: int) -> float:
    command = [sys.executable, "-m", "benchmarks.partial", "--points", str(n), "--child", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(way: str, n: int) -> None:
    solve(way, problem(way, 50), mass=0.6).backward()  # first use
    given = problem(way, n)
    before = resident_peak()
    solve(way, given, mass=0.6, tol=0.1).backward()
    print((resident_peak() - before) / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description="Partial next to balanced transport.")
    parser.add_argument("--points", type=int, default=3000)
    parser.add_argument("--child", choices=WAYS)
    arguments = parser.parse_args()
    n = arguments.points
    torch.set_num_threads(1)
    if arguments.child:
        child(arguments.child, n)
        return
    print(f"{n} points, float32, one thread; {n * n * 4 / 1e6:.0f} MB of costs")
    print("way        partial  balanced  ratio   gradient  balanced   MB added")
    for way in WAYS:
        sweep, back = nanoseconds(way, n, mass=0.6)
        sweep_balanced, back_balanced = nanoseconds(way, n)
        print(
            f"{way:9} {sweep:8.3f}  {sweep_balanced:8.3f}  {sweep / sweep_balanced:5.2f}   "
            f"{back:8.3f}  {back_balanced:8.3f}   {added_memory(way, n):8.1f}"
        )


if __name__ == "__main__":
    main()
