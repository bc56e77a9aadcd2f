"""Calls of every kind, over and over: resident memory must not grow.

    PYTHONPATH=. python tests/soak.py --calls 100000

Memory is read once the first tenth of the calls has filled the caches, and at the end.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import otloss

MOST_GROWTH = 5.0  # MB
COSTS = ("sqeuclidean", "euclidean", "cosine")


def resident() -> float:
    """In MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def clouds(pick: random.Random, batch: bool) -> tuple[Tensor, Tensor]:
    lead = (pick.randint(1, 3),) if batch else ()
    d = pick.randint(1, 20)
    x = torch.randn(*lead, pick.randint(1, 60), d, requires_grad=True)
    return x, torch.randn(*lead, pick.randint(1, 60), d)


def loss(pick: random.Random) -> None:
    x, y = clouds(pick, batch=pick.random() < 0.3)
    options = pick.choice([{}, {"objective": "transport"}, {"n_iters": 5}, {"unbalanced": 1.0}])
    method = pick.choice(["dense", "streamed"])
    value = otloss.sinkhorn_divergence(x, y, 1.0, cost=pick.choice(COSTS), method=method, **options)
    value.sum().backward()


def result(pick: random.Random) -> None:
    x, y = clouds(pick, batch=False)
    solved = otloss.solve_sample(x, y, 1.0)
    torch.autograd.grad(solved.plan.square().sum() + solved.value, x)
    otloss.solve_sample(x, y, 0.9, init=solved)


def second_order(pick: random.Random) -> None:
    x, y = clouds(pick, batch=False)
    (grad,) = torch.autograd.grad(otloss.sinkhorn_loss(x, y, 1.0), x, create_graph=True)
    torch.autograd.grad(grad.square().sum(), x)


def refused(pick: random.Random) -> None:
    x, y = clouds(pick, batch=False)
    try:
        otloss.sinkhorn_loss(x, torch.cat([y, y], -1), 1.0)
    except ValueError:
        return
    raise AssertionError("a wrong call was accepted")


KINDS: list[Callable[[random.Random], None]] = [loss, loss, loss, result, refused, second_order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="to stop after")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    pick, start, settled, call = random.Random(given.seed), time.monotonic(), 0.0, 0
    torch.manual_seed(given.seed)
    for call in range(1, given.calls + 1):
        pick.choice(KINDS)(pick)
        late = time.monotonic() - start
        if not settled and (call >= given.calls // 10 or late > given.seconds / 10):
            settled = resident()
        if late > given.seconds:
            break
    growth = resident() - settled
    print(f"{call} calls: resident memory grew by {growth:.1f} MB from {settled:.0f} MB")
    raise SystemExit(growth > MOST_GROWTH)


if __name__ == "__main__":
    main()
