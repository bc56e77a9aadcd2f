"""What only a real GPU shows: streams, graphs, autocast, memory, sizes that fill it. Everything
else runs on it as one of the backends, here and on an emulated GPU: `pytest -k cuda`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import COSTS, DTYPES, Clouds, clouds
from torch import Tensor
from torch.testing import assert_close

import otloss
from otloss import method as methods

REGIMES = ["auto", "block", "cluster", "dense", "streamed"]
# Envelope, unrolled and implicit gradients.
MODES: list[dict[str, Any]] = [
    {},
    {"n_iters": 7},
    {"objective": "transport"},
    {"unbalanced": 2.0},
    {"unbalanced": (None, 2.0), "objective": "transport"},
]
SIZES = [(1, 1), (7, 300), (64, 64), (200, 190), (700, 650), (1500, 1600)]


@pytest.fixture(params=REGIMES)
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cluster" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("thread-block clusters need compute capability 9.0")
    monkeypatch.setenv("OTLOSS_CUDA_REGIME", request.param)
    return request.param


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def weighted(
    n: int, m: int, d: int = 3, dtype: torch.dtype = torch.float32, batch: int | None = None
) -> Clouds:
    c = clouds(torch.Generator().manual_seed(n + m + d), n, m, d, weights="random", batch=batch)
    for w in (c.a, c.b):
        w[..., w.shape[-1] // 2] *= w.shape[-1] == 1  # padding
        w /= w.sum(-1, keepdim=True)
    return c.to(dtype)


def two(n: int, m: int, d: int = 3) -> tuple[Tensor, Tensor]:
    """Points alone, on the GPU."""
    c = weighted(n, m, d).to("cuda")
    return c.x, c.y


def assert_relative(found: Any, expected: Any, tol: float) -> None:
    """Of each tensor to its largest entry."""
    for one, other in zip(found, expected, strict=True):
        one, other = one.detach().cpu(), other.detach().cpu()
        scale = float(other.abs().max())
        assert_close(one / scale, other / scale, rtol=0, atol=tol, check_dtype=False)


def added_memory(call: Callable[[], Any]) -> tuple[int, Any]:
    """What a call allocates at most beyond what there is, and its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    return torch.cuda.max_memory_allocated() - before, result


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_second_derivatives(mode):
    def curvature(device: str) -> tuple[Tensor, ...]:
        c = weighted(30, 25, dtype=torch.float64).to(device)
        c.x.requires_grad_()
        loss = c.loss(1.0, **{"tol": 1e-9, **mode})
        (first,) = torch.autograd.grad(loss, c.x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), c.x)

    assert_relative(curvature("cuda"), curvature("cpu"), 1e-6)


def test_memory_of_unrolled_gradients():
    """The potentials of each iteration, not its matrices."""
    n, L, eps = 1000, 200, 10.0
    x, y = two(n, n, 64)
    leaf = x.requires_grad_()

    def loop() -> Tensor:
        C = torch.cdist(leaf, y).square()
        f = g = leaf.new_zeros(n)
        for _ in range(L):
            f = -eps * torch.logsumexp((g - C) / eps - math.log(n), dim=1)
            g = -eps * torch.logsumexp((f[:, None] - C) / eps - math.log(n), dim=0)
        return f.mean() + g.mean()

    def ours() -> Tensor:
        return otloss.sinkhorn_loss(leaf, y, eps, n_iters=L)

    (less, grad), (more, expected) = (
        added_memory(lambda loss=loss: torch.autograd.grad(loss(), leaf)) for loss in (ours, loop)
    )
    assert less < more / 50
    assert_relative(grad, expected, 1e-3)


def assert_value_of_the_cpu(c: Clouds) -> None:
    values = (t.loss(1.0, debiased=False, tol=1e-5).cpu() for t in (c.to("cuda"), c))
    assert_close(*values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_sizes(regime, n, m, dtype):
    if regime == "block" and n * m * dtype.itemsize > 160_000:
        pytest.skip("the cost does not fit in the shared memory of one block")
    if regime == "cluster" and n * m > 300000:
        pytest.skip("the cost does not fit in the shared memory of a cluster")
    assert_value_of_the_cpu(weighted(n, m, dtype=dtype))


def test_many_problems(regime):
    assert_value_of_the_cpu(weighted(20, 24, batch=500))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_repeats_bit_for_bit(regime, mode):
    c, results = weighted(180, 150, batch=2).to("cuda").require_grad(), []
    for _ in range(5):
        value = c.loss(0.3, **mode)
        results.append((value.detach(), *c.grads(value)[:2]))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_uses_the_current_stream(regime):
    x, y = two(200, 180)
    expected = otloss.sinkhorn_divergence(x, y, 1.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what is queued elsewhere would run too early
        moved = x + 1
        value = otloss.sinkhorn_divergence(moved, y + 1, 1.0)
    stream.synchronize()
    assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_graph_capture(regime, mode):
    x, y = two(100, 90)
    x.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = otloss.sinkhorn_divergence(x, y, 1.0, **mode)
        return value, torch.autograd.grad(value, x)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grad = step()
    for shift in (0.0, 2.0):
        with torch.no_grad():
            x.add_(shift)
        graph.replay()
        expected, expected_grad = step()
        assert bool((value == expected).all() and (grad == expected_grad).all())


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_does_not_synchronise(regime, mode):
    x, y = two(100, 90)
    x.requires_grad_()
    otloss.sinkhorn_divergence(x, y, 1.0, **mode).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        otloss.sinkhorn_divergence(x, y, 1.0, **mode).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [3, 64])
def test_autocast(regime, d, dtype):
    """Losses are those of the same numbers in float32; gradients come back in the input's dtype."""
    x, y = (t.to(dtype) for t in two(100, 90, d))
    results = []
    for inputs, autocast in ((x, True), (x, False), (x.float(), False)):
        leaf = inputs.detach().requires_grad_()
        with torch.autocast("cuda", dtype=dtype, enabled=autocast):
            loss = otloss.sinkhorn_divergence(leaf, y.to(leaf.dtype), float(d))
            plan = otloss.solve_sample(leaf, y.to(leaf.dtype), float(d)).plan
        assert loss.dtype == plan.dtype == torch.float32
        (grad,) = torch.autograd.grad(loss, leaf)
        assert grad.dtype == leaf.dtype
        results.append((loss.detach(), plan.detach(), grad.float()))
    *halves, (loss, plan, grad) = results
    for other_loss, other_plan, other_grad in halves:
        assert_close(other_loss, loss, rtol=1e-5, atol=1e-6)
        assert_close(other_plan, plan, rtol=1e-4, atol=1e-8)
        error = 2 * torch.finfo(dtype).eps * (float(grad.norm()) + 1e-3)
        assert float((other_grad - grad).norm()) <= error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_around_a_network(dtype):
    network = torch.nn.Linear(3, 8).cuda()
    x, _ = two(60, 50)
    with torch.autocast("cuda", dtype=dtype):
        features = network(x)
        assert features.dtype == dtype
        loss = otloss.sinkhorn_divergence(features, features.detach() + 1, 0.5)
    assert loss.dtype == torch.float32
    loss.backward()
    assert bool(network.weight.grad.isfinite().all())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_the_tensors_are():
    x, y = (t.to("cuda:1") for t in two(100, 90))
    value = otloss.sinkhorn_divergence(x, y, 1.0)
    assert value.device == x.device
    assert torch.cuda.current_device() == 0
    with pytest.raises((RuntimeError, ValueError)):
        otloss.sinkhorn_divergence(x, y.to("cuda:0"), 1.0)


def test_results_and_configuration_tell_the_plan(monkeypatch):
    monkeypatch.delenv("OTLOSS_CUDA_REGIME", raising=False)
    x, y = two(60, 50)
    assert "block, 1 block per problem" in otloss.solve_sample(x, y, 1.0).explain()
    streamed = otloss.solve_sample(x, y, 1.0, method="streamed").explain()
    assert streamed.startswith("streamed on cuda:0: streamed, ")
    config = otloss.show_config(mode="dicts")
    assert config is not None
    assert "per problem" in config["cuda_layout_200"]


def whole_step(
    network: torch.nn.Module, optimizer: torch.optim.Optimizer, y: Tensor, noise: Tensor
) -> Tensor:
    optimizer.zero_grad(set_to_none=False)
    loss = otloss.sinkhorn_divergence(network(noise), y, 0.5)
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_graph_capture_of_a_training_step(regime):
    """Network, loss, backward pass and optimizer in one graph, replayed on new data."""
    generator = torch.Generator("cuda").manual_seed(0)
    noise, y = (torch.randn(120, 3, generator=generator, device="cuda") for _ in range(2))
    runs = []
    for captured in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
        ).cuda()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        given = [noise.clone(), y.clone()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                whole_step(network, optimizer, given[1], given[0])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                loss = whole_step(network, optimizer, given[1], given[0])
        losses = []
        for step in range(5):
            given[1].copy_(y + 0.1 * step)
            if captured:
                graph.replay()
                losses.append(float(loss))
            else:
                losses.append(float(whole_step(network, optimizer, given[1], given[0])))
        runs.append([*losses, *(float(p.detach().sum()) for p in network.parameters())])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_a_batch_whose_problems_end_at_different_times(regime):
    """Each ends with its own number of passes, whatever the others need."""
    c = weighted(60, 50, batch=64)
    c.y *= torch.linspace(0.2, 3, 64)[:, None, None]  # from easy to hard
    there, call = c.to("cuda"), {"tol": 1e-3, "max_iters": 3000}
    batch = there.solve(0.2, **call)
    assert bool(batch.converged.all())
    assert len(set(batch.n_iters.tolist())) > 3
    for k in (0, 31, 63):
        assert_close(batch.value[k], there.item(k).solve(0.2, **call).value, rtol=1e-3, atol=1e-4)
    assert_close(batch.value.cpu(), c.solve(0.2, **call).value, rtol=1e-3, atol=1e-3)


def fraction(c: Clouds, cost: str, share: float) -> float:
    """Of the mean cost."""
    return share * float(otloss.cost_matrix(c.x, c.y, cost).mean())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("d", [2, 17, 70])
def test_streamed_solves_and_gradients(cost, d, dtype):
    c, results = weighted(2100, 3300, d, dtype), []
    eps = fraction(c, cost, 0.1)
    for device in ("cuda", "cpu"):
        t = c.to(device).require_grad()
        loss = t.loss(eps, cost=cost, tol=1e-5, method="streamed")
        results.append((loss.cpu(), t.grads(loss)[:2]))
    (value, grads), (expected, others) = results
    assert_close(value, expected, rtol=1e-3, atol=1e-3 * eps)
    assert_relative(grads, others, 3e-3)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(("n", "m", "d"), [(2000, 2000, 64), (700, 5001, 100), (1500, 1300, 784)])
def test_tensor_cores_are_accurate(cost, n, m, d):
    """Against float64: 1e-5 of the value, 1e-4 of the largest gradient, as float32 elsewhere."""
    c, results = weighted(n, m, d, torch.float64), []
    eps = fraction(c, cost, 0.1)
    for dtype in DTYPES:
        t = c.to(dtype).to("cuda").require_grad()
        loss = t.loss(eps, debiased=False, cost=cost, tol=1e-6, method="streamed")
        results.append((loss.double(), t.grads(loss)[:2]))
    (value, grads), (expected, others) = results
    assert_close(value, expected, rtol=1e-5, atol=0)
    assert_relative(grads, others, 1e-4)


@pytest.mark.parametrize("cost", COSTS)
def test_tf32_is_allowed(cost):
    c = weighted(1500, 1300, 200).to("cuda")
    eps = fraction(c, cost, 0.1)

    def loss(precision: str, method: str) -> Tensor:
        call = {"cost": cost, "tol": 1e-5, "method": method, "precision": precision}
        return c.loss(eps, debiased=False, **call)

    exact, found = loss("float32", "streamed"), loss("tf32", "streamed")
    assert bool(found != exact)
    assert_close(found, exact, rtol=5e-3, atol=0)
    assert bool(loss("float32", "dense") == loss("tf32", "dense"))


@pytest.mark.parametrize("d", [3, 64])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_rows_shared_by_blocks(monkeypatch, d, parts):
    monkeypatch.setenv("OTLOSS_CUDA_PARTS", str(parts))
    c = weighted(1100, 2300, d).to("cuda")
    eps = fraction(c, "sqeuclidean", 0.05)

    def value() -> Tensor:
        return c.loss(eps, tol=1e-5, method="streamed")

    found = value()
    assert bool(found == value())
    monkeypatch.setenv("OTLOSS_CUDA_TILES", "fma")
    monkeypatch.setenv("OTLOSS_CUDA_PARTS", "1")
    assert_close(found, value(), rtol=1e-4, atol=1e-5 * eps)


STREAMED = [
    {"n_iters": 2, "backward": "envelope"},
    {"n_iters": 2, "objective": "transport"},
    {"tol": 0.1, "objective": "transport"},
]


@pytest.mark.parametrize("mode", STREAMED, ids=str)
def test_streamed_stores_no_matrix(mode):
    """60 000 x 60 000 float32 costs would take 14 GB."""
    x, y = (torch.rand(60_000, 3, device="cuda") for _ in range(2))
    x.requires_grad_()
    loss = lambda: otloss.sinkhorn_loss(x, y, 0.1, method="streamed", **mode)  # noqa: E731
    assert added_memory(lambda: loss().backward())[0] < 100e6
    assert bool(x.grad is not None and x.grad.isfinite().all())


def test_streamed_results_store_no_matrix(monkeypatch):
    monkeypatch.delenv("OTLOSS_CUDA_REGIME", raising=False)
    c, told = weighted(3000, 2500).to("cuda"), []
    c.x.requires_grad_()
    for method in ("dense", "streamed"):
        result = c.solve(0.5, method=method, tol=1e-5)
        values = (result.value_linear, *result.marginals, result.barycentric_map())
        grads = torch.autograd.grad(sum(t.square().sum() for t in values), c.x)
        told.append((*values, result.extend(c.x + 0.1), *grads))
    assert_relative(*reversed(told), 1e-3)
    points = torch.rand(40_000, 3, device="cuda")  # 6.4 GB of costs
    call = {"method": "streamed", "tol": 0.1}
    solve = lambda: otloss.solve_sample(points, points + 1, 1.0, **call)  # noqa: E731
    assert added_memory(lambda: solve().barycentric_map())[0] < 600e6


@pytest.mark.parametrize("method", ["dense", "streamed"])
def test_the_gaussian_start_saves_passes(monkeypatch, method):
    """Far apart and of different spread: most of the potential is the Gaussians'."""
    monkeypatch.delenv("OTLOSS_CUDA_REGIME", raising=False)
    monkeypatch.setenv("OTLOSS_NEWTON", "0")  # which a GPU does not have
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4000, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    y = 3 * y @ torch.diag(torch.tensor([1.0, 0.2, 2.0, 0.5]).double()) + 9

    def passes(device: str, init: tuple[Tensor, Tensor] | None) -> int:
        call = {"method": method, "tol": 1e-2, "init": init}
        return int(otloss.solve_sample(x.to(device), y.to(device), 1.0, **call).n_iters)

    nothing = torch.zeros(4000, dtype=torch.float64, device="cuda")
    started = passes("cuda", None)
    assert started < passes("cuda", (nothing, nothing))
    assert abs(started - passes("cpu", None)) <= 2


def test_auto_streams_what_does_not_fit(monkeypatch):
    monkeypatch.delenv("OTLOSS_CUDA_REGIME", raising=False)
    x = torch.empty(1, 10, 64, device="cuda")
    memory = torch.cuda.get_device_properties(0).total_memory
    n = math.isqrt(memory // 16)
    assert methods.choose_method([x], [(n // 2, n)], 4) == "dense"
    assert methods.choose_method([x], [(2 * n, n)], 4) == "streamed"
