"""torch.compile(fullgraph=True) of a loss and its backward. Few tests: compiling is slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import METHODS, clouds, randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import otloss


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def assert_compiles(function: Callable[..., Tensor], inputs: list[Tensor], backend: str) -> None:
    """The same value and gradients as without."""
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected, got = function(*inputs), compiled(*inputs)
    assert_close(got, expected)
    assert_close(*(torch.autograd.grad(t.sum(), inputs) for t in (got, expected)))


LOSSES: dict[str, Callable[..., Tensor]] = {
    "divergence": lambda x, y, **k: otloss.sinkhorn_divergence(x, y, 0.5, **k),
    "loss": lambda x, y, **k: otloss.sinkhorn_loss(x, y, 0.5, cost="euclidean", **k),
    "energy": lambda x, y: otloss.energy_distance(x, y),
    "minibatch": lambda x, y: otloss.minibatch_energy_distance(x, x + 1, y, y + 1, 0.5),
    "callable": lambda x, y: otloss.sinkhorn_divergence(
        x,
        y,
        0.5,
        symmetric=True,
        cost=lambda x, y: (x[..., None, :] - y[..., None, :, :]).abs().sum(-1),
    ),
    "unrolled": lambda x, y: otloss.sinkhorn_divergence(x, y, 1.0, n_iters=3),
    "implicit": lambda x, y: otloss.sinkhorn_divergence(x, y, 1.0, objective="transport"),
    "module": otloss.SinkhornDivergence(0.5),
    "unbalanced": lambda x, y: otloss.sinkhorn_divergence(x, y, 0.5, unbalanced=(1.0, None)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_traced_and_differentiated(loss, rng):
    x, y = randn(rng, 6, 3).requires_grad_(), randn(rng, 5, 3).requires_grad_()
    assert_compiles(loss, [x, y], "aot_eager")


ITERATIONS: dict[str, Callable[..., Tensor]] = {
    "loss": lambda x, y, a: otloss.sinkhorn_loss(x, y, 1.0, a=a, unbalanced=1.0, n_iters=3),
    "mass": lambda x, y, a: otloss.solve_sample(x, y, 1.0, a=a, mass=0.3, n_iters=3).value,
    "start": lambda x, y, a: (
        otloss.solve_sample(
            x, y, 1.0, a=a, unbalanced=1.0, n_iters=3, init=(x[:, 0].detach(), y[:, 0].detach())
        ).value
    ),
}


@pytest.mark.parametrize("loss", ITERATIONS.values(), ids=ITERATIONS)
def test_iterations_of_weights(loss, rng):
    x, y, a = randn(rng, 6, 3), randn(rng, 5, 3), torch.full((6,), 0.2, dtype=torch.float64)
    a[2] = 0
    assert_compiles(loss, [t.requires_grad_() for t in (x, y, a)], "aot_eager")


@pytest.mark.parametrize("method", METHODS)
def test_weights_and_batch(method, rng):
    c = clouds(rng, 6, 5, 3, weights="padded", batch=2).require_grad()

    def loss(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return otloss.sinkhorn_divergence(x.relu() + x, y, 0.5, a=a, b=b, method=method)

    if method == "reference":  # it looks at the data to stop, which a traced graph cannot
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            assert_compiles(loss, c.inputs(), "aot_eager")
        return
    assert_compiles(loss, c.inputs(), "aot_eager")


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_traced_without_gradients(loss, rng):
    """Evaluation: torch.compile treats functions without a gradient in another way."""
    x, y = randn(rng, 6, 3), randn(rng, 5, 3)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert_close(compiled(x, y), loss(x, y))


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)])
def test_sizes_that_change(dynamic, graphs, with_gradients, rng):
    """The last minibatch of an epoch is smaller: at most one graph more, not one per size."""
    count = 0

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        nonlocal count
        count += 1
        return graph.forward

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return otloss.sinkhorn_divergence(x, y, 0.5)

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    for n, m in ((6, 5), (9, 4), (7, 11), (3, 12)):
        x, y = randn(rng, n, 3).requires_grad_(with_gradients), randn(rng, m, 3)
        got, expected = compiled(x, y), loss(x, y)
        assert_close(got, expected)
        if with_gradients:
            assert_close(*(torch.autograd.grad(t, x) for t in (got, expected)))
    assert count == graphs


@pytest.mark.parametrize(
    "anneal",
    [
        lambda t: {"eps": t},
        pytest.param(
            lambda t: {"eps": 0.5, "tol": 1e-3 * t},
            marks=pytest.mark.xfail(
                torch.__version__ < "2.11", reason="torch 2.10 makes a graph for each value"
            ),
        ),
        lambda t: {"eps": 0.5, "unbalanced": t},
        lambda t: {"eps": 0.5, "unbalanced": (t, None)},
    ],
    ids=["eps", "tol", "unbalanced", "one side"],
)
def test_numbers_that_change(anneal, rng):
    """An annealed number of the solver needs one graph more, not one per value."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, y: Tensor, t: float) -> Tensor:
        return otloss.sinkhorn_divergence(x, y, **anneal(t))

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    x, y = randn(rng, 6, 3).requires_grad_(), randn(rng, 5, 3)
    for t in (1.0, 0.9, 0.7, 0.5, 0.3):
        got, expected = compiled(x, y, t), loss(x, y, t)
        assert_close(got, expected)
        assert_close(*(torch.autograd.grad(value, x) for value in (got, expected)))
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_inductor(rng):
    """The whole way, code generation included, inside a training step."""
    network = torch.nn.Linear(3, 3).double()
    x, y = randn(rng, 6, 3), randn(rng, 5, 3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return otloss.sinkhorn_divergence(network(x), y, 0.5) * 2

    losses = step(x, y), torch.compile(step, fullgraph=True)(x, y)
    assert_close(*(torch.autograd.grad(loss, tuple(network.parameters())) for loss in losses))


def test_inductor_keeps_the_nan_of_a_failure(rng):
    """Costs that overflow: what is not read raises nothing."""
    x, y = (randn(rng, n, 3, dtype=torch.float32) for n in (6, 5))
    x = (1e25 * x).requires_grad_()
    loss = torch.compile(LOSSES["implicit"], fullgraph=True)(x, y)
    (grad,) = torch.autograd.grad(loss, x)
    assert bool(loss.isnan())
    assert bool(grad.isnan().all())


def test_errors_are_still_raised(rng):
    """What can be said without data is said while tracing."""
    loss = torch.compile(lambda x, y: otloss.sinkhorn_loss(x, y, 0.5), backend="eager")
    with pytest.raises(ValueError, match="same dimension d, got 3 and 2"):
        loss(randn(rng, 4, 3), randn(rng, 4, 2))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("a must be non-negative", {"a": torch.tensor([2.0, -1.0, 0.5, 0.5]) / 2}),
        ("same total mass", {"a": torch.full((4,), 0.5)}),
        ("is below what torch.float32 can resolve", {"eps": 1e-9}),
    ],
    ids=["negative", "totals", "eps"],
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_errors_of_data_are_raised_when_it_runs(message, options, backend, rng):
    """Where eager code raises, traced code does on a CPU: a wrong call never returns a number."""

    def loss(x: Tensor, y: Tensor, options: dict[str, Any]) -> Tensor:
        return otloss.sinkhorn_loss(x, y, **{"eps": 0.5, "max_iters": 3, "tol": 1.0, **options})

    x, y = randn(rng, 4, 3, dtype=torch.float32), randn(rng, 5, 3, dtype=torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for run, kind in ((loss, ValueError), (compiled, RuntimeError)):
        with pytest.raises(kind, match=message):
            run(x, y, options)
    good = {**options, "eps": 0.5} if "eps" in options else {"a": torch.full((4,), 0.25)}
    assert bool(compiled(x, y, good).isfinite())


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: otloss.sinkhorn_divergence(x, y, 1.0),
        otloss.energy_distance,
        otloss.cost_matrix,
        lambda x, y: otloss.wasserstein_1d(x[:, 0], y[:, 0]),
    ],
)
def test_squares_that_underflow(call, rng):
    x, y = randn(rng, 4, 3, dtype=torch.float32), randn(rng, 5, 3, dtype=torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), call(x, y))
    with pytest.raises(RuntimeError, match=r"squares .* underflow .* points of x and y"):
        compiled(1e-25 * x, 1e-25 * y)


def test_a_warm_start_survives_a_step_of_nan(rng):
    """Traced code does not read its data, and so raises nothing."""
    x, y = randn(rng, 40, 3), randn(rng, 30, 3) + 0.5
    step = torch.compile(otloss.SinkhornDivergence(0.1, warm_start=True), backend="eager")
    values = [step(points, y) for points in (x, x * torch.nan, x, x)]
    assert bool(values[1].isnan())
    assert_close(torch.stack(values[2:]), values[0].expand(2), rtol=1e-2, atol=0)


def test_a_warm_start_outlives_compiled_inference(rng):
    x, y = randn(rng, 6, 2), randn(rng, 5, 2)
    step = torch.compile(otloss.SinkhornDivergence(0.5, warm_start=True), backend="eager")
    with torch.inference_mode():
        step(x, y)
    x.requires_grad_()
    step(x, y).backward()
    assert bool(x.grad.isfinite().all())


def test_the_last_status_of_compiled_code(rng):
    loss = torch.compile(
        lambda x, y: otloss.sinkhorn_divergence(x, y, 0.01, max_iters=2, tol=1e-9),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    loss(randn(rng, 30, 2), randn(rng, 25, 2))
    assert otloss.last_status().n_iters == 2
    assert otloss.last_status().converged is False


def test_results_inside_compiled_code(rng):
    """Numbers are 0-d tensors there; plans and maps are differentiable."""

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        r = otloss.solve_sample(x, y, 0.5)
        status = r.converged, r.n_iters, r.marginal_error, r.duality_gap
        return *(torch.as_tensor(v) for v in status), r.value, r.plan, r.barycentric_map()

    x, y = randn(rng, 6, 3).requires_grad_(), randn(rng, 5, 3)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    both = function(x, y), compiled(x, y)
    assert_close(*both, check_dtype=False)
    for pair in zip(*(told[4:] for told in both), strict=True):
        assert_close(*(torch.autograd.grad(t.square().sum(), x, retain_graph=True) for t in pair))


def test_asymmetric_cost(rng):
    """Which traced code cannot look for: it assumes nothing."""
    W = randn(rng, 3, 3)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return otloss.sinkhorn_divergence(x, y, 0.5, cost=lambda u, v: (u @ W @ v.mT).square())

    assert_compiles(
        loss, [randn(rng, 6, 3).requires_grad_(), randn(rng, 5, 3).requires_grad_()], "aot_eager"
    )


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_fake_tensors(loss):
    """Shapes of a step, as a planner of memory asks for, without data."""
    with FakeTensorMode():
        x, y = torch.empty(6, 3, requires_grad=True), torch.empty(5, 3, requires_grad=True)
        grads = torch.autograd.grad(loss(x, y), [x, y])
        assert [grad.shape for grad in grads] == [x.shape, y.shape]
        assert otloss.solve_sample(x, y, 0.5).n_iters.shape == ()
