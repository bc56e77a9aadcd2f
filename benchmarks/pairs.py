"""Pairs for a minibatch, exact and entropic: ``python -m benchmarks.pairs``.

What flow matching does in every step: from clouds x and y the plan, and from it a partner for each
x. POT's network simplex gives the exact plan; otloss the entropic one at a small eps. CPU time of
the plan with its draw, in turns, on one thread, float32, and the mean cost of the pairs drawn over
that of the exact ones. Printed as the table of ``docs/coming-from.md`` and kept in
``benchmarks/results/pairs.json``.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import ot
import torch
from torch import Tensor

import otloss
from benchmarks.alone import markdown, run

CASES = [(d, n) for d in (2, 784) for n in (128, 256, 512, 1024)]
SHARPNESS = (0.01, 0.001)  # eps over the mean cost
ROUNDS = 5


def clouds(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise, and data of four clusters."""
    rng = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(4, d, generator=rng)
    labels = torch.randint(4, (n,), generator=rng)
    return torch.randn(n, d, generator=rng), centres[labels] + 0.3 * torch.randn(
        n, d, generator=rng
    )


def exact(x: Tensor, y: Tensor) -> Tensor:
    C = ot.dist(x, y)
    return ot.emd(torch.full((len(x),), 1 / len(x)), torch.full((len(y),), 1 / len(y)), C).argmax(1)


def entropic(x: Tensor, y: Tensor, sharpness: float) -> Tensor:
    eps = otloss.suggest_eps(x, y, sharpness=sharpness)
    return otloss.solve_sample(x, y, eps, tol=1e-2, max_iters=5000).sample()[1]


def timed(function: Any, *arguments: Any) -> tuple[float, float]:
    """Milliseconds, and the mean cost of the pairs."""
    start = time.process_time()
    j = function(*arguments)
    taken = 1e3 * (time.process_time() - start)
    x, y = arguments[:2]
    return taken, (x - y[j]).square().sum(-1).mean().item()


def case(d: int, n: int) -> dict[str, Any]:
    ways = [("emd", exact, ()), *((str(s), entropic, (s,)) for s in SHARPNESS)]
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name, *_ in ways}
    for seed in range(ROUNDS):
        x, y = clouds(n, d, seed)
        for name, function, more in ways:
            rounds[name].append(timed(function, x, y, *more))
    row: dict[str, Any] = {"d": d, "n": n}
    for name, found in rounds.items():
        row[f"ms_{name}"] = statistics.median(ms for ms, _ in found)
        costs = [cost / best for (_, cost), (_, best) in zip(found, rounds["emd"], strict=True)]
        row[f"cost_{name}"] = statistics.median(costs)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    head = ["d", "n", "exact, ms"]
    head += [f"eps {s:g} of the mean cost, ms" for s in SHARPNESS]
    head += [f"its cost over exact, {s:g}" for s in SHARPNESS]
    lines = [
        [
            str(row["d"]),
            str(row["n"]),
            *(f"{row[f'ms_{s}']:.1f}" for s in ("emd", *SHARPNESS)),
            *(f"{row[f'cost_{s}']:.3f}" for s in SHARPNESS),
        ]
        for row in rows
    ]
    return markdown(head, lines)


def measure() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    case(2, 32)  # what is paid once
    return [case(*each) for each in CASES]


if __name__ == "__main__":
    run("pairs", __doc__ or "", measure, table)
