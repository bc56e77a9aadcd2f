"""torch.compile(fullgraph=True) of a loss and its backward. Few tests: compiling is slow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from helpers import METHODS, clouds, randn
from torch import Tensor

import otloss


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def assert_compiles(function: Callable[..., Tensor], inputs: list[Tensor], backend: str) -> None:
    """The same value and gradients as without."""
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected, got = function(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected)
    grads = torch.autograd.grad(got.sum(), inputs)
    truth = torch.autograd.grad(expected.sum(), inputs)
    for grad, true in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, true)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "divergence": lambda x, y, **k: otloss.sinkhorn_divergence(x, y, 0.5, **k),
    "loss": lambda x, y, **k: otloss.sinkhorn_loss(x, y, 0.5, cost="euclidean", **k),
    "energy": lambda x, y: otloss.energy_distance(x, y),
    "minibatch": lambda x, y: otloss.minibatch_energy_distance(x, x + 1, y, y + 1, 0.5),
    "callable": lambda x, y: otloss.sinkhorn_divergence(
        x, y, 0.5, cost=lambda x, y: (x[..., None, :] - y[..., None, :, :]).abs().sum(-1)
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
    torch.testing.assert_close(compiled(x, y), loss(x, y))


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
        torch.testing.assert_close(got, expected)
        if with_gradients:
            grads = [torch.autograd.grad(t, x)[0] for t in (got, expected)]
            torch.testing.assert_close(*grads)
    assert count == graphs


@pytest.mark.parametrize(
    "anneal",
    [
        lambda t: {"eps": t},
        lambda t: {"eps": 0.5, "tol": 1e-3 * t},
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
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(value, x)[0] for value in (got, expected)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_inductor(rng):
    """The whole way, code generation included, inside a training step."""
    network = torch.nn.Linear(3, 3).double()
    x, y = randn(rng, 6, 3), randn(rng, 5, 3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return otloss.sinkhorn_divergence(network(x), y, 0.5) * 2

    expected = torch.autograd.grad(step(x, y), tuple(network.parameters()))
    got = torch.autograd.grad(
        torch.compile(step, fullgraph=True)(x, y), tuple(network.parameters())
    )
    torch.testing.assert_close(got, expected)


def test_errors_are_still_raised(rng):
    """What can be said without data is said while tracing."""
    loss = torch.compile(lambda x, y: otloss.sinkhorn_loss(x, y, 0.5), backend="eager")
    with pytest.raises(ValueError, match="same dimension d, got 3 and 2"):
        loss(randn(rng, 4, 3), randn(rng, 4, 2))
