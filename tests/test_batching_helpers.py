"""Clouds of several sizes, and one for many, brought into one batch."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS
from helpers import METHODS, Clouds, clouds, rand, randn, simplex, some_of
from torch.testing import assert_close

import otloss

SIZES = (3, 1, 6)


def test_pad(rng):
    """The losses of a list and their gradients, from one call."""
    xs = [randn(rng, n, 2).requires_grad_() for n in SIZES]
    ys = [randn(rng, n, 2) for n in reversed(SIZES)]
    (x, a), (y, b) = otloss.pad(xs), otloss.pad(ys)
    assert x.shape == (3, 6, 2)
    got = otloss.sinkhorn_divergence(x, y, 0.5, a=a, b=b, tol=1e-9)
    one_by_one = [
        otloss.sinkhorn_divergence(*pair, 0.5, tol=1e-9) for pair in zip(xs, ys, strict=True)
    ]
    assert_close(got, torch.stack(one_by_one))
    assert_close(torch.autograd.grad(got.sum(), xs), torch.autograd.grad(sum(one_by_one), xs))


def test_pad_dtypes(rng):
    x, a = otloss.pad([randn(rng, 2, 3, dtype=t) for t in (torch.float16, torch.float32)])
    assert x.dtype == a.dtype == torch.float32
    _, a = otloss.pad([randn(rng, 2, 3, dtype=torch.bfloat16)])
    assert a.dtype == torch.float32


def test_pad_batch_vector(rng):
    """In any order of the points."""
    clouds = [randn(rng, n, 2) for n in SIZES]
    batch = torch.arange(3).repeat_interleave(torch.tensor(SIZES))
    expected = otloss.pad(clouds)
    assert_close(otloss.pad_batch_vector(torch.cat(clouds), batch), expected)
    mixed = torch.tensor([9, 3, 4, 0, 5, 1, 6, 7, 2, 8])
    x, a = otloss.pad_batch_vector(torch.cat(clouds)[mixed], batch[mixed])
    for k in range(3):
        kept = [i for i in mixed.tolist() if batch[i] == k]
        assert_close(x[k, a[k] > 0], torch.cat(clouds)[kept])
    assert_close(a, expected[1])


X = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: otloss.pad([]), ValueError, "at least one cloud"),
        (lambda: otloss.pad([X, X[:0]]), ValueError, r"clouds\[1\] must not be empty"),
        (lambda: otloss.pad([X, X[:, :1]]), ValueError, r"clouds\[0\] and clouds\[1\].*dimension"),
        (lambda: otloss.pad([X[None]]), ValueError, r"clouds\[0\] must have shape \(n, d\)"),
        (lambda: otloss.pad([X.long()]), TypeError, r"clouds\[0\] must be a floating-point"),
        (lambda: otloss.pad_batch_vector(X, [0]), TypeError, "batch must be a tensor of int64"),
        (lambda: otloss.pad_batch_vector(X, torch.tensor([0])), ValueError, r"shape \(4,\)"),
        (
            lambda: otloss.pad_batch_vector(X, torch.tensor([0, 0, 2, 2])),
            ValueError,
            "each number from 0 to B - 1, got 2 from 0 to 2",
        ),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", ["uniform", "random"])
def test_one_cloud_for_many(method, weights, rng):
    """As if it were repeated, on either side and for weights alone."""
    c = clouds(rng, 5, 4, 2, weights=weights, batch=3)
    one = Clouds(c.x[:1], c.y, None if c.a is None else c.a[:1], c.b)
    spread = Clouds(
        c.x[:1].repeat(3, 1, 1), c.y, None if c.a is None else c.a[:1].repeat(3, 1), c.b
    )
    supports = Clouds(c.x[:1], c.y[:1], c.a, c.b)
    repeated = Clouds(c.x[:1].repeat(3, 1, 1), c.y[:1].repeat(3, 1, 1), c.a, c.b)
    cases = [(one, spread), (one.swapped(), spread.swapped())]
    cases += [(supports, repeated)] if weights == "random" else []
    for few, many in cases:
        loss, expected = (p.require_grad().loss(0.5, method=method) for p in (few, many))
        assert_close(loss, expected)
        for got, full in zip(few.grads(loss), many.grads(expected), strict=True):
            assert_close(got, full.sum(0, keepdim=True) if len(got) == 1 else full)
    assert_close(one.energy(), spread.energy())


MODES = [{}, {"objective": "transport"}, {"n_iters": 3}, {"unbalanced": 0.5}]


@some_of(
    "backend, mode, shape, zeros, forbidden",
    BACKENDS, MODES, [(3, 4), (1, 4)], [True, False], [True, False],
    whole=2,
)  # fmt: skip
def test_one_matrix_for_many_weights(backend, mode, shape, zeros, forbidden, rng):
    """Values, plans and potentials; their gradients, that of the matrix summed over the problems,
    and second derivatives."""
    C, a, b = rand(rng, 5, 4), simplex(rand(rng, 3, 5)), simplex(rand(rng, *shape))
    if zeros:  # a row of the matrix counts in no problem, others in some
        a[0, 1] = a[:, 2] = 0
        a, C[2] = a / a.sum(-1, True), torch.nan
    if forbidden and "n_iters" not in mode:
        C[4, 3] = torch.inf
    C, a, b = (t.to(backend.device).requires_grad_() for t in (C, a, b))
    options = {"tol": 1e-10, "method": backend.method, **mode}

    def found(results):
        value = torch.cat([r.value.reshape(-1) for r in results])
        plan = torch.cat([r.plan.reshape(-1, 5, 4) for r in results])
        f = torch.cat([r.potentials[0].reshape(-1, 5) for r in results])
        total = value.square().sum() + (f * torch.arange(5).to(f)).sum()
        grads = torch.autograd.grad(total, (C, a, b), create_graph=True)
        again = [] if forbidden or zeros else torch.autograd.grad(grads[0].square().sum(), (C, a))
        return [value, plan, f, *grads, *again]

    together = found([otloss.solve(C, 0.3, a=a, b=b, **options)])
    each = [otloss.solve(C, 0.3, a=a[k], b=b.expand(3, 4)[k], **options) for k in range(3)]
    assert_close(together, found(each), rtol=1e-6, atol=1e-8)
