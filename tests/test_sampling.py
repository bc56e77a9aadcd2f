"""Pairs drawn from a plan have its probabilities, batched and streamed."""

from __future__ import annotations

import pytest
import torch
from helpers import METHODS, close, clouds, randn
from torch import Tensor
from torch.testing import assert_close

import otloss
from otloss import method as methods


@pytest.fixture
def _small_blocks(monkeypatch):
    """Streamed rows one or two at a time."""
    monkeypatch.setattr(methods, "BLOCK_BYTES", 100)


def frequencies(i: Tensor, j: Tensor, shape: tuple[int, int]) -> Tensor:
    return (i * shape[1] + j).bincount(minlength=shape[0] * shape[1]).reshape(shape) / len(i)


def chi_square(drawn: Tensor, p: Tensor, count: int) -> float:
    """Over its degrees of freedom; 1 but for about sqrt(2 / degrees)."""
    assert bool((drawn[p < 1e-12] == 0).all())
    seen = p * count > 5
    return float((count * (drawn - p).square()[seen] / p[seen]).sum() / seen.sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", ["random", "padded"])
@pytest.mark.parametrize("unbalanced", [None, 0.5])
@pytest.mark.usefixtures("_small_blocks")
def test_pairs_have_the_probabilities_of_the_plan(method, weights, unbalanced, rng):
    c = clouds(rng, 6, 5, 2, weights=weights, batch=2)
    result = c.solve(0.5, method=method, unbalanced=unbalanced)
    count = 40_000
    i, j = result.sample(count, torch.Generator().manual_seed(1))
    assert i.shape == j.shape == (2, count)
    for k, P in enumerate(result.plan):
        assert chi_square(frequencies(i[k], j[k], P.shape), P / P.sum(), count) < 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("_small_blocks")
def test_one_partner_for_every_point(method, rng):
    """Drawn from its row; a point of weight 0 has none."""
    c = clouds(rng, 5, 4, 2, weights="padded")
    result = c.solve(0.5, method=method)
    P, generator = result.plan, torch.Generator().manual_seed(1)
    drawn = torch.zeros_like(P)
    for _ in range(4000):
        i, j = result.sample(generator=generator)
        assert i.tolist() == list(range(5))
        assert_close(j == -1, c.a == 0)
        drawn[i[j >= 0], j[j >= 0]] += 1 / 4000
    for row, p in zip(drawn, P, strict=True):
        if p.sum() > 0:
            assert chi_square(row, p / p.sum(), 4000) < 10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("_small_blocks")
def test_argmax(method, rng):
    c = clouds(rng, 7, 5, 2, weights="padded", batch=3)
    result = c.solve(0.1, method=method)
    best = result.plan.argmax(-1)
    assert_close(result.argmax(), torch.where(c.a > 0, best, -1))


def test_draws_repeat_and_leave_gradients(rng):
    """A generator repeats them; the plan that they made is kept with its graph."""
    x, y = randn(rng, 4, 2).requires_grad_(), randn(rng, 6, 2)
    result = otloss.solve_sample(x, y, 0.5)
    same = [result.sample(9, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert_close(*same)
    drawn = torch.autograd.grad(result.plan.square().sum(), x)
    fresh = otloss.solve_sample(x, y, 0.5).plan
    close(drawn, torch.autograd.grad(fresh.square().sum(), x), 1e-9)
    with pytest.raises(ValueError, match="n must be at least 1"):
        result.sample(0)
