"""A target that stays: its self problem is solved once, and nothing else changes."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import rand, randn
from torch import Tensor

import otloss
from otloss import ops
from otloss.autograd import nodes

pytestmark = pytest.mark.skipif(not ops.NATIVE, reason="only the native kernels take a solution")

CASES: list[tuple[int, dict[str, Any]]] = [
    (3, {}),
    (3, {"method": "streamed", "cost": "euclidean"}),
    (3, {"method": "multiscale"}),
    (60, {"unbalanced": 2.0}),
    (60, {"cost": "cosine"}),
]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each solve since was given the solution of its target."""
    found: list[bool] = []
    solve: Callable[..., Any] = ops.solve

    def spy(*arguments: Any) -> Any:
        found.append(arguments[-1] is not None)
        return solve(*arguments)

    monkeypatch.setattr(nodes.ops, "solve", spy)
    return found


def value_and_gradient(loss: Any, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = loss(x, *others)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("d", "options"), CASES)
def test_a_kept_target_changes_no_bit(
    d: int,
    options: dict[str, Any],
    weighted: bool,
    dtype: torch.dtype,
    given: list[bool],
    rng: torch.Generator,
) -> None:
    y, a, b = randn(rng, 2, 40, d, dtype=dtype), None, None
    if weighted:  # of a total that is not 1, with padding
        a, b = torch.full((2, 30), 0.1), rand(rng, 2, 40, dtype=torch.float32)
        b[:, :5] = 0
        b *= 3 / b.sum(-1, keepdim=True)
    loss = otloss.SinkhornDivergence(0.1 * d, **options)
    loss(randn(rng, 2, 30, d, dtype=dtype), y, a, b)
    # far away, nearby, and where the terms cancel
    for x in (9 + randn(rng, 2, 30, d), randn(rng, 2, 30, d), y[:, 5:35]):
        fresh = otloss.SinkhornDivergence(0.1 * d, **options)
        kept = value_and_gradient(loss, x.to(dtype), y, a, b)
        assert all(map(torch.equal, kept, value_and_gradient(fresh, x.to(dtype), y, a, b)))
    assert given == [False, False, False, True, False, True, False]


def test_a_target_that_changed_is_solved_again(given: list[bool], rng: torch.Generator) -> None:
    loss, x, y = otloss.SinkhornDivergence(1.0), randn(rng, 20, 3), randn(rng, 30, 3)
    b = torch.full((30,), 1 / 30)
    for weights in (None, b):
        loss(x, y, None, weights), loss(x, y, None, weights), loss(x, y, None, weights)
    y[0] += 1
    b[0], b[1] = b[1] * 2, 0.0
    value = loss(x, y, None, b)
    loss.options = loss.options._replace(eps=2.0)
    loss(x, y, None, b), loss(x, y.clone(), None, b)
    assert given == [*2 * [False, False, True], False, False, False]
    torch.testing.assert_close(value, otloss.sinkhorn_divergence(x, y, 1.0, b=b), rtol=0, atol=0)


def test_a_change_that_torch_does_not_count_is_seen(rng: torch.Generator) -> None:
    """Through NumPy, as into a buffer that is filled again, or through .data."""
    loss, x, y = otloss.SinkhornDivergence(1.0), randn(rng, 20, 3), randn(rng, 30, 3)
    for change in (lambda: y.numpy().__imul__(3), lambda: y.data.add_(x[0])):
        loss(x, y), loss(x, y)
        change()
        assert torch.equal(loss(x, y), otloss.sinkhorn_divergence(x, y, 1.0))


def test_nothing_is_kept_for_what_is_differentiated(
    given: list[bool], rng: torch.Generator
) -> None:
    loss, x = otloss.SinkhornDivergence(1.0), randn(rng, 20, 3)
    for y in (randn(rng, 30, 3).requires_grad_(), randn(rng, 30, 3).requires_grad_().sin()):
        for _ in range(3):
            (grad,) = torch.autograd.grad(loss(x, y), y, retain_graph=True)
            assert grad.abs().sum() > 0
    assert not any(given)


def test_nothing_is_held_once_the_target_is_gone(rng: torch.Generator) -> None:
    loss, y = otloss.SinkhornDivergence(1.0), randn(rng, 30, 3)
    loss(randn(rng, 20, 3), y), loss(randn(rng, 20, 3), y)
    solution = loss.target._last.solution
    assert solution is not None
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert other.target._last is None
    del y
    assert loss.target._last is None
