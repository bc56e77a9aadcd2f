"""One checkout's times, in a process of its own: ``python floor.py CHECKOUT PROBLEMS CLOCK``.

For every line on standard input, the index of a problem in the file PROBLEMS, one line on standard
output: seconds of the loss with its gradient, of the loss alone, and of its floor. The clock "cpu"
is that of the thread that works most.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from time import perf_counter, process_time, thread_time
from typing import Any

import torch

SHORTEST = 5e-3  # seconds of a sample


def calls(problem: dict[str, Any]) -> list[Callable[[], object]]:
    import otloss

    x, y, eps, cost = (problem[key] for key in ("x", "y", "eps", "cost"))
    moving, plan = x.clone().requires_grad_(), torch.rand(len(x), len(y), dtype=x.dtype)

    def both() -> object:
        loss = otloss.sinkhorn_divergence(moving, y, eps, cost=cost)
        return torch.autograd.grad(loss, moving)

    def floor() -> object:
        """What no method can do without: three costs, and the gradient's two products."""
        return x @ y.T, x @ x.T, y @ y.T, plan @ y, plan @ x

    return [both, lambda: otloss.sinkhorn_divergence(x, y, eps, cost=cost), floor]


def main() -> None:
    sys.path[0], problems, clock = sys.argv[1:]
    threads = int(sys.stdin.readline())
    torch.set_num_threads(threads)

    def seconds(call: Callable[[], object], count: int) -> float:
        wall, own, every = perf_counter(), thread_time(), process_time()
        for _ in range(count):
            call()
        if clock == "wall":
            return (perf_counter() - wall) / count
        own, every = thread_time() - own, process_time() - every
        return max(own, (every - own) / max(1, threads - 1)) / count

    warm = []
    for problem in torch.load(problems):
        of_problem = calls(problem)
        once = [max(seconds(call, 1) for _ in range(3)) for call in of_problem]
        warm.append((of_problem, [max(1, round(SHORTEST / t)) for t in once]))
    for line in sys.stdin:
        of_problem, counts = warm[int(line)]
        of_problem[0]()  # other problems left the caches and the heap to themselves
        measured = [seconds(*pair) for pair in zip(of_problem, counts, strict=True)]
        print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
