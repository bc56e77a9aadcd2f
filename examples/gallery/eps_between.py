"""
From transport to an MMD
========================

At small eps the divergence is optimal transport, at large eps a maximum mean discrepancy,
``energy_distance``. Between them both the value and the field of gradients change.
"""

# sphinx_gallery_thumbnail_number = 2
import matplotlib.pyplot as plt
import torch

import otloss

torch.manual_seed(0)


def clusters(n, centres):
    """``n`` points around the centres in turn."""
    return torch.tensor(centres)[torch.arange(n) % len(centres)] + 0.15 * torch.randn(n, 2)


# %%
# **The value**, with the euclidean cost, of a cloud against itself moved by a shift. Transport is
# the distance moved; the MMD is flat at 0, so that its gradient vanishes near the solution.

cloud = clusters(200, [(-1.0, 0.0), (1.0, 0.0)])
shifts = torch.linspace(0, 3, 13)
moved = [cloud + torch.tensor([0.0, float(shift)]) for shift in shifts]
plt.figure(figsize=(5, 3.4))
for eps in (0.01, 0.3, 1.0, 3.0, 30.0):
    values = [otloss.sinkhorn_divergence(cloud, y, eps, cost="euclidean") for y in moved]
    plt.plot(shifts, values, label=f"eps {eps:g}")
plt.plot(shifts, [otloss.energy_distance(cloud, y) for y in moved], "k--", label="energy_distance")
plt.plot(shifts, shifts, "k:", label="transport")
plt.xlabel("shift")
plt.legend(fontsize=7)
plt.show()

# %%
# **The gradients**, from equal clusters to a target with three quarters on the right. Transport
# sends each point to a place of its own, some of them across; the MMD sends all points of a cluster
# to one side.

source = clusters(80, [(-1.0, -1.0), (1.0, -1.0)]).requires_grad_()
target = clusters(80, [(-1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)])
figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for panel, eps in zip(axes, (0.01, 1.0, 30.0), strict=True):
    loss = otloss.sinkhorn_divergence(source, target, eps, cost="euclidean")
    (gradient,) = torch.autograd.grad(loss, source)
    points = source.detach()
    panel.scatter(*target.T, s=6, color="tab:red")
    panel.scatter(*points.T, s=6, color="tab:blue")
    panel.quiver(*points.T, *(-len(points) * gradient).T, angles="xy", width=0.004)
    panel.set(title=f"minus gradient, eps {eps:g}", aspect="equal")
plt.show()
