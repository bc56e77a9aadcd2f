"""eps as a tensor: the values are those of a number, the derivative is that of differences."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from helpers import COSTS, METHODS, clouds, rand, randn, some_of, unequal
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import otloss

MODES = {
    "regularized": {},
    "transport": {"objective": "transport"},
    "unrolled": {"n_iters": 4},
    "unrolled transport": {"n_iters": 4, "objective": "transport"},
    "envelope": {"backward": "envelope"},
    "soft": {"unbalanced": 0.7},
    "one side": {"unbalanced": (None, 0.7)},
    "soft, n_iters": {"unbalanced": 0.7, "n_iters": 200, "backward": "envelope"},
}
PRECISE = {"tol": 1e-10, "max_iters": 20_000}


def double(*values: float, grad: bool = True) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


@some_of(
    "cost, method, mode, debiased, batch",
    COSTS, METHODS, [*MODES], [True, False], [None, 2],
    whole=4,
)  # fmt: skip
def test_derivative(cost, method, mode, debiased, batch, rng):
    if cost == "cosine" and method == "streamed":
        pytest.skip("refused, see below")
    c = clouds(rng, 6, 5, 3, weights="random", batch=batch)
    c = unequal(c, 0.7, MODES[mode].get("unbalanced"))
    options = {**PRECISE, "cost": cost, "method": method, **MODES[mode]}
    each = 0.3 + rand(rng, batch or 1)
    for eps in (each[0], each) if batch else (each[0],):
        eps = eps.clone().requires_grad_()
        assert gradcheck(lambda e: c.loss(e, debiased=debiased, **options), (eps,), atol=1e-6)


@pytest.mark.parametrize("method", ["dense", "reference"])
@pytest.mark.parametrize("mode", ["regularized", "transport", "unrolled"])
def test_of_a_result(mode, method, rng):
    """Of potentials, plan and what follows from it; of a cost matrix with forbidden pairs too."""
    C, allowed = rand(rng, 2, 4, 4), torch.ones(4, 4, dtype=torch.bool)
    allowed[0, 2] = False
    C = torch.where(allowed, C, torch.inf) if mode == "regularized" else C

    def outputs(eps):
        r = otloss.solve(C, eps, method=method, **PRECISE, **MODES[mode])
        return r.value, *r.potentials, r.plan, r.value_linear, r.marginals[0]

    assert gradcheck(outputs, (double(0.2, 0.5),), atol=1e-6)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("mode", ["regularized", "transport", "unrolled"])
def test_second_derivatives(mode, cost, rng):
    c = clouds(rng, 4, 3, 2).require_grad()

    def loss(x, eps):
        return otloss.sinkhorn_divergence(x, c.y, eps, cost=cost, **PRECISE, **MODES[mode])

    assert gradgradcheck(loss, (c.x, double(0.5)[0]), atol=1e-5)


@pytest.mark.parametrize("totals", [1.0, 3.0])
def test_is_the_relative_entropy(totals, rng):
    """dOT/deps = KL(P | a b) of a balanced problem at totals of 1; with mass terms otherwise."""
    c = clouds(rng, 7, 6, 2, weights="random")
    a, b, eps = totals * c.a, totals * c.b, double(0.3)[0]
    result = otloss.solve_sample(c.x, c.y, eps, a=a, b=b, **PRECISE)
    (grad,) = torch.autograd.grad(result.value, eps)
    P, product = result.plan.detach(), a[:, None] * b
    assert_close(grad, (P * (P / product).log()).sum())


@pytest.mark.parametrize("method", METHODS)
def test_values_and_other_gradients_are_those_of_numbers(method, rng):
    c = clouds(rng, 6, 5, 2, weights="padded", batch=2).require_grad()
    eps = torch.tensor([0.2, 0.7], dtype=torch.float64)
    for given in (eps, eps.clone().requires_grad_()):
        got = c.loss(given, method=method)
        grads = c.grads(got)
        for k in range(2):
            one = c.item(k).require_grad()
            expected = one.loss(float(eps[k]), method=method)
            assert_close(got[k], expected)
            for grad, single in zip(grads, one.grads(expected), strict=True):
                assert_close(grad[k], single)


def test_far_from_the_origin(rng):
    """In float32: sums of points over their distance from the origin would lose the digits."""
    c = clouds(rng, 60, 50, 3, dtype=torch.float32)

    def derivative(c):
        eps = double(0.5)[0]
        return torch.autograd.grad(c.loss(eps, tol=1e-5), eps)[0]

    far = c.each(lambda t: None if t is None else t + 100)
    assert_close(derivative(far), derivative(far.double()), rtol=2e-3, atol=0)


def test_padding_may_be_anything(rng):
    c = clouds(rng, 8, 7, 2, weights="padded")
    eps, bad = double(0.5)[0], torch.where(c.a[:, None] > 0, c.x, torch.nan)
    losses = [otloss.sinkhorn_divergence(x, c.y, eps, a=c.a, b=c.b) for x in (c.x, bad)]
    assert_close(*losses)
    assert_close(*(torch.autograd.grad(loss, eps)[0] for loss in losses))


def test_of_a_function(rng):
    """A callable cost; its parameters and eps together."""
    x, y = randn(rng, 5, 2), randn(rng, 4, 2)

    def loss(scale, eps):
        def cost(x, y):
            return scale * (x.unsqueeze(-2) - y.unsqueeze(-3)).abs().sum(-1)

        return otloss.sinkhorn_divergence(x, y, eps, cost=cost, **PRECISE)

    assert gradcheck(loss, (double(1.5)[0], double(0.4)[0]), atol=1e-6)


def test_modules_learn_it(rng):
    x, y = randn(rng, 6, 2), randn(rng, 5, 2)
    loss = otloss.SinkhornDivergence(nn.Parameter(torch.tensor(0.5)))
    loss(x, y).backward()
    (eps,) = loss.parameters()
    assert float(eps.grad) != 0
    with torch.no_grad():
        eps.mul_(2)
    assert_close(copy.deepcopy(loss)(x, y), otloss.sinkhorn_divergence(x, y, 1.0))
    assert [*otloss.SinkhornLoss(torch.tensor(0.5)).state_dict()] == ["eps"]
    with torch.no_grad():
        eps.neg_()
    with pytest.raises(ValueError, match=r"eps must be finite and > 0, got -1"):
        loss(x, y)


@pytest.mark.parametrize("cost", COSTS)
def test_that_is_not_read(cost, rng, monkeypatch):
    """As on a GPU: the problem is scaled, and its solution scaled back."""
    c = clouds(rng, 6, 5, 2, weights="random", batch=2)
    eps = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)

    def outputs():
        r = c.solve(eps, cost=cost, **PRECISE)
        loss = c.loss(eps, cost=cost, **PRECISE)
        found = loss, r.value, *r.potentials, r.plan, r.marginal_error
        return found, torch.autograd.grad(loss.sum() + r.plan.square().sum(), eps)

    expected = outputs()
    monkeypatch.setattr(otloss.eps, "_is_read", lambda eps, like: False)
    assert_close(outputs(), expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_compiled(shape, rng):
    """No graph for each value."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    x, y = randn(rng, 2, 5, 2), randn(rng, 2, 4, 2)

    def loss(x, y, eps):
        return otloss.sinkhorn_divergence(x, y, eps, tol=1e-9).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for value in (1.0, 0.8, 0.6, 0.3):
        eps = torch.full(shape, value, dtype=torch.float64, requires_grad=True)
        got, expected = compiled(x, y, eps), loss(x, y, eps)
        assert_close(got, expected)
        assert_close(*(torch.autograd.grad(v, eps) for v in (got, expected)))
    assert counter.frame_count <= 2
    with pytest.raises(RuntimeError, match="eps must be finite and > 0"):
        compiled(x, y, torch.full(shape, -1.0, dtype=torch.float64, requires_grad=True))


X, Y = torch.rand(4, 2), torch.rand(3, 2)


@pytest.mark.parametrize(
    ("eps", "message"),
    [
        (torch.tensor(0.0), r"eps must be finite and > 0, got 0.0"),
        (torch.tensor(float("nan")), r"eps must be finite and > 0, got nan"),
        (torch.tensor([[0.1]]), r"eps must have shape \(\) or \(B,\), got"),
        (torch.tensor([0.1, 0.2]), r"eps must have shape \(\) here, got"),
        (torch.tensor(1e-9), r"eps=1e-09 is below what torch.float32 can resolve"),
    ],
    ids=["zero", "nan", "matrix", "no batch", "resolution"],
)
def test_errors(eps, message):
    with pytest.raises(ValueError, match=message):
        otloss.sinkhorn_divergence(X, Y, eps)


def test_errors_of_a_batch():
    x, y = X.expand(2, 4, 2), Y.expand(2, 3, 2)
    with pytest.raises(ValueError, match=r"eps must have shape \(\) or \(2,\) here"):
        otloss.sinkhorn_loss(x, y, torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match=r"eps=1e-09 is below .* up to"):
        otloss.sinkhorn_loss(x, y, torch.tensor([0.1, 1e-9]))


def test_changed_in_place():
    eps = torch.tensor(0.5, dtype=torch.float64)
    result = otloss.solve_sample(X.double(), Y.double(), eps)
    eps.mul_(2)
    with pytest.raises(RuntimeError, match="eps"):
        _ = result.plan


@pytest.mark.parametrize(
    "call",
    [
        lambda e: otloss.sinkhorn_loss(X, Y, e, unbalanced=1.0, objective="transport"),
        lambda e: otloss.sinkhorn_loss(X, Y, e, unbalanced=1.0, n_iters=3),
        lambda e: otloss.solve_sample(X, Y, e, unbalanced=1.0).plan.square().sum().backward(),
        lambda e: otloss.solve_sample(X, Y, e, n_iters=3, init=(X[:, 0], Y[:, 0])),
        lambda e: otloss.sinkhorn_loss(X, Y, e, cost="cosine", method="streamed"),
    ],
    ids=["transport", "unrolled", "plan", "init", "cosine"],
)
def test_what_is_not_available_is_refused(call):
    with pytest.raises(NotImplementedError, match="eps"):
        call(torch.tensor(0.5, requires_grad=True))


def test_second_derivatives_of_soft_problems_are_refused():
    eps = torch.tensor(0.5, requires_grad=True)
    (grad,) = torch.autograd.grad(
        otloss.sinkhorn_loss(X, Y, eps, unbalanced=1.0), eps, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="detach eps"):
        grad.backward()
