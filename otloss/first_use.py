"""Before the first call on a GPU: do its kernels compute what plain torch computes?

One small problem is compared. Where the kernels cannot be loaded or disagree, plain torch serves
the CUDA tensors of this process. ``OTLOSS_CUDA_CHECK=0`` leaves that out.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

from otloss import ops, reference
from otloss._check import depth_of_caller

__all__ = ["first_use"]

_used: set[torch.device] = set()


def first_use(t: Tensor) -> None:
    """Before the kernels are called with ``t``. Waits for a GPU, once for each.

    Neither in a traced graph, where nothing runs, nor while a CUDA graph is recorded, which must
    not wait: a later call makes up for it.
    """
    if not t.is_cuda or torch.compiler.is_compiling() or t.device in _used or not ops.CUDA_KERNELS:
        return
    if os.environ.get("OTLOSS_CUDA_CHECK") == "0" or torch.cuda.is_current_stream_capturing():
        return
    _used.add(t.device)
    fault = disagreement(t.device)
    if fault:
        ops.serve_in_plain_torch("CUDA")
        warnings.warn(
            f"the CUDA kernels of otloss do not work on {torch.cuda.get_device_name(t.device)}: "
            f"{fault}. Plain torch serves CUDA tensors in this process, slowly. The driver takes "
            f"CUDA up to {_driver()}, the kernels are for "
            f"{ops.build_info()['cuda_architectures']}; python -m otloss.check says more.",
            stacklevel=depth_of_caller(),
        )


def disagreement(device: torch.device) -> str | None:
    """What is wrong with a divergence of few points and its gradient there; None: nothing."""
    # on the CPU whatever device is torch's default
    x, y = (torch.linspace(0, 1, k, device="cpu").reshape(-1, 1) ** 2 for k in (7, 9))
    weights = [torch.full_like(t.mT, 1 / len(t)) for t in (x, y)]
    points = [x[None], y[None] + 0.5]
    expected = _value_and_gradient(reference, points, weights)
    try:
        moved = [[t.to(device) for t in tensors] for tensors in (points, weights)]
        found = [t.cpu() for t in _value_and_gradient(ops, *moved)]
    except RuntimeError as error:
        return str(error).splitlines()[0]
    for name, ours, theirs in zip(("value", "gradient"), found, expected, strict=True):
        off = float((ours - theirs).norm() / theirs.norm())
        if not off < 1e-3:
            return f"the {name} of a small divergence is off by {off:.1e}"
    return None


def _value_and_gradient(
    where: Any, points: list[Tensor], weights: list[Tensor]
) -> tuple[Tensor, Tensor]:
    pairs, coefficients = [0, 1, 0, 0, 1, 1], [1.0, -0.5, -0.5]
    problem = ops.problems(weights, pairs, coefficients, 0.1, points=points)
    loss, _, f, g, *_ = where.solve(*problem, [], ops.number(1e-5), 1000, -1, False, True)
    one = torch.ones_like(loss)
    _, gradients, *_ = where.envelope_backward(one, *problem, f, g, [], [0], False)
    return loss, gradients[0]


def _driver() -> str:
    """The CUDA version that the driver takes, as 12.4."""
    version = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return f"{version // 1000}.{version % 1000 // 10}"
