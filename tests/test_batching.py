"""A batch is its problems, one after the other; padding is removal."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from backends import BACKENDS, EMULATED
from helpers import (
    COSTS,
    DTYPES,
    METHODS,
    STRENGTHS,
    Clouds,
    clouds,
    pick,
    rand,
    randn,
    solved,
    some_of,
    unequal,
)
from torch import Tensor
from torch.testing import assert_close

import otloss
from otloss import ops, reference

TIGHT = {torch.float32: 1e-5, torch.float64: 1e-9}
CLOSE = {torch.float32: {"rtol": 1e-3, "atol": 1e-4}, torch.float64: {"rtol": 1e-7, "atol": 1e-8}}


def value_and_gradients(c: Clouds, **options: object) -> tuple[Tensor, list[Tensor]]:
    loss = c.require_grad().loss(1.0, **options)
    return loss, list(c.grads(loss))


@some_of(
    "backend, dtype, cost, weights", BACKENDS, DTYPES, COSTS, ["uniform", "random", "padded"],
    whole=3,
)  # fmt: skip
def test_batch_is_a_loop(backend, dtype, cost, weights, rng):
    n, m, batch = pick(rng, 1, 9), pick(rng, 1, 9), pick(rng, 1, 5)
    c = clouds(rng, n, m, 3, weights=weights, batch=batch, dtype=dtype).to(backend.device)
    options = {"cost": cost, "tol": TIGHT[dtype], "method": backend.method}
    loss, grads = value_and_gradients(c, **options)
    assert loss.shape == c.x.shape[:1]
    for k in range(len(c.x)):
        one, expected = value_and_gradients(c.item(k), **options)
        assert_close([loss[k], *(grad[k] for grad in grads)], [one, *expected], **CLOSE[dtype])


@some_of("backend, strength", BACKENDS, [None, *STRENGTHS])
def test_ragged_batch(backend, strength, rng):
    """Clouds of several sizes in one call, filled up with points of weight 0, which are not there,
    in the mass term neither."""
    sizes = [(3, 6, 2.0), (5, 2, 0.1), (1, 1, 30.0)]
    pieces = [
        unequal(clouds(rng, n, m, 2, weights="random"), ratio, strength) for n, m, ratio in sizes
    ]
    x, y = torch.full((3, 5, 2), torch.nan).double(), torch.full((3, 6, 2), torch.inf).double()
    a, b = torch.zeros(3, 5).double(), torch.zeros(3, 6).double()
    for k, ((n, m, _), c) in enumerate(zip(sizes, pieces, strict=True)):
        x[k, :n], y[k, :m], a[k, :n], b[k, :m] = c.x, c.y, c.a, c.b
    options = {"unbalanced": strength, "tol": 1e-10, "method": backend.method}
    loss, grads = value_and_gradients(Clouds(x, y, a, b).to(backend.device), **options)
    for k, ((n, m, _), c) in enumerate(zip(sizes, pieces, strict=True)):
        one, expected = value_and_gradients(c.to(backend.device), **options)
        assert_close(loss[k], one, rtol=1e-8, atol=1e-9)
        for grad, truth, size in zip(grads, expected, (n, m, n, m), strict=True):
            assert_close(grad[k, :size], truth, rtol=1e-6, atol=1e-8)
            assert not grad[k, size:].any()


@pytest.mark.parametrize("objective", ["regularized", "transport"])
def test_other_losses_of_a_batch(objective, rng):
    x1, x2, y1, y2 = (randn(rng, 3, n, 4) for n in (5, 4, 6, 5))
    options = {"tol": 1e-10, "objective": objective}
    med = otloss.minibatch_energy_distance(x1, x2, y1, y2, 0.2, **options)
    plain = otloss.sinkhorn_loss(x1, y1, 1.0, **options)
    energy = otloss.energy_distance(x1, y1)
    costs = otloss.cost_matrix(x1, y1, "euclidean")
    for k in range(3):
        one = otloss.minibatch_energy_distance(x1[k], x2[k], y1[k], y2[k], 0.2, **options)
        assert_close(med[k], one, rtol=1e-7, atol=1e-9)
        assert_close(plain[k], otloss.sinkhorn_loss(x1[k], y1[k], 1.0, **options))
        assert_close(energy[k], otloss.energy_distance(x1[k], y1[k]))
        assert_close(costs[k], otloss.cost_matrix(x1[k], y1[k], "euclidean"))


@pytest.mark.parametrize("method", METHODS)
def test_results_of_a_batch(method, rng):
    c = clouds(rng, 6, 5, 2, weights="random", batch=3)
    options = {"tol": 1e-10, "method": method}
    batch, v, w = c.solve(0.5, **options), randn(rng, 3, 5), randn(rng, 3, 5, 2)
    assert batch.converged.dtype == torch.bool
    assert batch.n_iters.dtype == torch.int64

    def told(r: otloss.OTResult, v: Tensor, w: Tensor, y: Tensor) -> list[Tensor]:
        tensors = [r.value, r.value_linear, r.plan, *r.marginals, r.apply(v), r.apply(w)]
        # potentials are defined up to a constant
        return [*tensors, r.barycentric_map(), r.extend(y).diff()]

    for k in range(3):
        one = told(c.item(k).solve(0.5, **options), v[k], w[k], c.y[k])
        assert_close([t[k] for t in told(batch, v, w, c.y)], one, rtol=1e-7, atol=1e-8)
        assert bool(batch.converged[k])
        assert batch.marginal_error[k] <= 2e-10


def padded(rng: torch.Generator, c: Clouds, garbage: float, extra: tuple[int, int]) -> Clouds:
    """The same problem with points of weight 0 mixed in, in random order."""

    def mix(x: Tensor, w: Tensor, count: int) -> tuple[Tensor, Tensor]:
        junk = garbage * randn(rng, count, x.shape[1], dtype=x.dtype)
        order = torch.randperm(len(x) + count, generator=rng)
        return torch.cat([x, junk])[order], torch.cat([w, w.new_zeros(count)])[order]

    x, a = mix(c.x, c.a, extra[0])
    y, b = mix(c.y, c.b, extra[1])
    return Clouds(x, y, a, b)


GARBAGE = [1.0, -1e6, 1e6, float("inf"), float("nan")]


@some_of("backend, dtype, cost, garbage", BACKENDS, DTYPES, COSTS, GARBAGE, whole=3)
def test_padding_is_removal(backend, dtype, cost, garbage, rng):
    """Points of weight 0 change neither value nor gradients, and get a gradient of exactly 0; their
    weights do where the points are not finite, and are empty bins otherwise."""
    c = clouds(rng, pick(rng, 1, 8), pick(rng, 1, 8), 3, weights="random", dtype=dtype)
    extra = pick(rng, 1, 5), pick(rng, 0, 5)
    full = padded(rng, c, garbage, extra).to(backend.device)
    c, options = c.to(backend.device), {"cost": cost, "tol": TIGHT[dtype]}
    options["method"] = backend.method
    expected, truth = value_and_gradients(c, **options)
    loss, grads = value_and_gradients(full, **options)
    assert_close(loss, expected, **CLOSE[dtype])
    for grad, t, w in zip(grads, truth, (full.a, full.b, full.a, full.b), strict=True):
        if grad.dim() == 2 or not math.isfinite(garbage):
            assert not bool(grad[w == 0].any())  # NaN counts as any
        kept = sorted(map(tuple, grad[w > 0].reshape(len(t), -1).tolist()))
        there = sorted(map(tuple, t.reshape(len(t), -1).tolist()))
        assert_close(torch.tensor(kept), torch.tensor(there), **CLOSE[dtype])


@pytest.mark.parametrize("method", ["dense", "reference"])
def test_padding_of_a_cost_matrix(method, rng):
    C = randn(rng, 4, 5)
    wide = torch.full((6, 6), float("inf"), dtype=torch.float64)
    wide[:4, :5] = C
    a = torch.tensor([0.25] * 4 + [0.0] * 2, dtype=torch.float64)
    b = torch.tensor([0.2] * 5 + [0.0], dtype=torch.float64)
    wide.requires_grad_()
    expected = otloss.solve(C, 0.3, tol=1e-9, method=method)
    result = otloss.solve(wide, 0.3, a=a, b=b, tol=1e-9, method=method)
    assert_close(result.value, expected.value)
    assert_close(result.plan[:4, :5], expected.plan)
    assert_close(result.value_linear, expected.value_linear)
    assert not bool(result.plan[4:].any())
    assert not bool(result.plan[:, 5:].any())
    (grad,) = torch.autograd.grad(result.value, wide)
    assert_close(grad, result.plan.detach())


def test_problems_of_a_batch_stop_on_their_own(rng):
    """An easy problem beside a hard one takes its own number of iterations."""
    easy, hard = randn(rng, 30, 2) * 0.1, randn(rng, 30, 2) * 2
    x, y = torch.stack([easy, hard]), torch.stack([easy.flip(0), hard.flip(0) + rand(rng, 30, 2)])
    result = otloss.solve_sample(x, y, 0.1, tol=1e-6, max_iters=10_000)
    assert result.n_iters[0] < result.n_iters[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otloss.ConvergenceWarning)
        short = otloss.solve_sample(x, y, 0.1, tol=1e-6, max_iters=int(result.n_iters[0]) + 2)
    assert short.converged.tolist() == [True, False]


@pytest.mark.parametrize("mode", ["envelope", "implicit", "unrolled"])
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("where", [ops, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("rho", [(math.inf, math.inf), (0.5, 2.0)], ids=str)
def test_an_eps_for_each_problem(rho, where, stored, mode, rng):
    """The operations: of a batch with three eps they are three calls."""
    eps = torch.tensor([0.05, 0.5, 4.0]).double()
    c = clouds(rng, 9, 7, 2, weights="padded", batch=3)
    points, weights, pairs = [c.x, c.y], [c.a, c.b], [0, 1, 0, 0, 1, 1]
    costs = where.cost(points, weights, pairs, 0) if stored else []
    of_loss, of_a, of_b = rand(rng, 3), rand(rng, 3, 9), rand(rng, 3, 7)
    objective, count = int(mode != "envelope"), 4 if mode == "unrolled" else -1

    def results(rows: slice, eps: Tensor) -> list[Tensor]:
        parts = [[t[rows] for t in each] for each in (weights, points, costs, (of_a, of_b))]
        problem = ops.problems(
            parts[0], pairs, [1.0, -0.5, -0.5], 1.0, points=parts[1], costs=parts[2], rho=rho,
            objective=objective,
        )._replace(eps=eps)  # fmt: skip
        options = {"tol": 1e-10, "max_iters": 5000, "n_iters": count, "trace": count > 0}
        loss, status, f, g, traces, *_ = solved(problem, module=where, **options)
        seeds = of_loss[rows], [parts[3][c] for c in pairs[::2]], [parts[3][c] for c in pairs[1::2]]
        want = [0, 1, 2] if stored else [], [0, 1], True
        if mode == "envelope":
            found = where.envelope_backward(seeds[0], *problem, f, g, *want)
        elif mode == "implicit":
            found = where.implicit_backward(*seeds, *problem, f, g, *want)[:4]
        else:
            found = where.unrolled_backward(*seeds, *problem, [], traces, *want)
        return [loss, status[0], *f, *g, *(grad for part in found for grad in part)]

    whole = results(slice(None), eps)
    each = [results(slice(k, k + 1), eps[k]) for k in range(3)]
    for found, expected in zip(whole, map(torch.cat, zip(*each, strict=True)), strict=True):
        assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_second_derivatives_in_threads(rng, threads):
    """Several systems at once, in several threads, MKL never ended."""

    def curvature(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        loss = otloss.sinkhorn_loss(x, y, 0.5, tol=1e-9, max_iters=10_000).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    x, y = randn(rng, 3, 200, 3), randn(rng, 3, 200, 3)
    torch.set_num_threads(2)
    each = torch.stack([curvature(*pair) for pair in zip(x, y, strict=True)])
    assert_close(curvature(x, y), each, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("backend", EMULATED[:1], indirect=True)
def test_a_gpu_takes_one_eps(backend, rng):
    c = clouds(rng, 5, 4, 2, weights="random", batch=3)
    problem = ops.problems([c.a, c.b], [0, 1], [1.0], 1.0, points=[c.x, c.y])
    solved(problem)
    with pytest.raises(RuntimeError, match="eps for each problem"):
        solved(problem._replace(eps=torch.ones(3).double()))
