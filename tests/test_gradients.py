"""Gradients against finite differences, and what the graph keeps and refuses."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from backends import BACKENDS
from helpers import COSTS, METHODS, close, clouds, make_weights, randn, simplex, some_of
from torch import Tensor
from torch.autograd import gradcheck

import otloss

# Solved until rounding, so that finite differences see the optimum and not the stopping test.
EXACT = {"tol": 1e-11, "max_iters": 20_000}
# Central differences of a smooth function in float64: a relative error of about 1e-9.
CHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-6}


@some_of("backend, cost, name", BACKENDS, COSTS, ["sinkhorn_divergence", "sinkhorn_loss"])
def test_losses(backend, cost, name, rng):
    inputs = randn(rng, 4, 3), randn(rng, 3, 3) + 0.3, randn(rng, 4), randn(rng, 3)
    inputs = [t.to(backend.device).requires_grad_() for t in inputs]
    options = {"cost": cost, "method": backend.method, **EXACT}

    def loss(x: Tensor, y: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return getattr(otloss, name)(x, y, 0.5, a=simplex(p), b=simplex(q), **options)

    assert gradcheck(loss, inputs, **CHECK)


@pytest.mark.parametrize("cost", COSTS)
def test_batched_losses(cost, rng):
    x, y = randn(rng, 2, 3, 2).requires_grad_(), randn(rng, 2, 4, 2).requires_grad_()
    p = randn(rng, 2, 3).requires_grad_()

    def loss(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
        b = torch.full((2, 4), 0.25, dtype=torch.float64)
        return otloss.sinkhorn_divergence(x, y, 0.5, a=simplex(p), b=b, cost=cost, **EXACT)

    assert gradcheck(loss, (x, y, p), **CHECK)


@pytest.mark.parametrize("method", ["dense", "reference"])
def test_solve_of_a_cost_matrix(method, rng):
    C, p, q = (randn(rng, *s).requires_grad_() for s in ((4, 5), (4,), (5,)))

    def value(C: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return otloss.solve(C, 0.3, a=simplex(p), b=simplex(q), method=method, **EXACT).value

    assert gradcheck(value, (C, p, q), **CHECK)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("shape", [(4, 3, 2), (3, 5, 20)], ids=str)
def test_cost_matrix(shape, cost, rng):
    n, m, d = shape
    x, y = randn(rng, n, d).requires_grad_(), randn(rng, m, d).requires_grad_()
    assert gradcheck(lambda x, y: otloss.cost_matrix(x, y, cost), (x, y), **CHECK)
    assert gradcheck(lambda x: otloss.cost_matrix(x, x, cost).triu(1), (x,), **CHECK)
    batch = randn(rng, 2, n, d).requires_grad_()
    assert gradcheck(lambda b: otloss.cost_matrix(b, b.flip(1) + 1, cost), (batch,), **CHECK)


@pytest.mark.parametrize("cost", COSTS)
def test_energy_distance(cost, rng):
    x, y, p = randn(rng, 4, 2), randn(rng, 3, 2), randn(rng, 4)
    b = make_weights(rng, (3,), "random")

    def loss(x: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return otloss.energy_distance(x, y, a=simplex(p), b=b, cost=cost)

    assert gradcheck(loss, tuple(t.requires_grad_() for t in (x, y, p)), **CHECK)


def test_minibatch_energy_distance_holds_plans_constant(rng):
    """The gradient of sum P_ij c(x_i, y_j) with the six plans as numbers."""
    clouds_ = [randn(rng, n, 3).requires_grad_() for n in (4, 5, 3, 4)]
    x1, x2, y1, y2 = clouds_
    loss = otloss.minibatch_energy_distance(*clouds_, 0.2, **EXACT)
    total = torch.zeros((), dtype=torch.float64)
    across = [(1, x, y) for x in (x1, x2) for y in (y1, y2)]
    for sign, u, v in (*across, (-2, x1, x2), (-2, y1, y2)):
        P = otloss.solve_sample(u, v, 0.2, cost="cosine", **EXACT).plan.detach()
        total = total + sign * (P * otloss.cost_matrix(u, v, "cosine")).sum()
    torch.testing.assert_close(loss, total, rtol=1e-8, atol=1e-10)
    got, expected = (torch.autograd.grad(t, clouds_) for t in (loss, total))
    for grad, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-6, atol=1e-9)


def test_the_incoming_gradient_scales_and_selects(rng):
    """A batch's losses enter a sum with any weights, 0 included."""
    c = clouds(rng, 5, 4, 2, batch=3)
    x = c.x.requires_grad_()
    loss = otloss.sinkhorn_divergence(x, c.y, 0.5)
    each = [torch.autograd.grad(loss[k], x, retain_graph=True)[0] for k in range(3)]
    factor = torch.tensor([2.0, 0.0, -3.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(loss, x, factor)
    torch.testing.assert_close(grad, sum(w * g for w, g in zip(factor, each, strict=True)))
    assert not bool(each[0][1].any())  # the problems of a batch do not touch


def test_x_is_y_collects_both_sides(rng):
    """One tensor in both roles: its gradient is the sum of what two copies get."""
    x = randn(rng, 6, 2).requires_grad_()
    left, right = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(otloss.sinkhorn_loss(x, x, 0.5, tol=1e-9), x)
    apart = torch.autograd.grad(otloss.sinkhorn_loss(left, right, 0.5, tol=1e-9), (left, right))
    torch.testing.assert_close(grad, apart[0] + apart[1], rtol=1e-6, atol=1e-9)


def test_only_what_is_asked_for(rng):
    c = clouds(rng, 5, 4, 2, weights="random")
    c.y.requires_grad_()
    loss = otloss.sinkhorn_divergence(c.x, c.y, 0.5, a=c.a, b=c.b)
    loss.backward()
    assert c.y.grad is not None
    assert c.x.grad is None
    assert c.a.grad is None


def test_no_graph_without_gradients(rng):
    c = clouds(rng, 5, 4, 2)
    assert not otloss.sinkhorn_divergence(c.x, c.y, 0.5).requires_grad
    c.require_grad()
    with torch.no_grad():
        loss = otloss.sinkhorn_divergence(c.x, c.y, 0.5)
        result = otloss.solve_sample(c.x, c.y, 0.5)
        energy = otloss.energy_distance(c.x, c.y)
    for t in (loss, energy, result.value, result.plan, *result.potentials):
        assert not t.requires_grad
        assert t.grad_fn is None
    with torch.inference_mode():
        assert otloss.sinkhorn_divergence(c.x, c.y, 0.5).is_inference()


def test_backward_twice_and_retained(rng):
    x, y = randn(rng, 5, 2).requires_grad_(), randn(rng, 4, 2)
    loss = otloss.sinkhorn_divergence(x, y, 0.5)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_changing_an_input_in_place_is_noticed(rng):
    x, y = randn(rng, 5, 2).requires_grad_(), randn(rng, 4, 2)
    loss = otloss.sinkhorn_divergence(x, y, 0.5)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weight_gradients_follow_the_convention(rng):
    """dOT/da = f and dOT/db = g with <a, f> = <b, g>, so neither side holds the constant."""
    c = clouds(rng, 6, 5, 2, weights="random").require_grad()
    result = otloss.solve_sample(c.x, c.y, 0.5, a=c.a, b=c.b, tol=1e-10)
    f, g = torch.autograd.grad(result.value, (c.a, c.b))
    torch.testing.assert_close((c.a * f).sum(), result.value / 2)
    torch.testing.assert_close((c.b * g).sum(), result.value / 2)
    mine, theirs = result.potentials
    torch.testing.assert_close((f - mine).diff(), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close((g - theirs).diff(), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cost", COSTS)
def test_second_derivatives_are_right_or_refused(cost, method, rng):
    """A Hessian-vector product agrees with differences of gradients, or it raises; the same for
    energy_distance and cost_matrix."""
    x, y, v = randn(rng, 4, 2).requires_grad_(), randn(rng, 3, 2), randn(rng, 4, 2)

    def losses(x: Tensor) -> list[Tensor]:
        divergence = otloss.sinkhorn_divergence(x, y, 0.5, cost=cost, method=method, **EXACT)
        energy = otloss.energy_distance(x, y, cost=cost, method=method)
        return [divergence, energy, otloss.cost_matrix(x, y, cost).square().sum()]

    def gradient(x: Tensor, which: int) -> Tensor:
        return torch.autograd.grad(losses(x)[which], x, create_graph=True)[0]

    for which in range(3):
        step = 1e-5
        ahead, behind = (
            gradient(x.detach().add(s * v).requires_grad_(), which) for s in (step, -step)
        )
        expected = (ahead - behind).detach() / (2 * step)
        try:
            (product,) = torch.autograd.grad((gradient(x, which) * v).sum(), x)
        except NotImplementedError as error:
            assert "second derivatives" in str(error)  # noqa: PT017
        else:
            close(product, expected, 1e-5)


MODES = {
    "implicit": {"backward": "implicit", **EXACT},
    "unrolled": {"backward": "unrolled", "n_iters": 4},
}
modes = pytest.mark.parametrize("mode", MODES)


def centred(index: int, grad: Tensor, mode: str) -> Tensor:
    """At the optimum weights keep their total: their gradient has a free constant."""
    return grad - grad.mean() if index >= 2 and mode == "implicit" else grad


@some_of(
    "backend, mode, objective, cost, debiased",
    BACKENDS, list(MODES), ["regularized", "transport"], COSTS, [True, False], whole=3,
)  # fmt: skip
def test_exact_gradients_of_both_objectives(backend, mode, objective, cost, debiased, rng):
    """Implicit: through the optimality conditions. Unrolled: through the iterations that ran."""
    c = clouds(rng, 5, 4, 2, weights="random").to(backend.device).require_grad()
    exact = c.double().require_grad()
    function = otloss.sinkhorn_divergence if debiased else otloss.sinkhorn_loss
    options = {"cost": cost, "objective": objective, "method": backend.method, **MODES[mode]}
    loss = function(c.x, c.y, 0.5, a=c.a, b=c.b, **options)
    options = {"cost_name": cost, "objective": objective, "debiased": debiased}
    options.update(backward="implicit", n_iters=MODES[mode].get("n_iters"))
    truth = oracle.loss(exact.x, exact.y, 0.5, exact.a, exact.b, **options)
    close(loss, truth.value, 1e-8, 1.0)
    got, expected = torch.autograd.grad(loss, c.inputs()), truth.grads(*exact.inputs())
    for index, (grad, true) in enumerate(zip(got, expected, strict=True)):
        grad, true = grad.cpu(), centred(index, true, mode)
        close(centred(index, grad, mode), true, 1e-6, max(float(true.norm()), 1e-2))


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_through_plans_and_potentials(dtype, mode, rng):
    """Any function of f, g and P: differences of potentials, the plan, what it does to vectors."""
    n, m, eps = 6, 5, 0.5
    c = clouds(rng, n, m, 1, weights="random")
    inputs = [t.to(dtype).requires_grad_() for t in (randn(rng, n, m).abs(), c.a, c.b)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    u, v, W = randn(rng, n), randn(rng, m), randn(rng, n, m)
    u, v = u - u.mean(), v - v.mean()  # blind to the constant of the potentials

    def readout(f: Tensor, g: Tensor, P: Tensor) -> Tensor:
        return (u.to(f) * f).sum() + (v.to(g) * g).sum() + (W.to(P) * P).sum()

    options = MODES[mode]
    if dtype == torch.float32 and mode == "implicit":
        options = {**options, "tol": 1e-6}
    result = otloss.solve(inputs[0], eps, a=inputs[1], b=inputs[2], **options)
    got = torch.autograd.grad(readout(*result.potentials, result.plan), inputs)
    if mode == "unrolled":
        f, g = oracle.iterate(*exact, eps, options["n_iters"])[-1]
    else:
        f, g = oracle.differentiable_potentials(*exact, eps)
    truth = torch.autograd.grad(readout(f, g, oracle.plan(exact[0], f, g, *exact[1:], eps)), exact)
    tol = 1e-6 if dtype == torch.float64 else 2e-3
    for index, (grad, true) in enumerate(zip(got, truth, strict=True)):
        index += 1  # C, a, b: C has no constant, the weights do
        close(centred(2 * (index > 1), grad, mode), centred(2 * (index > 1), true, mode), tol)


@modes
def test_padding_gets_no_gradient_in_any_mode(mode, rng):
    c = clouds(rng, 7, 6, 2, weights="padded")
    c.x[c.a == 0], c.y[c.b == 0] = math.nan, math.inf
    c.require_grad()
    loss = otloss.sinkhorn_divergence(
        c.x, c.y, 0.5, a=c.a, b=c.b, objective="transport", **MODES[mode]
    )
    grads = torch.autograd.grad(loss, c.inputs())
    for grad, w in zip(grads, (c.a, c.b, c.a, c.b), strict=True):
        assert not bool(grad[w == 0].any())
        assert bool(grad.isfinite().all())


def test_auto_is_exact(rng):
    """Without a word about `backward` every value comes with its true gradient."""
    x, y = randn(rng, 5, 2).requires_grad_(), randn(rng, 4, 2)
    for options in ({}, {"objective": "transport"}, {"n_iters": 3}):
        solver = options if "n_iters" in options else {**options, **EXACT}

        def loss(x: Tensor, solver: dict[str, object] = solver) -> Tensor:
            return otloss.sinkhorn_divergence(x, y, 0.5, **solver)

        assert gradcheck(loss, (x,), **CHECK)
