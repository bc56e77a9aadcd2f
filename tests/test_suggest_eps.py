"""suggest_eps: a share of the mean cost, and what its docstring says of three shares."""

from __future__ import annotations

import pytest
import torch
from helpers import close, clouds, randn
from torch import Tensor

import otloss

ot = pytest.importorskip("ot")


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine", torch.cdist])
def test_share_of_the_mean_cost(cost, rng):
    c = clouds(rng, 30, 20, 3, batch=2)
    mean = otloss.cost_matrix(c.x, c.y, cost).mean().item()
    assert otloss.suggest_eps(c.x, c.y, cost) == pytest.approx(0.05 * mean)
    assert otloss.suggest_eps(c.x, c.y, cost, 2) == pytest.approx(2 * mean)


def test_of_many_points_a_sample(rng):
    x, y = randn(rng, 5000, 3), randn(rng, 5000, 3) + 1
    mean = (x[:, None] - y[None, :500]).square().sum(-1).mean().item()
    drawn = [
        otloss.suggest_eps(x, y, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    for eps in drawn:
        assert eps == pytest.approx(0.05 * mean, rel=0.15)


@pytest.mark.parametrize("d", [2, 64])
def test_what_shares_look_like(d, rng):
    x, y = randn(rng, 200, d), 0.7 * randn(rng, 200, d) + 1
    exact = ot.emd2(torch.empty(0), torch.empty(0), otloss.cost_matrix(x, y))

    def at(sharpness: float) -> tuple[float, float, Tensor]:
        """Transport cost over the exact one, partners of a point, the divergence."""
        eps = otloss.suggest_eps(x, y, sharpness=sharpness)
        result = otloss.solve_sample(x, y, eps)
        rows = 200 * result.plan
        partners = (-torch.xlogy(rows, rows).sum(1)).exp().mean().item()
        return (result.value_linear / exact).item(), partners, otloss.sinkhorn_divergence(x, y, eps)

    excess, partners, _ = at(0.01)
    assert excess < 1.03
    assert partners < 25
    excess, partners, _ = at(0.1)
    assert 1.1 < excess < 1.3
    assert 50 < partners < 180
    _, partners, divergence = at(1)
    assert partners > 180
    close(divergence, otloss.energy_distance(x, y, cost="sqeuclidean"), 0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: otloss.suggest_eps(x, x[:, :1]), ValueError, "same dimension"),
        (lambda x: otloss.suggest_eps(x, x, "l2"), ValueError, "cost must be one of"),
        (lambda x: otloss.suggest_eps(x, x, sharpness=0), ValueError, "sharpness must be finite"),
        (lambda x: otloss.suggest_eps(x[:1], x[:1]), ValueError, "mean cost between x and y"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.arange(8.0).reshape(4, 2))
