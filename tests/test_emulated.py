"""Cases of test_cuda_host.py, ported to the emulated backend as examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated_backend import build, load, serving
from helpers import COSTS, DTYPES, STRENGTHS, Clouds, clouds, close, name, unequal

import otloss
from otloss import ops, reference

Compute = Callable[[], list[torch.Tensor]]
MODES: dict[str, dict[str, Any]] = {
    "envelope": {"tol": 1e-5},
    "unrolled": {"n_iters": 7, "backward": "unrolled"},
    "implicit": {"objective": "transport", "backward": "implicit", "tol": 1e-4},
}


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    return load(build())


@pytest.fixture(params=["block", "cluster", "grid", "dense", "streamed"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OTLOSS_CUDA_REGIME", request.param)
    return request.param


def gradients(c: Clouds, regime: str, **options: Any) -> list[torch.Tensor]:
    """Value and gradients of a divergence in new leaves."""
    c = Clouds(*[None if t is None else t.detach().clone() for t in vars(c).values()])
    method = "streamed" if regime == "streamed" else "dense"
    x, y, a, b = vars(c.require_grad()).values()
    value = otloss.sinkhorn_divergence(x, y, 0.5, a=a, b=b, method=method, **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), c.inputs())]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strength", [None, *STRENGTHS], ids=str)
def test_as_the_cpu(emulated, regime, dtype, mode, strength, rng):
    c = clouds(rng, 40, 33, 3, weights="padded", batch=2, dtype=dtype)
    c = c if strength is None else unequal(c, 1.3)
    options = {"unbalanced": strength, **MODES[mode]}
    expected = gradients(c, regime, **options)
    before = emulated.launches()
    with serving(emulated):
        found = gradients(c, regime, **options)
    assert emulated.launches() > before
    # The CPU may take Newton's step at the end; both then are within tol of the solution.
    exact = mode == "unrolled" and dtype == torch.float64
    for got, true in zip(found, expected, strict=True):
        close(got, true, 1e-10 if exact else 2e-3)


@pytest.mark.parametrize("mode", MODES)
def test_order_of_threads_does_not_matter(emulated, regime, mode, rng):
    c = clouds(rng, 37, 150, 3, weights="padded", batch=2, dtype=torch.float32)
    results = []
    for order in range(5):
        with serving(emulated, order=order):
            results.append(gradients(c, regime, **MODES[mode]))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", range(3), ids=COSTS)
@pytest.mark.parametrize("d", [1, 3, 40])
@pytest.mark.parametrize("pairs", [[0, 1], [0, 0]], ids=str)
def test_costs_and_their_gradients(emulated, dtype, kind, d, pairs, rng):
    c = clouds(rng, 35, 270, d, weights="padded", batch=2, dtype=dtype)
    points, weights = [c.x + 10, c.y + 10], [c.a, c.b]
    with serving(emulated):
        (C,) = ops.cost(points, weights, pairs, kind)
        W = torch.randn(C.shape, generator=rng).to(dtype)
        W = W * (weights[0] > 0)[..., None] * (weights[pairs[1]] > 0)[:, None]
        (grad,) = ops.cost_backward([W], [C], points, weights, pairs, kind, [0])
    true = [torch.where(w[..., None] > 0, x, 0.0).double() for x, w in zip(points, weights)]
    (expected,) = reference.cost(true, [], pairs, kind)
    (true_grad,) = reference.cost_backward([W.double()], [expected], true, [], pairs, kind, [0])
    counted = (W != 0).double()
    scale = max(1.0, float(expected.norm()), float(true_grad.norm()))  # cosine in one dimension: 0
    close(C * counted, expected * counted, 1e-4 if dtype == torch.float32 else 1e-10, scale)
    close(grad, true_grad, 1e-3 if dtype == torch.float32 else 1e-9, scale)


def test_what_was_enabled_is_given_back(emulated):
    before = emulated.launches()
    otloss.sinkhorn_divergence(torch.rand(5, 2), torch.rand(4, 2), 0.5)
    assert emulated.launches() == before
    with serving(emulated, multiprocessors=132):
        assert emulated.describe_plan(False, 1, 600, 600, 0).startswith("cluster, 16 blocks")
        value = otloss.sinkhorn_divergence(torch.rand(5, 2), torch.rand(4, 2), 0.5)
    assert math.isfinite(float(value))
    assert emulated.launches() > before
