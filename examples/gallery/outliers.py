"""
Outliers and unbalanced transport
=================================

Balanced transport must reach every point, outliers included. With ``unbalanced=rho`` mass that
would have to travel much further than rho stays where it is.
"""

import matplotlib.pyplot as plt
import torch

import otloss

torch.manual_seed(0)
N = 300
angle = 2 * torch.pi * torch.rand(N)
target = torch.stack((angle.cos(), angle.sin()), 1) + 0.05 * torch.randn(N, 2)
target[::20] = torch.tensor([4.0, 2.0]) + 0.3 * torch.randn(len(target[::20]), 2)
start = 0.3 * torch.randn(N, 2)

# %%
# A cloud descends the divergence to a ring of which one point in twenty lies far off.

figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.6), sharey=True, layout="constrained")
for panel, rho in zip(axes, (None, 1.0, 0.1), strict=True):
    x = start.clone()
    for _ in range(40):
        x.requires_grad_()
        loss = otloss.sinkhorn_divergence(x, target, 0.02, unbalanced=rho)
        (gradient,) = torch.autograd.grad(loss, x)
        x = x.detach() - 0.4 * N * gradient
    panel.scatter(*target.T, s=5, color="tab:red", label="target")
    panel.scatter(*x.T, s=5, color="tab:blue", label="moved")
    panel.set(title="balanced" if rho is None else f"unbalanced={rho:g}", aspect="equal")
axes[0].legend(fontsize=7)
plt.show()

# %%
# The marginals of a plan say what took part: hardly any mass reaches the outliers.

result = otloss.solve_sample(start, target, 0.02, unbalanced=1.0)
columns = result.marginals[1]
print(f"share of the mass at outliers: {columns[::20].sum() / columns.sum():.4f}")
