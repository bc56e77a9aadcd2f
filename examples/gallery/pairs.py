"""
Plans and pairs
===============

A solve gives the plan, how much mass goes from each x to each y, and pairs drawn from it.
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.collections import LineCollection

import otloss

torch.manual_seed(0)
x = 0.4 * torch.randn(40, 2)
y = torch.randn(50, 2).sign() + 0.2 * torch.randn(50, 2)
result = otloss.solve_sample(x, y, eps=0.05)
print(result)

# %%
# Rows of ``plan`` sum to the weights of x, its columns to those of y. ``argmax`` is the most
# probable partner of each x; ``sample()`` draws one for each, ``sample(n)`` draws n pairs of all.

j = result.argmax()
drawn = result.sample(100)
pairs = {"most probable partners": (torch.arange(len(x)), j), "100 pairs drawn": drawn}
figure, (matrix, *axes) = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
order = x[:, 0].argsort(), y[:, 0].argsort()
matrix.imshow(result.plan[order[0]][:, order[1]], cmap="viridis")
matrix.set(title="plan, sorted by the first coordinate", xlabel="j", ylabel="i")
for panel, (title, (i, j)) in zip(axes, pairs.items(), strict=True):
    panel.add_collection(LineCollection(torch.stack((x[i], y[j]), 1), color="grey", lw=0.6))
    panel.scatter(*x.T, s=10, color="tab:blue")
    panel.scatter(*y.T, s=10, color="tab:red")
    panel.set(title=title, aspect="equal")
plt.show()
