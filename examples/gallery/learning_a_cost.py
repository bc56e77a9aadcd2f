"""
Learning a cost
===============

The loss is differentiable in the cost as well. Here pairs that belong together are known, and a
linear map is trained until optimal transport finds them, in spite of eight coordinates of noise.
"""

import matplotlib.pyplot as plt
import torch

import otloss

torch.manual_seed(0)
N, NOISE = 100, 8


def batch():
    """Two views of N things: two coordinates that agree, and eight that do not. Row i of one is
    row i of the other."""
    common = torch.randn(N, 2)
    views = [common + 0.05 * torch.randn(N, 2) for _ in range(2)]
    return [torch.cat((view, 2 * torch.randn(N, NOISE)), 1) for view in views]


# %%
# The likelihood of the known pairs under the plan is what we maximise. ``backward="auto"``
# differentiates the plan through the optimality conditions.

scale = torch.nn.Parameter(torch.full((2 + NOISE,), 0.5))
optimiser = torch.optim.Adam([scale], 0.03)
losses, shares = [], []
for _ in range(150):
    x, y = batch()
    result = otloss.solve_sample(x * scale, y * scale, eps=0.5)
    loss = -(N * result.plan.diagonal()).clamp_min(1e-30).log().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
    shares.append((result.argmax() == torch.arange(N)).float().mean())
print(f"pairs found: {shares[0]:.0%} at first, {shares[-1]:.0%} at the end")

# %%
# The scales of the eight coordinates of noise go to 0.

figure, (curve, bars) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
curve.plot(shares)
curve.set(xlabel="step", ylabel="share of pairs found")
bars.bar(range(2 + NOISE), scale.detach().abs())
bars.set(xlabel="coordinate", ylabel="|scale|")
plt.show()
