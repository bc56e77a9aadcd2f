"""
Flow matching with transported pairs
====================================

Flow matching learns a velocity that carries noise to data along straight lines. Pairs drawn from a
transport plan make these lines cross less, so that a few steps of integration are enough.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import nn

import otloss

BATCH, STEPS = 256, 600


def data(n):
    return 2 * torch.from_numpy(make_moons(n, noise=0.05)[0]).float() - torch.tensor([1.0, 0.5])


# %%
# The one difference between the two trainings is the line that draws the pairs.


def train(transported):
    torch.manual_seed(0)
    velocity = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
                             nn.Linear(64, 2))  # fmt: skip
    optimiser = torch.optim.Adam(velocity.parameters(), 3e-3)
    eps = otloss.suggest_eps(torch.randn(BATCH, 2), data(BATCH), sharpness=0.01)
    for _ in range(STEPS):
        x0, x1 = torch.randn(BATCH, 2), data(BATCH)
        if transported:
            i, j = otloss.solve_sample(x0, x1, eps, tol=1e-2).sample()
            x0, x1 = x0[i], x1[j]
        t = torch.rand(BATCH, 1)
        at = (1 - t) * x0 + t * x1
        loss = (velocity(torch.cat((at, t), 1)) - (x1 - x0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return velocity


@torch.no_grad()
def integrate(velocity, x, steps):
    """Euler's method from time 0 to 1."""
    for k in range(steps):
        x = x + velocity(torch.cat((x, torch.full((len(x), 1), k / steps)), 1)) / steps
    return x


# %%
# Samples after 2 and 20 steps of integration, and their divergence to fresh data.

models = {"independent pairs": train(False), "transported pairs": train(True)}
torch.manual_seed(1)
noise, real = torch.randn(500, 2), data(500)
figure, axes = plt.subplots(2, 2, figsize=(7, 6), sharex=True, sharey=True, layout="constrained")
for row, (name, velocity) in zip(axes, models.items(), strict=True):
    for panel, steps in zip(row, (2, 20), strict=True):
        made = integrate(velocity, noise, steps)
        error = otloss.sinkhorn_divergence(made, real, 0.05)
        panel.scatter(*real.T, s=3, color="lightgrey")
        panel.scatter(*made.T, s=3, color="tab:blue")
        panel.set(title=f"{name}, {steps} steps: {error:.3f}", aspect="equal")
plt.show()
