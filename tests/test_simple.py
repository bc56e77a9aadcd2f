"""Distances by sorting and by kernels, against POT, linear programs and double loops."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import close, clouds, make_weights, pick, rand, randn, simplex
from torch.testing import assert_close

import otloss

ot = pytest.importorskip("ot")

WEIGHTS = ("uniform", "random", "wide", "padded")


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("p", [1, 1.5, 2, 3.0])
def test_on_the_line(p, weights, rng):
    """Against a linear program, with repeated numbers and totals other than 1."""
    for _ in range(5):
        c = clouds(rng, pick(rng, 1, 9), pick(rng, 1, 9), 1, weights=weights)
        x, y = (4 * c.x[:, 0]).round(), (4 * c.y[:, 0]).round()
        a, b = (3 * w for w in c.weights())
        got = otloss.wasserstein_1d(x, y, p, a=a, b=b)
        close(got, ot.emd2(a, b, (x[:, None] - y[None]).abs() ** p), 1e-10)


def test_on_the_line_gradients(rng):
    """Of points and weights, where the quantiles do not coincide; scaled together, weights share
    the value."""
    x, y, u, v = (randn(rng, 2, n).requires_grad_() for n in (5, 7, 5, 7))
    for p in (1.5, 2):
        assert torch.autograd.gradcheck(
            lambda x, y, u, v, p=p: otloss.wasserstein_1d(x, y, p, a=simplex(u), b=simplex(v)),
            (x, y, u, v),
        )
    a, b = (simplex(w).detach().requires_grad_() for w in (u, v))
    value = otloss.wasserstein_1d(x, y, a=a, b=b)
    for w, grad in zip((a, b), torch.autograd.grad(value.sum(), (a, b)), strict=True):
        assert_close((w * grad).sum(-1), value / 2)


def test_on_the_line_at_any_total(rng):
    """The value and its gradients grow with the totals, whose product underflows or overflows."""
    c = clouds(rng, 6, 5, 1, dtype=torch.float32, weights="random")
    x, y = c.x[:, 0], c.y[:, 0]
    value = otloss.wasserstein_1d(x, y, a=c.a, b=c.b)
    for total in (1e-25, 1e25):
        a, b = (total * w for w in c.weights())
        got = otloss.wasserstein_1d(x, y, a=a.requires_grad_(), b=b)
        close(got.detach() / total, value, 1e-5)
        (grad,) = torch.autograd.grad(got, a)
        close((a * grad).sum(), got / 2, 1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_slices_far_from_the_origin(weights, rng):
    """Projections have the rounding of the distances, not of the coordinates."""
    c = clouds(rng, 30, 20, 8, dtype=torch.float32, weights=weights)
    x, y = ((z + 1e6).requires_grad_() for z in (c.x, c.y))

    def value(x, y):
        drawn = torch.Generator().manual_seed(0)
        return otloss.sliced_wasserstein(x, y, a=c.a, b=c.b, generator=drawn)

    expected = value(x - 1e6, y - 1e6)
    close(value(x, y), expected, 1e-5)
    grads = (torch.autograd.grad(v, x)[0] for v in (value(x, y), expected))
    close(*grads, 1e-4)


def test_on_the_line_weights_of_zero(rng):
    """An empty bin has the derivative for more mass, padding has none."""
    x, y, b = randn(rng, 6), randn(rng, 7), make_weights(rng, (7,), "random")
    a = torch.tensor([0.0, *simplex(randn(rng, 5))], dtype=torch.float64)
    towards = torch.tensor([1.0, *-a[1:]], dtype=torch.float64)  # of total 0

    def value(a, x=x):
        return otloss.wasserstein_1d(x, y, a=a, b=b)

    (grad,) = torch.autograd.grad(value(a.requires_grad_()), a)
    step = 1e-7
    close(grad @ towards, (value(a + step * towards) - value(a)) / step, 1e-5, scale=1)
    x_padded = x.clone()
    x_padded[0] = math.nan
    (grad,) = torch.autograd.grad(value(a, x_padded), a)
    assert grad[0] == 0
    assert_close(value(a, x_padded), value(a))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("p", [1, 2])
def test_sliced(p, weights, rng):
    """Against POT in the same directions, every problem of a batch."""
    c = clouds(rng, 12, 9, 3, weights=weights, batch=2)
    got = otloss.sliced_wasserstein(
        c.x, c.y, 20, p, a=c.a, b=c.b, generator=torch.Generator().manual_seed(1)
    )
    same = torch.Generator().manual_seed(1)
    directions = torch.randn(3, 20, generator=same, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    for k in range(2):
        one = c.item(k)
        a, b = one.weights()  # without the points of weight 0, which are far away
        expected = ot.sliced_wasserstein_distance(
            one.x[a > 0], one.y[b > 0], a[a > 0], b[b > 0], p=p, projections=directions
        )
        close(got[k], expected**p, 1e-10)


def test_sliced_gradient(rng):
    c = clouds(rng, 6, 5, 3, weights="random").require_grad()

    def value(x, y):
        drawn = torch.Generator().manual_seed(0)
        return otloss.sliced_wasserstein(x, y, 10, a=c.a.detach(), b=c.b.detach(), generator=drawn)

    assert torch.autograd.gradcheck(value, (c.x, c.y))


def kernel_matrix(x, y, kernel, s):
    r = ((x[:, None] - y[None]) ** 2).sum(-1)
    if kernel == "energy":
        return -r.sqrt()
    return (-r / (2 * s**2)).exp() if kernel == "gaussian" else (-r.sqrt() / s).exp()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kernel", ["gaussian", "laplacian", "energy"])
def test_mmd(kernel, weights, rng):
    s = None if kernel == "energy" else 0.8
    c = clouds(rng, 8, 6, 3, weights=weights)
    a, b = c.weights()
    if kernel != "energy":
        b = 1.7 * b  # totals may differ
    expected = sum(
        sign * u @ kernel_matrix(p, q, kernel, s) @ v
        for sign, p, q, u, v in ((1, c.x, c.x, a, a), (1, c.y, c.y, b, b), (-2, c.x, c.y, a, b))
    )
    close(otloss.mmd(c.x, c.y, kernel, s, a=a, b=b), expected, 1e-10)
    batch = otloss.mmd(*(t.expand(2, *t.shape) for t in (c.x, c.y)), kernel, s)
    assert_close(batch, otloss.mmd(c.x, c.y, kernel, s).expand(2))


@pytest.mark.parametrize("kernel", ["gaussian", "laplacian", "energy"])
def test_mmd_gradients(kernel, rng):
    x, y = randn(rng, 5, 2).requires_grad_(), randn(rng, 4, 2).requires_grad_()
    a, b = (rand(rng, n).requires_grad_() for n in (5, 4))
    s = None if kernel == "energy" else 0.8

    def value(x, y, a, b):
        return otloss.mmd(x, y, kernel, s, a=a / a.sum(), b=b / b.sum())

    assert torch.autograd.gradcheck(value, (x, y, a, b))
    assert torch.autograd.gradgradcheck(value, (x, y, a, b))


def test_mmd_of_a_large_bandwidth(rng):
    """In float32 the squared distance of the means over s^2, not the rounding of 1 - 1."""
    x, y = randn(rng, 30, 2, dtype=torch.float32), randn(rng, 30, 2, dtype=torch.float32) + 1
    close(otloss.mmd(x, y, bandwidth=1e5), (x.mean(0) - y.mean(0)).square().sum() / 1e10, 1e-3)


def test_half_precision_is_computed_in_float32(rng):
    x, y = (randn(rng, 50, 3).bfloat16() for _ in range(2))
    for function in (otloss.wasserstein_1d, otloss.sliced_wasserstein, otloss.mmd):
        p, q = (t[:, 0] if function is otloss.wasserstein_1d else t for t in (x, y))
        more = {"bandwidth": 1.0} if function is otloss.mmd else {}
        torch.manual_seed(0)
        got = function(p, q, **more)
        torch.manual_seed(0)
        assert_close(got, function(p.float(), q.float(), **more), rtol=0, atol=0)


X, Y = torch.linspace(0, 1, 4), torch.linspace(0, 1, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: otloss.wasserstein_1d(X, Y[:, None]), ValueError, r"both be \(n,\) and \(m,\)"),
        (lambda: otloss.wasserstein_1d(X[0], Y), ValueError, r"x must have shape \(n,\)"),
        (lambda: otloss.wasserstein_1d(X, Y, 0.5), ValueError, "p must be at least 1"),
        (lambda: otloss.wasserstein_1d(X, Y, a=Y), ValueError, r"a must have shape \(4,\)"),
        (lambda: otloss.wasserstein_1d(X, Y, a=X * 7), ValueError, "same total mass"),
        (lambda: otloss.wasserstein_1d(X * math.nan, Y), ValueError, "x must be finite"),
        (lambda: otloss.wasserstein_1d([1.0], Y), TypeError, "x must be a torch.Tensor"),
        (lambda: otloss.sliced_wasserstein(X, Y), ValueError, r"x must have shape \(n, d\)"),
        (lambda: otloss.sliced_wasserstein(X[None], X[None], 0), ValueError, "n_projections"),
        (lambda: otloss.mmd(X[None], X[None]), ValueError, "bandwidth must be given"),
        (lambda: otloss.mmd(X[None], X[None], "energy", 1.0), ValueError, "bandwidth must be None"),
        (lambda: otloss.mmd(X[None], X[None], "rbf", 1.0), ValueError, "kernel must be one of"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("function", [
    lambda x, y: otloss.wasserstein_1d(x.mT, y.mT),
    lambda x, y: otloss.sliced_wasserstein(x, y, generator=None),
    lambda x, y: otloss.mmd(x, y, bandwidth=1.0),
], ids=["line", "sliced", "mmd"])  # fmt: skip
def test_compiles(function, rng):
    torch.compiler.reset()
    x, y = randn(rng, 6, 3).requires_grad_(), randn(rng, 5, 3).requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    got = compiled(x, y)
    torch.manual_seed(0)
    expected = function(x, y)
    assert_close(got, expected)
    assert_close(*(torch.autograd.grad(v.sum(), (x, y)) for v in (got, expected)))
