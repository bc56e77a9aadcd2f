"""
Soft assignments and matching from scores
=========================================

``solve`` takes any matrix of costs, so scores of a network, too. A few unrolled iterations turn
them into balanced assignments (as in SwAV); one more row and column take what has no partner (as in
SuperGlue).
"""

import matplotlib.pyplot as plt
import torch

import otloss

torch.manual_seed(0)

# %%
# **Balanced assignments.** Scores of 60 samples for 6 prototypes. A softmax gives nearly all
# samples to one prototype that scores high; three iterations share them out equally.
# ``backward="unrolled"`` is the default with ``n_iters``, and differentiates exactly these three.

scores = torch.randn(60, 6) + torch.tensor([2.0, 0, 0, 0, 0, 0])
eps = 0.3
soft = (scores / eps).softmax(1)
balanced = len(scores) * otloss.solve(-scores, eps, n_iters=3).plan
print("samples per prototype, softmax: ", [round(v, 1) for v in soft.sum(0).tolist()])
print("samples per prototype, balanced:", [round(v, 1) for v in balanced.sum(0).tolist()])

# %%
# **A dustbin.** Twenty points are seen from two sides; the first five are only on one of them, and
# five others only on the other. A row and a column of a constant score take what nothing matches: a
# dustbin holds as much as all points of the other side.

n = 20
x = torch.rand(n, 2)
y = torch.cat((x[5:], torch.rand(5, 2))) + 0.01 * torch.randn(n, 2)
match = 1 - 10 * torch.cdist(x, y)  # a network's scores in practice
dustbin = torch.zeros(())  # trained in practice
top = torch.cat((match, dustbin.expand(n, 1)), 1)
augmented = torch.cat((top, dustbin.expand(1, n + 1)), 0)
weights = torch.cat((torch.ones(n), torch.tensor([float(n)]))) / (2 * n)
plan = otloss.solve(-augmented, 0.1, a=weights, b=weights, n_iters=100).plan
share = plan / weights[:, None]
partner = share[:n].argmax(1)
print("partners (20 is the dustbin):", partner.tolist())

figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
for panel, table, title in zip(axes, (soft, balanced), ("softmax", "3 iterations"), strict=False):
    panel.imshow(table.T, aspect="auto", cmap="viridis")
    panel.set(title=title, xlabel="sample", ylabel="prototype")
axes[2].imshow(share, cmap="viridis")
axes[2].set(title="matches, dustbins last", xlabel="y", ylabel="x")
plt.show()
