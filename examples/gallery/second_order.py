"""
Second order
============

Losses are twice differentiable. Newton's method with products of the Hessian and a vector takes a
few steps where gradient descent takes many.
"""

import matplotlib.pyplot as plt
import torch

import otloss

torch.manual_seed(0)
N = 200
shape = torch.randn(N, 2, dtype=torch.float64) * torch.tensor([1.0, 0.4], dtype=torch.float64)
turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)
y = shape @ (2 * turn) + torch.tensor([1.0, -2.0], dtype=torch.float64)

# %%
# We look for the affine map, six numbers, that takes one cloud to the other.


def loss(parameters):
    x = shape @ parameters[:4].reshape(2, 2) + parameters[4:]
    return otloss.sinkhorn_divergence(x, y, 1.0, tol=1e-8)


start = torch.tensor([1.0, 0, 0, 1, 0, 0], dtype=torch.float64)

# %%
# Six rows of the Hessian, one backward each; for many parameters conjugate gradients need only
# products with it. Far from the solution it is not positive: we take absolute eigenvalues.


def descend(step, steps):
    parameters, values = start, []
    for _ in range(steps):
        parameters = parameters.detach().requires_grad_()
        value = loss(parameters)
        (slope,) = torch.autograd.grad(value, parameters, create_graph=True)
        values.append(value.item())
        parameters = parameters - step(slope, parameters)
    return values


def newton(slope, parameters):
    rows = [torch.autograd.grad(s, parameters, retain_graph=True)[0] for s in slope]
    size, axes = torch.linalg.eigh(torch.stack(rows))
    return axes @ ((axes.T @ slope.detach()) / size.abs().clamp_min(1e-3))


curves = {
    "gradient descent": descend(lambda slope, _: 0.3 * slope.detach(), 40),
    "Newton": descend(newton, 12),
}
plt.figure(figsize=(5, 3.4))
for name, values in curves.items():
    plt.semilogy([max(value, 1e-14) for value in values], "o-", ms=3, label=name)
plt.xlabel("step")
plt.ylabel("divergence")
plt.legend()
plt.show()
