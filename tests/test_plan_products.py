"""Products of the gradients of points, by all entries of a plan or by lists of those that count.

Entries may be left out that are less together than the rounding of their row.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import otloss

LEVELS = ["baseline", "avx2", "avx512"]
DTYPES = [torch.float32, torch.float64]
SHAPES = [(150, 230, 80), (30, 500, 784), (40, 130, 37), (25, 256, 512), (7, 3, 96)]
DENSITIES = [0.0, 0.05, 0.3, 0.45, 0.6, 1.0]  # 0: one entry per row


def errors(W: Tensor, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Of the gradients of <W, C> in x and y, in units of the rounding of W's sums."""
    points = x.clone().requires_grad_(), y.clone().requires_grad_()
    found = torch.autograd.grad(otloss.cost_matrix(*points), points, W)
    V, clouds = W.numpy().astype(np.longdouble), (x.numpy(), y.numpy())
    largest = max(float(cloud.abs().max()) for cloud in (x, y))
    result = []
    for grad, plan, own, other in [(found[0], V, *clouds), (found[1], V.T, *reversed(clouds))]:
        sums = plan.sum(1, keepdims=True)
        exact = 2 * (own * sums - plan @ other.astype(np.longdouble))
        unit = torch.finfo(W.dtype).eps / 2 * largest * np.abs(plan).sum(1, keepdims=True) + 1e-300
        result.append(float((np.abs(grad.numpy() - exact) / unit).max()))
    return result[0], result[1]


def clouds(n: int, m: int, d: int, dtype: torch.dtype, rng: torch.Generator) -> tuple[Tensor, ...]:
    x, y = (torch.rand(k, d, generator=rng, dtype=torch.float64) for k in (n, m))
    return x.to(dtype), y.to(dtype)


def plan(n: int, m: int, density: float, dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Entries that count, and between them what is close to the limit, above and below."""
    W = torch.rand(n, m, generator=rng, dtype=torch.float64)
    large = torch.rand(n, m, generator=rng, dtype=torch.float64) < density
    large[torch.arange(n), torch.randint(m, (n,), generator=rng)] = True
    rest = torch.finfo(dtype).eps / m * torch.rand(n, m, generator=rng, dtype=torch.float64)
    return torch.where(large, W + 0.5, rest).to(dtype)


def check_all(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for dtype in DTYPES:
        for n, m, d in SHAPES:
            for density in DENSITIES:
                W = plan(n, m, density, dtype, rng)
                assert max(errors(W, *clouds(n, m, d, dtype, rng))) < 60, (dtype, n, m, d, density)


@pytest.mark.parametrize("level", LEVELS)
def test_all_densities_at_every_level(level, rng):
    command = f"from tests.test_plan_products import check_all; check_all({rng.initial_seed()})"
    environment = {**os.environ, "OTLOSS_SIMD": level}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1.0, 100.0])
def test_what_is_left_out(share, dtype, rng):
    """Entries just below the limit, or 100 times as large, pull far to one side."""
    n, m, d = 24, 200, 64
    x, y = clouds(n, m, d, dtype, rng)
    y[: m // 3] += 10
    small = 0.5 + 0.5 * torch.rand(n, m // 3, generator=rng, dtype=dtype)
    W = torch.zeros(n, m, dtype=dtype)
    W[:, : m // 3] = share * torch.finfo(dtype).eps / 2 / m * small
    W[:, -1] = 1
    assert errors(W, x, y)[0] < 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_entries_of_far_points_count(dtype, rng):
    """What is left out is small as a product, not as an entry alone."""
    n, m, far = 24, 200, 101
    x, y = clouds(n, m, 64, dtype, rng)
    y[far] *= 1e6
    W = torch.zeros(n, m, dtype=dtype)
    W[:, 0] = 1
    W[:, far] = 0.2 * torch.finfo(dtype).eps / m
    points = x.requires_grad_()
    (grad,) = torch.autograd.grad(otloss.cost_matrix(points, y), points, W)
    exact = 2 * (x.detach() * W.sum(1, keepdim=True) - W @ y).double()
    rounding = torch.finfo(dtype).eps / 2
    assert 2 * W[0, far] * y[far].max() > 500 * rounding  # of the far point
    torch.testing.assert_close(grad.double(), exact, rtol=0, atol=20 * rounding)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_counts(value, rng):
    x, y = clouds(24, 200, 64, torch.float32, rng)
    x.requires_grad_()
    W = torch.eye(24, 200)
    W[3, 7] = value
    (grad,) = torch.autograd.grad(otloss.cost_matrix(x, y), x, W)
    assert not grad[3].isfinite().any()
    assert grad[[i for i in range(24) if i != 3]].isfinite().all()


@pytest.mark.parametrize("method", ["dense", "streamed"])
@pytest.mark.parametrize(
    "options",
    [{}, {"unbalanced": 5.0}, {"cost": "euclidean", "eps": 0.01}, {"cost": "cosine", "eps": 1e-3}],
    ids=str,
)
def test_gradients_of_sparse_plans(options, method, rng):
    """In float32, of a batch with empty points: those of the plan in float64."""
    x, y = (torch.rand(2, n, 96, generator=rng, dtype=torch.float64) for n in (50, 130))
    a = torch.full((2, 50), 1 / 50, dtype=torch.float64)
    b = torch.rand(2, 130, generator=rng, dtype=torch.float64) + 0.1
    b[:, ::7] = 0
    b /= b.sum(-1, keepdim=True)
    options = {"eps": 0.1, "tol": 1e-2, "max_iters": 5000, **options}

    points = x.float().requires_grad_(), y.float().requires_grad_()
    result = otloss.solve_sample(
        *points, a=a.float(), b=b.float(), method=method, backward="envelope", **options
    )
    grads = torch.autograd.grad(result.value.sum(), points)
    P = result.plan.detach().double()
    shares = P / P.sum(-1, keepdim=True)
    assert (shares < 2**-24 / 130).double().mean() > 0.5
    points = x.requires_grad_(), y.requires_grad_()
    C = otloss.cost_matrix(*points, options.get("cost", "sqeuclidean"))
    for grad, expected in zip(grads, torch.autograd.grad(C, points, P), strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_threads_agree(rng):
    x, y = clouds(300, 400, 64, torch.float32, rng)
    W = plan(300, 400, 0.3, torch.float32, rng)
    x.requires_grad_()
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(torch.autograd.grad(otloss.cost_matrix(x, y), x, W)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("d", [16, 17, 32, 50])
@pytest.mark.parametrize("n", [7, 33, 200])
def test_half_of_a_symmetric_cost(n, d, cost, rng):
    x = torch.randn(n, d, generator=rng)
    found, expected = (otloss.cost_matrix(x, other, cost) for other in (x, x.clone()))
    torch.testing.assert_close(found, expected.fill_diagonal_(0), rtol=1e-5, atol=1e-4)
