"""What is kept of a call serves those that are alike, and no other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import otloss
from otloss import known_calls, method


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_calls, "_calls", {})


def clouds(n: int, m: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    seeded = torch.Generator().manual_seed(n + m + d)
    return tuple(torch.randn(k, d, generator=seeded, dtype=dtype) for k in (n, m))


def value_and_gradients(
    x: Tensor, y: Tensor, wanted: tuple[bool, bool], loss: Any, **options: Any
) -> list[Tensor]:
    points = [t.clone().requires_grad_(w) for t, w in zip((x, y), wanted, strict=True)]
    value = loss(*points, **options)
    assert value.requires_grad == any(wanted)
    moving = [t for t in points if t.requires_grad]
    return [value.detach(), *(torch.autograd.grad(value, moving) if moving else ())]


def test_calls_of_other_kinds_between_change_nothing() -> None:
    losses = (otloss.sinkhorn_divergence, otloss.sinkhorn_loss)
    options: list[dict[str, Any]] = [
        {"eps": 0.5},
        {"eps": 0.25},
        {"eps": 0.5, "cost": "euclidean"},
        {"eps": 0.5, "objective": "transport"},
        {"eps": 0.5, "unbalanced": 2.0},
        {"eps": 0.5, "n_iters": 5},
        {"eps": 0.5, "method": "streamed"},
        {"eps": 0.5, "tol": 1e-4},
    ]
    shapes = [(20, 30, 3, torch.float32), (20, 30, 3, torch.float64), (30, 20, 20, torch.float32)]
    gradients = [(False, False), (True, False), (False, True), (True, True)]
    kinds = list(itertools.product(losses, options, shapes, gradients))
    alone = []
    for loss, chosen, shape, wanted in kinds:
        known_calls._calls.clear()
        alone.append(value_and_gradients(*clouds(*shape), wanted, loss, **chosen))
        assert len(known_calls._calls) == 1
    known_calls._calls.clear()
    for _ in range(2):
        for (loss, chosen, shape, wanted), expected in zip(kinds, alone, strict=True):
            found = value_and_gradients(*clouds(*shape), wanted, loss, **chosen)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_wrong_call_raises_after_a_right_one_like_it() -> None:
    x, y = clouds(8, 9, 2, torch.float32)
    otloss.sinkhorn_divergence(x, y, 1.0)
    bad = y.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(ValueError, match="y must be finite"):
        otloss.sinkhorn_divergence(x, bad, 1.0)
    with pytest.raises(TypeError, match="eps must be a number"):
        otloss.sinkhorn_divergence(x, y, True)
    with pytest.raises(TypeError, match="max_iters must be an integer"):
        otloss.sinkhorn_divergence(x, y, 1.0, max_iters=1000.0)
    with pytest.raises(TypeError, match="unbalanced must be a number"):
        otloss.sinkhorn_divergence(x, y, 1.0, unbalanced=["a", 1])
    with pytest.raises(ValueError, match="eps=1e-09 is below"):
        otloss.sinkhorn_divergence(x, y, 1e-9)


def test_what_else_a_call_depends_on_is_not_kept() -> None:
    x, y = clouds(8, 9, 2, torch.float32)
    weights = torch.rand(8)
    otloss.sinkhorn_divergence(x, y, 1.0)
    known_calls._calls.clear()
    otloss.sinkhorn_divergence(x, y, 1.0, a=weights / weights.sum())
    otloss.sinkhorn_divergence(x, y, torch.tensor(1.0))
    otloss.sinkhorn_divergence(x, y, 1.0, cost=torch.cdist)
    otloss.sinkhorn_divergence(x.mT.contiguous().mT, y, 1.0)
    otloss.sinkhorn_divergence(x.half(), y.half(), 1.0)
    otloss.sinkhorn_divergence(x[None], y[None], 1.0)
    otloss.sinkhorn_divergence(x, y.double(), 1.0)
    otloss.sinkhorn_divergence(x, y, 1.0, method="multiscale")
    assert not known_calls._calls


def test_budget_and_grad_mode_count(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clouds(300, 300, 20, torch.float32)
    x.requires_grad_()
    assert otloss.sinkhorn_divergence(x, y, 5.0).requires_grad
    with torch.no_grad():
        assert not otloss.sinkhorn_divergence(x, y, 5.0).requires_grad
    monkeypatch.setattr(method, "dense_budget", 1 << 10)
    otloss.sinkhorn_divergence(x, y, 5.0)
    stored = [call.settings.dense for call in known_calls._calls.values()]
    assert stored == [True, True, False]


def test_only_so_many_are_kept() -> None:
    x, y = clouds(3, 4, 2, torch.float32)
    for k in range(known_calls.MOST_KEPT + 10):
        otloss.sinkhorn_loss(x, y, 1.0 + k)
    assert len(known_calls._calls) <= known_calls.MOST_KEPT
