"""What `method="auto"` chooses for large clouds: ``python -m benchmarks.choice``.

CPU seconds of a divergence and its gradient, multiscale and streamed, beside the local dimension
that otloss measures on a sample: a table of ``docs/multiscale-engine.md``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks.alone import markdown, run
from benchmarks.workloads import WORKLOADS
from otloss import method as methods

N = 6000
HARDNESS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # eps over the mean squared distance to the centre


def _pair(make: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    return make(N), make(N) + 0.1


def _surface(d: int) -> Callable[[int], Tensor]:
    def make(n: int) -> Tensor:
        s, t = 3 * torch.rand(2, n, 1)
        phase = torch.arange(d)
        return ((1 + phase % 3) * s + phase).cos() + ((1 + phase % 2) * t).sin()

    return make


def _with_gaussian(make: Callable[[int], Tensor], d: int, share: float) -> Callable[[int], Tensor]:
    """What looks like few dimensions at most points, and is not."""

    def mixed(n: int) -> Tensor:
        others = int(share * n)
        return torch.cat([make(n - others), torch.randn(others, d)])

    return mixed


def _clouds() -> dict[str, tuple[Tensor, Tensor]]:
    rng = torch.manual_seed(0)
    found = {
        WORKLOADS[name].title: WORKLOADS[name].clouds(N, rng)
        for name in ("shapes_unit", "mixtures_2d", "outliers")
    }
    for d in (3, 4):
        found[f"a Gaussian, d={d}"] = _pair(lambda n, d=d: torch.randn(n, d))
    for d in (2, 3, 4, 5, 6):
        found[f"a full cube, d={d}"] = _pair(lambda n, d=d: torch.rand(n, d))
    for d in (5, 8):
        found[f"a surface, d={d}"] = _pair(_surface(d))
    found["10% a Gaussian, d=8, else a surface"] = _pair(_with_gaussian(_surface(8), 8, 0.1))
    return found


def _seconds(x: Tensor, y: Tensor, eps: float, method: str) -> float:
    x = x.detach().requires_grad_()
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = otloss.sinkhorn_divergence(x, y, eps, method=method, max_iters=100)
    torch.autograd.grad(loss, x)
    return time.process_time() - start


def measure() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows = []
    for title, (x, y) in _clouds().items():
        start = time.process_time()
        dimension = max(methods.local_dimension(z) for z in (x, y))
        sampling = time.process_time() - start
        spread = float((y - y.mean(0)).square().sum(1).mean())
        for hardness in HARDNESS:
            eps = hardness * spread
            row = {"title": title, "hardness": hardness, "dimension": dimension}
            try:
                row |= {m: _seconds(x, y, eps, m) for m in ("multiscale", "streamed")}
            except ValueError:  # float32 does not resolve eps
                continue
            rows.append({**row, "sampling": sampling})
            print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    cells: dict[tuple[str, str], dict[float, str]] = {}
    for r in rows:
        key = (r["title"], f"{r['dimension']:.1f}")
        cells.setdefault(key, {})[r["hardness"]] = f"{r['streamed'] / r['multiscale']:.1f}"
    head = ["eps over the spread", "local dimension", *(f"{h:g}" for h in HARDNESS)]
    return markdown(
        head, [[*key, *(found.get(h, "-") for h in HARDNESS)] for key, found in cells.items()]
    )


if __name__ == "__main__":
    run("choice", (__doc__ or "").partition("\n")[0], measure, table)
