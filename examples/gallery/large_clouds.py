"""Twenty thousand points in a square, brought onto a spiral by the plan of each of three eps.

Every point moves to the mean of where its mass goes, `barycentric_map`. In few dimensions and for a
small eps few pairs of points hold the plan, and only these are looked at (docs/large-point-clouds).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import picture
import torch
from torch import Tensor

import otloss

EPS = (0.1, 0.01, 0.001)  # the mean squared distance is about 0.6
POINTS = 20_000


def spiral(count: int) -> Tensor:
    """Two turns, as wide as far from the centre."""
    t = torch.rand(count).sqrt()
    angle, radius = 4 * math.pi * t, 0.15 + 0.8 * t + 0.05 * torch.randn(count)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def main(argv: Sequence[str] | None = None) -> None:
    args = picture.options(__file__, __doc__ or "", argv)
    x, y = 2 * torch.rand(POINTS, 2) - 1, spiral(POINTS)
    figure, axes = picture.panels(1, len(EPS) + 1, (2.6, 2.8), sharex=True, sharey=True)
    clouds = {"the square": x}
    for eps in EPS:
        start = time.process_time()
        result = otloss.solve_sample(x, y, eps)
        mapped = result.barycentric_map()
        how = f"{result.explain().split()[0]}, {time.process_time() - start:.1f} CPU s"
        clouds[f"eps {eps:g}: {how}"] = mapped
    for panel, (title, cloud) in zip(axes[0], clouds.items(), strict=True):
        panel.scatter(*y[::10].T, s=1, color="lightgrey")
        panel.scatter(*cloud.T, s=0.3, c=x[:, 0] + 0.3 * x[:, 1], cmap="viridis")
        panel.set_title(title, fontsize=8)
        panel.set_aspect("equal")
    picture.save(figure, args)


if __name__ == "__main__":
    main()
