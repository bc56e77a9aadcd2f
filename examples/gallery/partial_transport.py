"""
Partial transport
=================

With ``mass`` a plan transports that much and no more, what is cheapest to move. A template is found
in a scene that has other things in it, without a guess of how far away these are.
"""

import matplotlib.pyplot as plt
import torch

import otloss

torch.manual_seed(0)
angle = 2 * torch.pi * torch.rand(120)
template = torch.stack((angle.cos(), 0.5 * angle.sin()), 1)
clutter = torch.cat([torch.randn(40, 2) * 0.3 + torch.tensor([2.5, 1.5]), 4 * torch.rand(40, 2)])
scene = torch.cat([template + torch.tensor([0.6, 0.4]), clutter])

# %%
# 60% of the scene is the template. All of the template has a weight of 0.6, and goes there.

a = torch.full((len(template),), 0.6 / len(template))
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
for panel, mass in zip(axes, (0.6, 0.3), strict=True):
    result = otloss.solve_sample(template, scene, 0.01, a=a, mass=mass, max_iters=5000)
    used = result.marginals[1] * len(scene)  # the share of each point of the scene
    points = panel.scatter(*scene.T, s=9, c=used, cmap="coolwarm", vmin=0, vmax=1)
    panel.scatter(*template.T, s=4, color="gray")
    panel.set(title=f"mass={mass}", aspect="equal")
figure.colorbar(points, label="share transported")
plt.show()

# %%
# The value has a gradient in all that it is given. Descending it finds the place of the template;
# the gradient in the mass is what a little more of it would cost.

shift, mass = torch.zeros(2, requires_grad=True), torch.tensor(0.5, requires_grad=True)
for _step in range(15):
    result = otloss.solve_sample(template + shift, scene, 0.01, a=a, mass=mass, max_iters=5000)
    gradient, price = torch.autograd.grad(result.value, [shift, mass])
    shift = (shift - gradient).detach().requires_grad_()
print(f"the template is at {shift.tolist()}, the object in the scene at [0.6, 0.4]")
print(f"more mass would cost {price.item():.2g} of its amount")
