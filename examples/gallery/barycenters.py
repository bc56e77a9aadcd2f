"""
Barycenters of shapes
=====================

The average of clouds is the cloud nearest to all of them: ``barycenter`` moves points until the
weighted sum of divergences falls no more. Weights that go from one shape to the others deform one
into the others.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import otloss

N = 160
angle = 2 * torch.pi * torch.arange(N) / N
circle = torch.stack((angle.cos(), angle.sin()), 1)
square = circle / circle.abs().amax(1, keepdim=True)
petals = circle * (1 + 0.5 * (5 * angle).cos()).unsqueeze(1)

# %%
# A triangle of weights: shapes at the corners, their averages between them.

figure, axes = plt.subplots(4, 4, figsize=(6, 6), sharex=True, sharey=True, layout="constrained")
shapes = [circle, square, petals]
for (i, j), panel in np.ndenumerate(axes):
    panel.axis("off")
    if i + j > 3:
        panel.remove()
        continue
    weights = [i / 3, j / 3, (3 - i - j) / 3]
    x, info = otloss.barycenter(shapes, weights, eps=0.01, init=circle)
    panel.scatter(*x.T, s=3, color="tab:blue")
    panel.set_aspect("equal")
    panel.set_title(", ".join(f"{w:.2g}" for w in weights), fontsize=7)
plt.show()

# %%
# Every step is lower than the one before.

x, info = otloss.barycenter([circle, petals], [0.5, 0.5], eps=0.01, tol=1e-3)
print(f"converged: {info.converged}; " + " > ".join(f"{v:.4f}" for v in info.values))
