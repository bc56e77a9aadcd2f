"""
A first loss
============

One call measures how far apart two clouds are; its gradient says where every point should go.
"""

import matplotlib.pyplot as plt
import torch

import otloss

torch.manual_seed(0)
x = torch.randn(60, 2, requires_grad=True)
y = 0.5 * torch.randn(80, 2) + torch.tensor([3.0, 1.0])

# %%
# ``eps`` blurs: here a few percent of the mean squared distance between the clouds.

eps = otloss.suggest_eps(x, y)
loss = otloss.sinkhorn_divergence(x, y, eps)
loss.backward()
print(f"eps {eps:.3f}, loss {loss.item():.3f}")

# %%
# The loss is a mean over points, so each point's gradient is 1/n of its own slope. Minus n/2 times
# the gradient is, for squared distances, the way to the place where the point belongs.

step = -len(x) / 2 * x.grad
start = x.detach()
plt.figure(figsize=(5, 3))
plt.scatter(*y.T, s=12, color="tab:red", label="y")
plt.scatter(*start.T, s=12, color="tab:blue", label="x")
plt.quiver(*start.T, *step.T, angles="xy", scale_units="xy", scale=1, width=0.003, color="grey")
plt.axis("equal")
plt.legend()
plt.show()
