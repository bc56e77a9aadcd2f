"""
Gradient flow
=============

A cloud descends the Sinkhorn divergence to another one. A small eps brings each point to its place;
a large one finds position and size of the target first, and its shape only slowly.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons

import otloss

torch.manual_seed(0)
N = 300
target = torch.from_numpy(make_moons(N, noise=0.04, random_state=0)[0]).float()
start = 0.25 * torch.randn(N, 2) + torch.tensor([-1.2, -0.8])
start = start[start[:, 1].argsort()]  # the colour says where a point came from

# %%
# Every point moves along minus n times its gradient. The divergence between two single points has
# its minimum at a rate of ½; a little less is stable.

EPS = (0.01, 0.3, 10.0)  # the mean squared distance is about 3
SHOWN = (0, 2, 8, 30)
figure, axes = plt.subplots(3, 4, figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
ends = {}
for row, eps in zip(axes, EPS, strict=True):
    x = start.clone()
    for step in range(max(SHOWN) + 1):
        if step in SHOWN:
            panel = row[SHOWN.index(step)]
            panel.scatter(*target.T, s=3, color="lightgrey")
            panel.scatter(*x.T, s=4, c=range(N), cmap="viridis")
            panel.set_title(f"eps {eps:g}, step {step}", fontsize=9)
            panel.set_aspect("equal")
        x.requires_grad_()
        loss = otloss.sinkhorn_divergence(x, target, eps)
        (gradient,) = torch.autograd.grad(loss, x)
        x = x.detach() - 0.4 * N * gradient
    ends[eps] = x
plt.show()
