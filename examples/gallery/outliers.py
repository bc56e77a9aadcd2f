"""Unbalanced transport leaves outliers behind.

A cloud descends the divergence to a ring of which one point in twenty lies far off. Balanced
transport must reach every one of them; with ``unbalanced=rho`` mass that would have to travel much
further than rho is not transported.
"""

from __future__ import annotations

from collections.abc import Sequence

import picture
import torch

import otloss

STRENGTHS = (None, 1.0, 0.1)
EPS = 0.02
POINTS, STEPS, RATE = 300, 40, 0.4


def main(argv: Sequence[str] | None = None) -> None:
    args = picture.options(__file__, __doc__ or "", argv)
    angle = 2 * torch.pi * torch.rand(POINTS)
    target = torch.stack((angle.cos(), angle.sin()), 1) + 0.05 * torch.randn(POINTS, 2)
    target[::20] = torch.tensor([4.0, 2.0]) + 0.3 * torch.randn(len(target[::20]), 2)
    start = 0.3 * torch.randn(POINTS, 2)
    figure, axes = picture.panels(1, len(STRENGTHS), (3.2, 2.4), sharex=True, sharey=True)
    for panel, rho in zip(axes[0], STRENGTHS, strict=True):
        x = start.clone()
        for _ in range(STEPS):
            x.requires_grad_()
            loss = otloss.sinkhorn_divergence(x, target, EPS, unbalanced=rho)
            (gradient,) = torch.autograd.grad(loss, x)
            x = x.detach() - RATE * len(x) * gradient
        panel.scatter(*target.T, s=5, color="tab:red", label="target")
        panel.scatter(*x.T, s=5, color="tab:blue", label="moved")
        panel.set(title="balanced" if rho is None else f"unbalanced={rho:g}", aspect="equal")
    axes[0, 0].legend(fontsize=7)
    picture.save(figure, args)


if __name__ == "__main__":
    main()
