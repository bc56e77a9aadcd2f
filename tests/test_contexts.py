"""Where calls are made: in many threads, in workers of a DataLoader, under other defaults of torch,
with views of all kinds, and where there is no memory left."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from helpers import randn
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

import otloss

slow = partial(pytest.param, marks=pytest.mark.slow)
COSTS = ("sqeuclidean", "euclidean", "cosine")
CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dense": partial(otloss.sinkhorn_divergence, eps=0.5, method="dense"),
    "streamed": partial(otloss.sinkhorn_divergence, eps=0.5, method="streamed"),
    "multiscale": partial(otloss.sinkhorn_divergence, eps=0.5, method="multiscale"),
    "reference": partial(otloss.sinkhorn_divergence, eps=0.5, method="reference"),
    "implicit": partial(otloss.sinkhorn_divergence, eps=0.5, objective="transport"),
    "unrolled": partial(otloss.sinkhorn_divergence, eps=0.5, n_iters=4),
    "unbalanced": partial(otloss.sinkhorn_loss, eps=0.5, unbalanced=1.0),
    "function": partial(otloss.sinkhorn_loss, eps=0.5, cost=torch.cdist),
    "energy": otloss.energy_distance,
    "plan": lambda x, y: otloss.solve_sample(x, y, 0.5).plan.square().sum(),
    "grid": lambda x, y: otloss.sinkhorn_divergence_grid(
        x.exp()[None], y.exp()[None], 0.5, unbalanced=1.0
    ).sum(),
}


def value_and_gradient(call: Callable[..., Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    value = call(x, y)
    return [value.detach(), *torch.autograd.grad(value, x)]


def test_many_threads_at_once(rng, threads):
    """Each with a shape, a cost and an eps of its own; at last one module for all of them."""

    def called(k: int) -> list[Tensor]:
        make = torch.Generator().manual_seed(seed + k)
        x, y = randn(make, 5 + 7 * k % 90, 1 + k % 5), randn(make, 4 + 11 * k % 80, 1 + k % 5)
        eps, method = 0.1 * (1 + k % 4), ("dense", "streamed")[k % 2]
        call = partial(otloss.sinkhorn_divergence, eps=eps, cost=COSTS[k % 3], method=method)
        return value_and_gradient(call, x, y)

    seed = int(torch.randint(10**6, (), generator=rng))
    torch.set_num_threads(2)
    expected = [called(k) for k in range(60)]
    y, module = randn(rng, 30, 3), otloss.SinkhornDivergence(0.5, warm_start=True, tol=1e-9)
    clouds = [randn(rng, 20 + k % 3, 3) for k in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert_close(list(pool.map(called, range(60))), expected, rtol=1e-6, atol=1e-9)
        shared = list(pool.map(lambda x: module(x, y), clouds))
    alone = [otloss.sinkhorn_divergence(x, y, 0.5, tol=1e-9) for x in clouds]
    assert_close(shared, alone, rtol=1e-6, atol=1e-8)


class Losses(Dataset[Tensor]):
    """Losses as samples."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> Tensor:
        return otloss.sinkhorn_divergence(self.x[k], self.y, 0.5)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", slow("spawn")])
def test_workers_of_a_data_loader(start, rng, threads):
    torch.set_num_threads(2)
    losses = Losses(randn(rng, 8, 300, 3), randn(rng, 200, 3))
    expected = torch.stack([losses[k] for k in range(8)])  # in this process first
    loader = DataLoader(losses, batch_size=2, num_workers=2, multiprocessing_context=start)
    assert_close(torch.cat(list(loader)), expected, rtol=1e-6, atol=1e-9)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # memory is filled with NaN, too
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def little_recursion() -> Iterator[None]:
    before, depth, frame = sys.getrecursionlimit(), 0, sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        depth += 1
    sys.setrecursionlimit(depth + 60)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "default float64": partial(default_dtype, torch.float64),
    "default float16": partial(default_dtype, torch.float16),
    "default device meta": partial(torch.device, "meta"),
    "deterministic": deterministic,
    "anomalies": partial(torch.autograd.detect_anomaly, check_nan=True),
    "recursion": little_recursion,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_other_defaults_of_torch_change_nothing(context, call, rng):
    x, y = randn(rng, 9, 2, dtype=torch.float32), randn(rng, 9, 2, dtype=torch.float32)
    expected = value_and_gradient(CALLS[call], x, y)
    with CONTEXTS[context]():
        got = value_and_gradient(CALLS[call], x, y)
    assert_close(got, expected)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "one point, expanded": lambda t: t[:1].expand(t.shape),
    "one coordinate, expanded": lambda t: t[:, :1].expand(t.shape),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (1, 1)),
    "negated lazily": lambda t: torch.complex(t, t).conj().imag,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_what_they_show(view, call, rng):
    x, y = randn(rng, 9, 2), randn(rng, 9, 2)
    seen = VIEWS[view](x)
    expected = CALLS[call](seen.clone(memory_format=torch.contiguous_format).resolve_neg(), y)
    assert_close(CALLS[call](seen, y), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize(
    ("call", "n"),
    [
        ('sinkhorn_divergence(x, y, 1.0, method="dense")', 2000),
        slow('sinkhorn_loss(x, y, 1.0, n_iters=3, method="streamed")', 5000),
        slow('sinkhorn_divergence(x, y, 0.05, method="multiscale")', 15_000),
    ],
    ids=["dense", "streamed", "multiscale"],
)
def test_an_allocation_that_fails(call, n):
    """It raises and says so, whichever it is, and the process goes on."""
    text = f"""
        import resource, torch, otloss
        torch.set_num_threads(2)
        small, (x, y) = torch.rand(2, 300, 2), torch.rand(2, {n}, 2)
        x.requires_grad_()
        before = otloss.sinkhorn_divergence(*small, 0.3)
        more, failed = 2**16, True
        while failed:
            size = int(open("/proc/self/statm").read().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (size + more, -1))
            try:
                otloss.{call}.backward()
                failed = False
            except (MemoryError, RuntimeError) as error:
                said = str(error)
                assert "bad_alloc" in said or "can't allocate memory" in said, said
                print(said)
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
            assert torch.equal(otloss.sinkhorn_divergence(*small, 0.3), before)
            more = 3 * more // 2
    """
    command = [sys.executable, "-c", textwrap.dedent(text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout
