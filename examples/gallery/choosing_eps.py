"""Choosing eps: what it costs, and what it tells apart.

On the digits of scikit-learn, against eps as a share of the mean cost. Left: iterations of one
solve. Right: the divergence between two samples of all digits, which is 0 for the distributions
and so the noise of a minibatch, and between digits below 5 and from 5 on, which is the signal. A
large eps is cheap and has little noise, a small one sees detail: between 3% and 30% of the mean
cost there is some of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import picture
import torch
from sklearn.datasets import load_digits

import otloss

SHARES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
BATCH = 200


def main(argv: Sequence[str] | None = None) -> None:
    args = picture.options(__file__, __doc__ or "", argv)
    table = load_digits()
    images, labels = torch.from_numpy(table.data).float() / 16, torch.from_numpy(table.target)
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    same = images[:BATCH], images[BATCH : 2 * BATCH]
    different = images[labels < 5][:BATCH], images[labels >= 5][:BATCH]
    mean_cost = float(otloss.cost_matrix(*same).mean())

    results = [otloss.solve_sample(*same, share * mean_cost, max_iters=10_000) for share in SHARES]
    figure, axes = picture.panels(1, 2, (3.4, 3))
    cost, value = axes[0]
    cost.loglog(SHARES, [int(result.n_iters) for result in results], "o-")
    cost.set(xlabel="eps / mean cost", ylabel="iterations")
    for label, clouds in (("same distribution", same), ("digits < 5 and >= 5", different)):
        values = [
            float(otloss.sinkhorn_divergence(*clouds, share * mean_cost, max_iters=10_000))
            for share in SHARES
        ]
        value.loglog(SHARES, values, "o-", label=label)
    value.set(xlabel="eps / mean cost", ylabel="divergence")
    value.legend(fontsize=8)
    picture.save(figure, args)


if __name__ == "__main__":
    main()
