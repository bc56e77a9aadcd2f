"""eps leads from optimal transport to an MMD: the value, and the field of gradients.

Left: the divergence (euclidean cost) between a cloud of two clusters and itself, moved by a shift.
At small eps it is the distance moved; at large eps ``energy_distance``, an MMD, flat at 0.
Right: where the gradient sends the points of a cloud with equal clusters, when three quarters of
the target is on the right. Transport sends each point to a place of its own, some of them across;
the MMD sends all the points of a cluster to the same side.
"""

from __future__ import annotations

from collections.abc import Sequence

import picture
import torch
from torch import Tensor

import otloss

CURVES = (0.01, 0.3, 1.0, 3.0, 30.0)
FIELDS = (0.01, 1.0, 30.0)
SHIFTS = torch.linspace(0, 3, 13)


def clusters(n: int, centres: Sequence[Sequence[float]]) -> Tensor:
    """``n`` points around the centres in turn."""
    return torch.tensor(centres)[torch.arange(n) % len(centres)] + 0.15 * torch.randn(n, 2)


def divergence(x: Tensor, y: Tensor, eps: float) -> Tensor:
    return otloss.sinkhorn_divergence(x, y, eps, cost="euclidean")


def main(argv: Sequence[str] | None = None) -> None:
    args = picture.options(__file__, __doc__ or "", argv)
    figure, axes = picture.panels(1, 1 + len(FIELDS), (3.2, 3))
    curves, *fields = axes[0]

    cloud = clusters(200, [(-1, 0), (1, 0)])
    moved = [cloud + torch.tensor([0.0, float(shift)]) for shift in SHIFTS]
    for eps in CURVES:
        curves.plot(SHIFTS, [divergence(cloud, y, eps) for y in moved], label=f"eps {eps:g}")
    limit = [otloss.energy_distance(cloud, y) for y in moved]
    curves.plot(SHIFTS, limit, "k--", label="energy_distance")
    curves.plot(SHIFTS, SHIFTS, "k:", label="transport")
    curves.set(xlabel="shift", title="value")
    curves.legend(fontsize=7)

    source = clusters(80, [(-1, -1), (1, -1)])
    target = clusters(80, [(-1, 1), (1, 1), (1, 1), (1, 1)])
    for panel, eps in zip(fields, FIELDS, strict=True):
        x = source.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(x, target, eps), x)
        panel.scatter(*target.T, s=6, color="tab:red")
        panel.scatter(*source.T, s=6, color="tab:blue")
        panel.quiver(*source.T, *(-len(x) * gradient).T, angles="xy", width=0.004)
        panel.set(title=f"minus gradient, eps {eps:g}", aspect="equal")
    picture.save(figure, args)


if __name__ == "__main__":
    main()
