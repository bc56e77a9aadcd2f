"""The plan as a map: where each point goes on average.

A small eps gives nearly a permutation; a larger one pulls the images to the mean of the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import picture
import torch
from matplotlib.collections import LineCollection

import otloss

EPS = (0.005, 0.2, 2.0)  # the mean squared distance is about 4
POINTS = 150


def main(argv: Sequence[str] | None = None) -> None:
    args = picture.options(__file__, __doc__ or "", argv)
    angle = 2 * torch.pi * torch.rand(POINTS)
    x = 0.6 * torch.randn(POINTS, 2)
    y = (2 + 0.15 * torch.randn(POINTS, 1)) * torch.stack((angle.cos(), angle.sin()), 1)
    figure, axes = picture.panels(1, len(EPS), (3, 3), sharex=True, sharey=True)
    for panel, eps in zip(axes[0], EPS, strict=True):
        image = otloss.solve_sample(x, y, eps).barycentric_map()
        arrows = torch.stack((x, image), 1).numpy()
        panel.add_collection(LineCollection(arrows, color="lightgrey", linewidth=0.6))
        panel.scatter(*y.T, s=8, color="tab:red", label="y")
        panel.scatter(*x.T, s=8, color="tab:blue", label="x")
        panel.scatter(*image.T, s=8, color="tab:green", marker="x", label="image of x")
        panel.set(title=f"eps {eps:g}", aspect="equal")
    axes[0, 0].legend(fontsize=7)
    picture.save(figure, args)


if __name__ == "__main__":
    main()
