"""Costs given as functions: asymmetric ones, padding, derivatives that do not exist, parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import STRENGTHS, Clouds, clouds, rand, randn, rho, some_of, unequal
from torch import Tensor, nn
from torch.testing import assert_close

import otloss
from otloss import _check

MODES = {
    "envelope": {"tol": 1e-9, "backward": "envelope"},
    "implicit": {"tol": 1e-9, "backward": "implicit"},
    "transport": {"tol": 1e-9, "objective": "transport"},
    "unrolled": {"n_iters": 4},
}
Cost = Callable[[Tensor, Tensor], Tensor]


def bent(W: Tensor) -> Cost:
    """|x - W y|^2, which is not symmetric."""
    return lambda x, y: (x.unsqueeze(-2) - (y @ W).unsqueeze(-3)).square().sum(-1)


def sqeuclidean(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)


def three_solves(c: Clouds, cost: Cost, strength: object, options: dict[str, object]) -> Tensor:
    """The divergence from its definition: each matrix by itself, none taken for symmetric."""
    rho_x, rho_y = (None if math.isinf(v) else v for v in rho(strength))
    a, b = c.a, c.b

    def term(C: Tensor, a: Tensor, b: Tensor, first: float | None, second: float | None) -> Tensor:
        """Mixed with the other strengths, so that the mass is counted in all three or in none."""
        pair = (first, second)
        solved = otloss.solve(C, 0.5, a=a, b=b, unbalanced=pair, **options)
        if strength is None or pair != (None, None) or options.get("objective") == "transport":
            return solved.value
        total, other = a.sum(-1), b.sum(-1)
        return solved.value - 0.5 * (total - total * other)

    loss = term(cost(c.x, c.y), a, b, rho_x, rho_y)
    loss = loss - term(cost(c.x, c.x), a, a, rho_x, rho_x) / 2
    loss = loss - term(cost(c.y, c.y), b, b, rho_y, rho_y) / 2
    if strength is not None and options.get("objective") != "transport":
        loss = loss + 0.25 * (a.sum(-1) - b.sum(-1)).square()
    return loss


@some_of("mode, strength, batch", [*MODES], [None, *STRENGTHS], [None, 2], whole=3)
def test_asymmetric_costs(mode, strength, batch, rng):
    c = clouds(rng, 8, 7, 2, weights="random", batch=batch)
    c = unequal(c, 0.7, strength).require_grad()
    options, cost = {**MODES[mode], "unbalanced": strength}, bent(randn(rng, 2, 2))
    got = c.loss(0.5, cost=cost, **options)
    truth = three_solves(c, cost, strength, MODES[mode])
    assert_close(got, truth, rtol=1e-6, atol=1e-8)
    losses = (got, truth)
    grads = [torch.autograd.grad(v.sum(), (c.x, c.y), retain_graph=True) for v in losses]
    assert_close(*grads, rtol=1e-4, atol=1e-6)
    if strength is None:  # those of weights are determined up to a constant
        grads = [torch.autograd.grad(v.sum(), (c.a, c.b), allow_unused=True) for v in losses]
        if mode != "unrolled":
            grads = [[t - t.mean(-1, keepdim=True) for t in pair] for pair in grads]
        assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("readable", [True, False])
def test_what_is_taken_for_symmetric(readable, rng, monkeypatch):
    """A matrix that is, to rounding; where data is not read, the caller's word only."""
    x, y, W = randn(rng, 200, 2), randn(rng, 150, 2), torch.eye(2).double()
    W[0, 1] = 1e-5
    together = []
    plain = otloss.combination.run
    monkeypatch.setattr(
        otloss.combination, "run", lambda *args, **k: together.append(0) or plain(*args, **k)
    )
    if not readable:
        monkeypatch.setattr(_check, "readable", lambda t: False)
    expected = otloss.sinkhorn_divergence(x, y, 0.5, tol=1e-9)
    cases = [
        (sqeuclidean, None, 1 if readable else 3),
        (sqeuclidean, True, 1),
        (sqeuclidean, False, 3),
        (bent(W), None, 3),
        (bent(W), True, 1),
    ]
    for cost, symmetric, runs in cases:
        together.clear()
        got = otloss.sinkhorn_divergence(x, y, 0.5, cost=cost, symmetric=symmetric, tol=1e-9)
        assert len(together) == runs
        assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_weights_of_one_side_have_gradients(rng):
    c = clouds(rng, 8, 7, 2, weights="random")
    a = c.a.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of an operation outside the graph
        loss = otloss.sinkhorn_divergence(c.x, c.y, 0.5, a=a, b=c.b, cost=bent(randn(rng, 2, 2)))
        loss.backward()
    assert a.grad.isfinite().all()


def test_one_entry_that_is_not_symmetric(rng):
    """Wherever it is."""
    x, y = rand(rng, 300, 2), rand(rng, 5, 2)

    def cost(u: Tensor, v: Tensor) -> Tensor:
        C = sqeuclidean(u, v)
        if len(u) == len(v) == 300:
            C[290, 3] = 5.0
        return C

    C = cost(x, x)
    own = otloss.solve(C, 0.1, tol=1e-9).value
    got = otloss.sinkhorn_divergence(x, y, 0.1, cost=cost, tol=1e-9)
    rest = otloss.solve(cost(x, y), 0.1, tol=1e-9).value
    rest = rest - otloss.solve(cost(y, y), 0.1, tol=1e-9).value / 2
    assert_close(got, rest - own / 2, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (lambda: otloss.SinkhornDivergence(0.5, symmetric=True), ValueError, "as a function"),
        (
            lambda: otloss.SinkhornDivergence(0.5, symmetric=1, cost=sqeuclidean),
            TypeError,
            "symmetric must be True, False or None, got 1",
        ),
        (lambda: otloss.SinkhornLoss(0.5, symmetric=True), TypeError, "takes no argument sym"),
        (
            lambda: otloss.MinibatchEnergyDistance(0.5, symmetric=True, cost=sqeuclidean),
            TypeError,
            "takes no argument symmetric",
        ),
    ],
)
def test_symmetric_is_checked(function, kind, message):
    with pytest.raises(kind, match=message):
        function()


# -------------------------------------------------------------------------------------- padding


def log_cost(x: Tensor, y: Tensor) -> Tensor:
    """NaN for padding of 0, and without a derivative where points agree but for the diagonal."""
    return (x.log().unsqueeze(-2) - y.log().unsqueeze(-3)).square().sum(-1)


FUNCTIONS = {
    "divergence": lambda c, **k: c.loss(0.3, **k),
    "loss": lambda c, **k: c.loss(0.3, debiased=False, **k),
    "energy": lambda c, **k: c.energy(**k),
    "result": lambda c, **k: c.solve(0.3, **k).plan.square().sum(),
}


@pytest.mark.parametrize("junk", [0.0, -1.0, math.nan, math.inf, 1e300])
@pytest.mark.parametrize(
    "cost", [sqeuclidean, log_cost, torch.cdist], ids=lambda cost: cost.__name__
)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_padding_reaches_nothing(function, cost, junk, rng):
    """Value and gradients are those without the padded points."""
    x, y = 0.5 + rand(rng, 5, 2), 0.5 + rand(rng, 4, 2)
    a, b = torch.full((5,), 0.2).double(), torch.full((4,), 0.25).double()
    bare = Clouds(x, y, a, b).require_grad()
    wide = [torch.cat([t, torch.full_like(t[:2], junk)]) for t in (x, y)]
    padded = Clouds(*wide, *(torch.cat([w, torch.zeros(2).double()]) for w in (a, b)))
    padded.require_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = [function(c, cost=cost) for c in (bare, padded)]
        grads = [
            torch.autograd.grad(v, (c.x, c.y)) for v, c in zip(values, (bare, padded), strict=True)
        ]
    assert_close(values[1], values[0])
    for grad, expected in zip(grads[1], grads[0], strict=True):
        assert_close(grad[:-2], expected)
        assert not bool(grad[-2:].any())


def test_padding_in_a_batch(rng):
    c = clouds(rng, 6, 5, 2, weights="padded", batch=3)
    expected = c.loss(0.3)
    c.x[c.a == 0], c.y[c.b == 0] = math.nan, math.nan
    got = c.require_grad().loss(0.3, cost=sqeuclidean)
    assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert all(bool(grad.isfinite().all()) for grad in c.grads(got))


# ---------------------------------------------------------------------------------- derivatives


def test_a_gradient_that_is_not_finite_is_said(rng):
    """|x - x| by hand: the square root of 0 has no derivative."""
    x, y = randn(rng, 6, 2).requires_grad_(), randn(rng, 5, 2)
    loss = otloss.sinkhorn_divergence(x, y, 0.5, cost=lambda u, v: sqeuclidean(u, v).sqrt())
    with pytest.warns(
        UserWarning, match=r"gradient of cost= is NaN.*12 of 12.*euclidean"
    ) as caught:
        (grad,) = torch.autograd.grad(loss, x)
    assert caught[0].filename == __file__
    assert bool(grad.isnan().all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        safe = otloss.sinkhorn_divergence(
            x, y, 0.5, cost=lambda u, v: (sqeuclidean(u, v) + 1e-12).sqrt(), tol=1e-9
        )
        (grad,) = torch.autograd.grad(safe, x)
    named = otloss.sinkhorn_divergence(x, y, 0.5, cost="euclidean", tol=1e-9)
    assert_close(grad, torch.autograd.grad(named, x)[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------- parameters


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(2, 3, dtype=torch.float64)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return sqeuclidean(self.map(x), self.map(y))


MODULES = {
    "divergence": lambda cost: otloss.SinkhornDivergence(0.5, cost=cost),
    "loss": lambda cost: otloss.SinkhornLoss(0.5, cost=cost),
    "minibatch": lambda cost: otloss.MinibatchEnergyDistance(0.5, cost=cost),
    "energy": lambda cost: otloss.EnergyDistance(cost=cost),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_cost_that_is_a_module_is_registered(make, rng):
    cost = Learned()
    module = make(cost)
    assert [id(p) for p in module.parameters()] == [id(p) for p in cost.parameters()]
    assert {"cost.map.weight", "cost.map.bias"} == set(module.state_dict())
    assert "(cost): Learned" in repr(module)
    points = [randn(rng, 5, 2) for _ in range(4 if "Minibatch" in type(module).__name__ else 2)]
    loss = module(*points)
    loss.backward()
    assert float(cost.map.weight.grad.abs().max()) > 0
    # what replaces the parameters, as functional_call does, reaches the loss
    zeros = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    assert float(torch.func.functional_call(module, zeros, tuple(points))) == pytest.approx(0)
