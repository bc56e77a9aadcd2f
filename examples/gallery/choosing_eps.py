"""
Choosing eps
============

A small eps sees detail and is slow; a large one is cheap and has little noise. Between 3% and 30%
of the mean cost there is some of both.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import otloss

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.data))
images = torch.from_numpy(digits.data).float()[order] / 16
labels = torch.from_numpy(digits.target)[order]

# %%
# Two pairs of minibatches. The first comes from one distribution: its divergence is the noise of a
# minibatch. The second compares digits below 5 with the others: its divergence is the signal.

BATCH = 200
same = images[:BATCH], images[BATCH : 2 * BATCH]
different = images[labels < 5][:BATCH], images[labels >= 5][:BATCH]

# %%
# ``suggest_eps`` gives a share of the mean cost. We try shares over three decades.

shares = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
values = [otloss.suggest_eps(*same, sharpness=share) for share in shares]
iterations = [otloss.solve_sample(*same, eps, max_iters=10_000).n_iters for eps in values]

figure, (cost, value) = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
cost.loglog(shares, iterations, "o-")
cost.set(xlabel="eps / mean cost", ylabel="iterations")
for label, clouds in (("same distribution", same), ("digits < 5 and >= 5", different)):
    losses = [otloss.sinkhorn_divergence(*clouds, eps, max_iters=10_000) for eps in values]
    value.loglog(shares, losses, "o-", label=label)
value.set(xlabel="eps / mean cost", ylabel="divergence")
value.legend(fontsize=8)
plt.show()
