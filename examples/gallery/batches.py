"""
Weights, padding and ragged batches
===================================

Clouds of different sizes make one batch: ``pad`` fills them up with points of weight 0, which
change no value and receive no gradient.
"""

import matplotlib.pyplot as plt
import torch

import otloss

torch.manual_seed(0)
angles = [2 * torch.pi * torch.rand(n) for n in (30, 60, 120)]
clouds = [torch.stack((t.cos(), 0.3 * k * t.sin()), 1) for k, t in enumerate(angles, start=1)]
x, a = otloss.pad(clouds)
print(tuple(x.shape), tuple(a.shape), "points of positive weight:", (a > 0).sum(-1).tolist())

# %%
# One call solves all problems and gives one loss each. The target is a batch of one, for all.

angle = 2 * torch.pi * torch.rand(1, 100)
target = torch.stack((angle.cos(), angle.sin()), -1)
losses = otloss.sinkhorn_divergence(x, target, eps=0.02, a=a)
alone = [otloss.sinkhorn_divergence(cloud, target[0], eps=0.02) for cloud in clouds]
print("as a batch:   ", [f"{loss:.4f}" for loss in losses.tolist()])
print("one by one:   ", [f"{loss:.4f}" for loss in alone])

# %%
# Weights need not be uniform. Here the left half of each cloud counts three times; the totals of
# both sides must agree, so they are normalised.

weights = a * (1 + 2 * (x[..., 0] < 0))
weights = weights / weights.sum(-1, keepdim=True)
x.requires_grad_()
otloss.sinkhorn_divergence(x, target, eps=0.02, a=weights).sum().backward()

figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharex=True, sharey=True, layout="constrained")
for panel, points, weight, slope in zip(axes, x.detach(), weights, x.grad, strict=True):
    real = weight > 0
    points, weight, slope = points[real], weight[real], slope[real] / weight[real, None]
    panel.scatter(*target[0].T, s=6, color="lightgrey")
    panel.scatter(*points.T, s=1500 * weight, color="tab:blue", alpha=0.6)
    panel.quiver(*points.T, *(-slope / 2).T, angles="xy", scale_units="xy", scale=1, width=0.004)
    panel.set(title=f"{len(points)} points", aspect="equal")
plt.show()
