"""``python -m otloss.check``: whether the kernels of this build compute on this machine what plain
torch computes, on every device, in all modes, costs, dtypes and launch layouts. For reports."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

import otloss
from otloss.costs import COSTS

__all__ = ["main"]

LAYOUTS = ("auto", "block", "cluster", "dense", "streamed")


def main() -> int:
    otloss.show_config()
    devices = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    failed = 0
    for device in devices:
        ran = wrong = 0
        for name, error in _compared(torch.device(device)):
            ran += 1
            if error:
                wrong += 1
                print(f"{device}: {name}: {error}", flush=True)
        print(f"{device}: {ran} calls compared with plain torch, {wrong} wrong", flush=True)
        failed += wrong
    return 1 if failed else 0


def _compared(device: torch.device) -> Iterator[tuple[str, str | None]]:
    """Names of calls, and what is wrong with each; those that a layout cannot hold are left out."""
    modes: list[dict[str, Any]] = [
        {"eps": math.inf},  # the energy distance
        {},
        {"unbalanced": (0.3, None)},
        {"objective": "transport"},
        {"objective": "transport", "backward": "envelope"},
        {"n_iters": 4},
    ]
    layouts = LAYOUTS if device.type == "cuda" else LAYOUTS[:1]
    dtypes, shapes = (torch.float32, torch.float64), ((1, 1, 2), (20, 31, 3), (130, 100, 17))
    before = os.environ.get("OTLOSS_CUDA_REGIME")
    try:
        for layout, method in itertools.product(layouts, ("dense", "streamed")):
            if layout not in ("auto", "streamed") and method == "streamed":
                continue
            os.environ["OTLOSS_CUDA_REGIME"] = layout
            for cost, dtype, shape, mode in itertools.product(COSTS, dtypes, shapes, modes):
                words = [layout] if device.type == "cuda" else []
                words += [method, cost, str(dtype)[6:], str(shape)]
                words += [f"{key}={value}" for key, value in mode.items()]
                try:
                    error = _error(device, method, cost, dtype, shape, mode)
                except RuntimeError as raised:
                    if "OTLOSS_CUDA_REGIME" in str(raised):
                        continue  # a layout that cannot hold the problem
                    yield " ".join(words), str(raised).splitlines()[0]
                else:
                    yield " ".join(words), error
    finally:
        os.environ.pop("OTLOSS_CUDA_REGIME")
        if before is not None:
            os.environ["OTLOSS_CUDA_REGIME"] = before


def _error(
    device: torch.device,
    method: Any,
    cost: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    mode: dict[str, Any],
) -> str | None:
    """Of a divergence and its gradients in points and weights, against those in plain torch."""
    n, m, d = shape
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(2, k, d, generator=generator, dtype=dtype) for k in (n, m))
    a, b = (torch.rand(2, k, generator=generator, dtype=dtype) + 0.1 for k in (n, m))
    given = [x, y + 0.5, a / a.sum(-1, True), b / b.sum(-1, True)]
    eps = otloss.suggest_eps(given[0], given[1], cost, sharpness=0.3)
    found = []
    places: list[tuple[torch.device, Any]]
    places = [(device, method), (torch.device("cpu"), "reference")]
    for where, how in places:
        x, y, a, b = (t.to(where).requires_grad_() for t in given)
        if "eps" in mode:
            loss = otloss.energy_distance(x, y, a=a, b=b, cost=cost, method=how)
        else:
            loss = otloss.sinkhorn_divergence(
                x, y, eps, a=a, b=b, cost=cost, method=how, tol=1e-5, **mode
            )
        gradients = torch.autograd.grad(loss.sum(), (x, y, a, b))
        found.append([loss.detach().cpu(), *(t.cpu() for t in gradients)])
    for name, ours, theirs in zip(("value", "x", "y", "a", "b"), *found, strict=True):
        error = float((ours - theirs).norm()) / max(float(theirs.norm()), 1e-2)
        if not error < 1e-3:
            return f"{name if name == 'value' else f'gradient in {name}'} is off by {error:.1e}"
    return None


if __name__ == "__main__":
    sys.exit(main())
