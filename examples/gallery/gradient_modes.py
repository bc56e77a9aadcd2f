"""
Implicit and unrolled gradients
===============================

The transport cost <P, C> has two exact gradients: of the solution, and of the iterations that ran.
They meet as the number of iterations grows.
"""

import matplotlib.pyplot as plt
import torch

import otloss

torch.manual_seed(0)
x = torch.randn(100, 2, dtype=torch.float64, requires_grad=True)
y = torch.randn(100, 2, dtype=torch.float64) + 1


def gradient(**options):
    loss = otloss.sinkhorn_loss(x, y, 0.3, objective="transport", **options)
    return torch.autograd.grad(loss, x)[0]


# %%
# ``"implicit"`` differentiates the optimality conditions of a converged solve. ``"unrolled"``
# differentiates ``n_iters`` iterations. ``"envelope"`` holds the plan constant: OT-GAN does so, and
# for this objective it is another direction, whatever the number of iterations.

exact = gradient(backward="implicit", tol=1e-9)
counts = (1, 2, 5, 10, 20, 50, 100, 200)
plt.figure(figsize=(5, 3.4))
for backward in ("unrolled", "envelope"):
    found = [gradient(backward=backward, n_iters=n) for n in counts]
    errors = [(g - exact).norm() / exact.norm() for g in found]
    plt.loglog(counts, errors, "o-", label=backward)
plt.xlabel("iterations")
plt.ylabel("relative distance to the implicit gradient")
plt.legend()
plt.show()

# %%
# The default objective, with the entropy, needs none of this: there the envelope gradient is exact
# at convergence and the cheapest.
