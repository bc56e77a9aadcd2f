"""Precision in and out: half precision, autocast, offsets, threads."""

from __future__ import annotations

import time

import oracle
import pytest
import torch
from helpers import COSTS, METHODS, Clouds, close, clouds, name, randn, some_of
from torch import Tensor
from torch.testing import assert_close

import otloss

HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=name)
def test_half_precision_is_float32_inside(dtype, weighted, method, rng):
    """The result is that of the same numbers in float32; gradients are in the input's dtype."""
    c = clouds(rng, 9, 7, 3)
    if weighted:  # multiples of 1/128 of total 1, which all dtypes hold; some may be 0
        draws = (torch.randint(0, n, (128,), generator=rng) for n in (9, 7))
        c.a, c.b = (
            torch.bincount(d, minlength=n) / 128 for d, n in zip(draws, (9, 7), strict=True)
        )
    half = c.to(dtype).require_grad()
    single = half.each(lambda t: t.detach().float()).require_grad()
    loss, expected = half.loss(1.0, method=method), single.loss(1.0, method=method)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    grads = half.grads(loss)
    assert {grad.dtype for grad in grads} == {dtype}
    # one rounding to the dtype; float16 is subnormal below 6e-5
    close(grads, single.grads(expected), 2 * torch.finfo(dtype).eps, floor=1e-3)


@pytest.mark.parametrize("dtype", HALVES, ids=name)
def test_half_precision_everywhere_else(dtype, rng):
    x, y = randn(rng, 6, 3).to(dtype), randn(rng, 5, 3).to(dtype)
    result = otloss.solve_sample(x, y, 1.0)
    tensors = [
        otloss.energy_distance(x, y),
        otloss.minibatch_energy_distance(x, x, y, y, 1.0),
        otloss.cost_matrix(x, y),
        otloss.sinkhorn_loss(x, y, 1.0, cost=lambda x, y: torch.cdist(x, y)),
        otloss.solve(torch.cdist(x.float(), y.float()).to(dtype), 1.0).value,
        result.value,
        result.plan,
        result.value_linear,
        result.barycentric_map(),
        result.extend(x),
        result.apply(y),
        *result.potentials,
        *result.marginals,
    ]
    for t in tensors:
        assert t.dtype == torch.float32
        assert bool(t.isfinite().all())


@pytest.mark.parametrize("dtype", HALVES, ids=name)
def test_totals_of_half_precision_weights(dtype, rng):
    """1/7 rounded to bfloat16 has a total of 1.004: equal to 1 as far as the dtype can tell."""
    x, y = randn(rng, 7, 3).to(dtype), randn(rng, 6, 3).to(dtype)
    a, b = torch.full((7,), 1 / 7).to(dtype), torch.full((6,), 1 / 6).to(dtype)
    result = otloss.solve_sample(x, y, 1.0, a=a, b=b, tol=1e-5)
    assert result.converged
    expected = otloss.solve_sample(x.float(), y.float(), 1.0, tol=1e-5)
    assert_close(result.value, expected.value, rtol=2e-2, atol=0)
    with pytest.raises(ValueError, match="same total mass"):
        otloss.solve_sample(x, y, 1.0, a=1.1 * a, b=b)


def test_half_precision_does_not_overflow():
    """|x|^2 = 9e8 is beyond float16; the cost is computed in float32."""
    x, y = torch.full((2, 5), 3e4).half(), torch.zeros(2, 5).half()
    assert otloss.sinkhorn_loss(x, y, 1e7).item() == pytest.approx(5 * 9e8, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_precision_is_kept(dtype, rng):
    c = clouds(rng, 6, 5, 3, weights="random", dtype=dtype).require_grad()
    result, losses = c.solve(1.0), [c.loss(1.0), c.energy()]
    tensors = [*losses, result.value, result.plan, *result.potentials, *c.grads(losses[0])]
    assert {t.dtype for t in (*tensors, otloss.cost_matrix(c.x, c.y))} == {dtype}


def test_the_default_dtype_does_not_matter(rng):
    c = clouds(rng, 6, 5, 3, dtype=torch.float32)
    expected = c.loss(1.0)
    try:
        torch.set_default_dtype(torch.float64)
        got = c.loss(1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("d", [3, 40])
def test_autocast_changes_nothing(d, cost, method, rng):
    """Matrix products stay in float32 inside otloss, whatever autocast says."""
    x, y = (randn(rng, n, d).float() / d**0.5 for n in (9, 7))
    x, v = x.requires_grad_(), randn(rng, 7, 2).float()

    def everything() -> list[Tensor]:
        result = otloss.solve_sample(x, y, 1.0, cost=cost, method=method)
        losses = [
            otloss.sinkhorn_divergence(x, y, 1.0, cost=cost, method=method),
            otloss.energy_distance(x, y, cost=cost, method=method),
            otloss.minibatch_energy_distance(x, x + 1, y, y + 1, 1.0, cost=cost, method=method),
            result.value,
        ]
        (grad,) = torch.autograd.grad(sum(losses), x, create_graph=True)
        drawn = torch.Generator().manual_seed(0)
        more = [result.plan, result.apply(v), result.barycentric_map(), result.extend(y)]
        more.append(otloss.sliced_wasserstein(x, y, generator=drawn))
        sums = [grad.square().sum(), *(t.square().sum() for t in more)]
        grads = [torch.autograd.grad(t, x, retain_graph=True)[0] for t in sums]
        return [*losses, grad, *more, *grads]

    expected = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = everything()
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_autocast_around_a_network(rng):
    """bfloat16 features of a network under autocast go in; float32 comes out."""
    network = torch.nn.Linear(4, 8)
    x = randn(rng, 6, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network(x)
        assert features.dtype == torch.bfloat16
        loss = otloss.sinkhorn_divergence(features, features.detach() + 1, 0.5)
    assert loss.dtype == torch.float32
    loss.backward()
    assert bool(network.weight.grad.isfinite().all())


def careful(x, y, a, b):
    """Potentials that differ by less than the allowed error wherever a solve stops."""
    return otloss.solve_sample(x, y, 1.0, a=a, b=b, tol=1e-5)


MIXED = {
    "divergence": lambda x, y, a, b: otloss.sinkhorn_divergence(x, y, 0.5, a=a, b=b),
    "callable": lambda x, y, a, b: otloss.sinkhorn_loss(x, y, 0.5, a=a, b=b, cost=torch.cdist),
    "energy": lambda x, y, a, b: otloss.energy_distance(x, y, a=a, b=b),
    "matrix": lambda x, y, a, b: otloss.solve(x, 0.5, a=a).value,
    "map": lambda *given: careful(*given).barycentric_map().sum(),
    "extend": lambda x, y, *weights: careful(x, y, *weights).extend(y.double() + 1).sum(),
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@some_of("of_x, of_y, of_weights, autocast", FLOATS, FLOATS, FLOATS, [False, True])
@pytest.mark.parametrize("function", MIXED)
def test_floats_of_different_precision(function, of_x, of_y, of_weights, autocast, rng):
    """Computed in the widest, under autocast in float32; gradients are in each input's own."""
    x, y = randn(rng, 8, 3).to(of_x), randn(rng, 4, 3).to(of_y)
    a, b = torch.full((8,), 0.125).to(of_weights), torch.full((4,), 0.25).to(of_y)
    given = [t.requires_grad_() for t in (x, y, a, b)]
    wide = [t.detach().double().requires_grad_() for t in given]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = MIXED[function](*given)
    used = {of_x, of_weights} if function == "matrix" else {of_x, of_y, of_weights}
    double = torch.float64 in used and not (autocast and len(used) > 1)
    assert got.dtype == (torch.float64 if double else torch.float32)
    expected = MIXED[function](*wide)
    assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)
    # a solve in float32 stops elsewhere: within tol of the same potentials
    grads = [
        torch.autograd.grad(v, t, allow_unused=True) for v, t in ((got, given), (expected, wide))
    ]
    for grad, t, true in zip(grads[0], given, grads[1], strict=True):
        assert (grad is None) == (true is None)
        if grad is not None:
            assert grad.dtype == t.dtype
            close(grad, true, 0.05, max(float(true.norm()), 0.1))


def test_integers_are_still_refused(rng):
    x = randn(rng, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for call in (otloss.energy_distance, lambda x, y: otloss.sinkhorn_loss(x, y, 0.5)):
            with pytest.raises(TypeError, match="y must be a floating-point tensor"):
                call(x, x.long())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d", [3, 64])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_clouds_far_from_the_origin(cost, d, method, rng):
    """|x|^2 + |y|^2 - 2 <x, y> would lose every digit of float32 at an offset of 1000."""
    # Multiples of 2^-8 below 2^14 are exact in float32, so the input itself loses nothing.
    x, y = ((256 * randn(rng, n, d)).round() / 256 for n in (12, 9))
    found = []
    for offset in (0.0, 1000.0):
        c = Clouds((x + offset).float(), (y + offset).float(), None, None).require_grad()
        loss = c.loss(float(d), cost=cost, method=method)
        found.append((loss, c.grads(loss)))
    (here, grads), (there, others) = found
    close(there, here, 1e-4, max(here.item(), 0.1))
    close(others, grads, 1e-3)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("method", METHODS)
def test_units_of_the_data_do_not_matter(method, scale, rng):
    """float32 is relative: S(s x, s y; s^2 eps) = s^2 S at any scale s."""
    x, y = randn(rng, 9, 3).float(), randn(rng, 8, 3).float()
    expected = otloss.sinkhorn_divergence(x, y, 0.5, tol=1e-5, method=method)
    got = otloss.sinkhorn_divergence(scale * x, scale * y, 0.5 * scale**2, tol=1e-5, method=method)
    assert_close(got / scale**2, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("total", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("method", METHODS)
def test_total_mass(method, total, rng):
    """OT is proportional to the mass: weights need not be probabilities."""
    c = clouds(rng, 9, 8, 3, weights="random")
    options = {"tol": 1e-9, "method": method}
    expected = c.loss(0.5, debiased=False, **options)
    close(expected, oracle.loss(c.x, c.y, 0.5, c.a, c.b, debiased=False).value, 1e-8)
    got = Clouds(c.x, c.y, total * c.a, total * c.b).solve(0.5, **options)
    # KL against a x b counts the mass: at P = total P*, eps KL gains -eps total log(total)
    shift = -0.5 * total * torch.tensor(total).double().log()
    assert_close(got.value, total * expected + shift, rtol=1e-7, atol=0)
    assert got.marginal_error <= 2e-9


MODES = {
    "envelope": {"tol": 1e-6},
    "implicit": {"tol": 1e-6, "objective": "transport"},
    "unrolled": {"n_iters": 5, "objective": "transport"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("method", ["dense", "streamed"])
def test_threads_change_nothing(method, batch, mode, rng, threads):
    """Results do not depend on their number beyond rounding, nor on chance."""
    c, runs = clouds(rng, 60, 50, 3, batch=4) if batch else clouds(rng, 701, 803, 3), []
    c.require_grad()
    for count in (1, 2, 5, 2):  # problems of a divergence: 3
        torch.set_num_threads(count)
        loss = c.loss(0.5, method=method, **MODES[mode])
        runs.append([loss.detach(), *c.grads(loss)])
    for run in runs[1:]:
        assert_close(run, runs[0], rtol=1e-9, atol=1e-12)
    assert all(map(torch.equal, runs[1], runs[3]))


@pytest.mark.parametrize("method", ["dense", "streamed"])
def test_one_thread_is_one_thread(method, rng, threads):
    """With one thread, the processor time cannot exceed the elapsed time."""
    torch.set_num_threads(1)
    c = clouds(rng, 1500, 1500, 3, dtype=torch.float32)
    wall, cpu = time.perf_counter(), time.process_time()
    c.loss(0.1, debiased=False, n_iters=60, method=method)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert cpu <= 1.1 * wall + 0.02
