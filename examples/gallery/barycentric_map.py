"""
The plan as a map
=================

``barycentric_map`` sends each point to the mean of where its mass goes. A small eps gives nearly a
permutation; a larger one pulls the images to the mean of the target.
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.collections import LineCollection

import otloss

torch.manual_seed(0)
N = 150
angle = 2 * torch.pi * torch.rand(N)
x = 0.6 * torch.randn(N, 2)
y = (2 + 0.15 * torch.randn(N, 1)) * torch.stack((angle.cos(), angle.sin()), 1)

# %%
# The mean squared distance is about 4.

figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharex=True, sharey=True, layout="constrained")
for panel, eps in zip(axes, (0.005, 0.2, 2.0), strict=True):
    image = otloss.solve_sample(x, y, eps).barycentric_map()
    arrows = torch.stack((x, image), 1)
    panel.add_collection(LineCollection(arrows, color="lightgrey", linewidth=0.6))
    panel.scatter(*y.T, s=8, color="tab:red", label="y")
    panel.scatter(*x.T, s=8, color="tab:blue", label="x")
    panel.scatter(*image.T, s=8, color="tab:green", marker="x", label="image of x")
    panel.set(title=f"eps {eps:g}", aspect="equal")
axes[0].legend(fontsize=7)
plt.show()
