"""A cloud that descends the Sinkhorn divergence to another one, for several eps.

Every point moves along minus n times its gradient. A small eps brings each point to its place; a
large one finds the position and the size of the target, and its shape only slowly.
"""

from __future__ import annotations

from collections.abc import Sequence

import picture
import torch
from sklearn.datasets import make_moons
from torch import Tensor

import otloss

EPS = (0.01, 0.3, 10.0)  # the mean squared distance is about 3
SHOWN = (0, 2, 8, 30)  # steps
RATE = 0.4  # of squared distance: the divergence between two points is minimal after rate 1/2
POINTS = 300


def flow(start: Tensor, target: Tensor, eps: float) -> dict[int, Tensor]:
    """The cloud at the steps ``SHOWN``."""
    x, seen = start.clone(), {}
    for step in range(max(SHOWN) + 1):
        if step in SHOWN:
            seen[step] = x.detach().clone()
        x.requires_grad_()
        loss = otloss.sinkhorn_divergence(x, target, eps)
        (gradient,) = torch.autograd.grad(loss, x)
        x = x.detach() - RATE * len(x) * gradient
    return seen


def main(argv: Sequence[str] | None = None) -> None:
    args = picture.options(__file__, __doc__ or "", argv)
    target = torch.from_numpy(make_moons(POINTS, noise=0.04, random_state=args.seed)[0]).float()
    start = 0.25 * torch.randn(POINTS, 2) + torch.tensor([-1.2, -0.8])
    order = start[:, 1].argsort()
    figure, axes = picture.panels(len(EPS), len(SHOWN), (2.6, 1.7), sharex=True, sharey=True)
    for row, eps in zip(axes, EPS, strict=True):
        for panel, (step, cloud) in zip(row, flow(start[order], target, eps).items(), strict=True):
            panel.scatter(*target.T, s=3, color="lightgrey")
            panel.scatter(*cloud.T, s=4, c=range(POINTS), cmap="viridis")
            panel.set_title(f"eps {eps:g}, step {step}", fontsize=9)
            panel.set_aspect("equal")
    picture.save(figure, args)


if __name__ == "__main__":
    main()
