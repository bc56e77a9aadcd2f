"""
Large clouds
============

Twenty thousand points in a square are brought onto a spiral by the plan of each of three eps. In
few dimensions and for a small eps few pairs of points hold the plan, and only these are looked at.
"""

import math
import time

import matplotlib.pyplot as plt
import torch

import otloss

torch.manual_seed(0)
N = 20_000
x = 2 * torch.rand(N, 2) - 1
t = torch.rand(N).sqrt()
angle, radius = 4 * math.pi * t, 0.15 + 0.8 * t + 0.05 * torch.randn(N)
y = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)

# %%
# No matrix of all pairs is made. ``explain`` names the method that was chosen.

figure, axes = plt.subplots(1, 4, figsize=(10.4, 2.8), sharey=True, layout="constrained")
clouds = {"the square": x}
for eps in (0.1, 0.01, 0.001):  # the mean squared distance is about 0.6
    start = time.process_time()
    result = otloss.solve_sample(x, y, eps)
    mapped = result.barycentric_map()
    method = result.explain().split()[0]
    clouds[f"eps {eps:g}: {method}, {time.process_time() - start:.1f} CPU s"] = mapped
for panel, (title, cloud) in zip(axes, clouds.items(), strict=True):
    panel.scatter(*y[::10].T, s=1, color="lightgrey")
    panel.scatter(*cloud.T, s=0.3, c=x[:, 0] + 0.3 * x[:, 1], cmap="viridis")
    panel.set_title(title, fontsize=8)
    panel.set_aspect("equal")
plt.show()
