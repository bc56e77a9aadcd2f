"""Pictures of a run: image grids, latent manifolds and loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from common.data import to_bytes

Curve = tuple[Sequence[float], Sequence[float]]  # steps, values
GRID_WIDTH = 560  # pixels; grids of small images are enlarged to it


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Images (N, C, H, W) in [-1, 1] as one PNG, ``columns`` to a row."""
    pixels = torch.nn.functional.pad(to_bytes(images), (1, 1, 1, 1))
    rows = len(pixels) // columns
    _, channels, height, width = pixels.shape
    tiles = pixels[: rows * columns].reshape(rows, columns, channels, height, width)
    picture = tiles.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    zoom = -(-GRID_WIDTH // (columns * width))
    picture = picture.expand(-1, -1, 3).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    imsave(path, picture.contiguous().numpy())


def save_curves(series: Mapping[str, Curve], path: Path) -> None:
    """One panel per named (steps, values), with a running mean over 2% of the points."""
    figure = Figure(figsize=(6, 2.2 * len(series) + 0.6), layout="constrained")
    panels = figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, (steps, values)) in zip(panels, series.items(), strict=True):
        window = max(1, len(values) // 50)
        panel.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.7)
        mean = np.convolve(values, np.full(window, 1 / window), "valid")
        panel.plot(steps[window - 1 :], mean, color="tab:blue")
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    figure.savefig(path, dpi=120)
