"""What this build is and uses."""

from __future__ import annotations

from typing import Any

import torch

from otloss import _options, ops

__all__ = ["show_config"]


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Prints versions, kernels, SIMD level, CUDA architectures and threads in use.

    Args:
        mode: ``"stdout"`` prints them and returns None; ``"dicts"`` returns them as a dict.

    Raises:
        ValueError: another mode.

    Example:
        >>> sorted(otloss.show_config("dicts"))[-3:]
        ['simd', 'threads', 'torch']
    """
    from otloss import __version__

    config: dict[str, Any] = {
        "otloss": __version__,
        "torch": torch.__version__,
        "kernels": "native" if ops.NATIVE else "none (plain torch)",
        **ops.build_info(),
        "threads": torch.get_num_threads(),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    if torch.cuda.is_available() and ops.CUDA_KERNELS:
        like = torch.empty(0, device=torch.device("cuda", torch.cuda.current_device()))
        for n in (200, 1000, 10_000):
            config[f"cuda_layout_{n}"] = ops.describe_plan(like, 1, n, n)
    if _options.choice("mode", mode, ("stdout", "dicts")) == "dicts":
        return config
    width = max(map(len, config))
    print("\n".join(f"{key:<{width}}  {value}" for key, value in config.items()))
    return None
