"""otloss.compat.geomloss beside the installed GeomLoss: values, shapes, errors; gradients against
the oracle, since GeomLoss's are up to 3% off with unequal weights and more with reach."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import close, clouds
from torch.testing import assert_close

from otloss.compat.geomloss import SamplesLoss

geomloss = pytest.importorskip("geomloss")


def original(**options):
    return geomloss.SamplesLoss(scaling=0.998, backend="tensorized", **options)


def measures(rng, *, batch=None):
    c = clouds(rng, 9, 7, 3, weights="random", batch=batch)
    return c.a, c.x, c.b, c.y


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach", [None, 0.7])
@pytest.mark.parametrize("p", [1, 2])
def test_sinkhorn(p, reach, debias, rng):
    options = {"p": p, "blur": 0.5, "reach": reach, "debias": debias}
    inputs = measures(rng, batch=2)
    expected = original(**options)(*inputs)
    close(SamplesLoss(**options, tol=1e-6)(*inputs), expected, 1e-3)
    one = tuple(t[0] for t in inputs)
    for backend in ("tensorized", "online", "multiscale"):
        loss = SamplesLoss(**options, backend=backend, tol=1e-6)
        close(loss(*one), expected[0], 1e-3)


@pytest.mark.parametrize("reach", [None, 0.7])
@pytest.mark.parametrize("p", [1, 2])
def test_sinkhorn_gradients(p, reach, rng):
    a, x, b, y = (t.requires_grad_() for t in measures(rng))
    factor, name = {1: (1.0, "euclidean"), 2: (0.5, "sqeuclidean")}[p]
    rho = None if reach is None else (reach**p / factor,) * 2
    value = SamplesLoss(p=p, blur=0.5, reach=reach, tol=1e-9)(a, x, b, y)
    expected = oracle.loss(x, y, 0.5**p / factor, a, b, cost_name=name, rho=rho)
    close(value, factor * expected.value, 1e-6)
    grads = torch.autograd.grad(value, (x, y, a, b))
    close(grads, [factor * g for g in expected.grads(x, y, a, b)], 1e-4)


@pytest.mark.parametrize("loss", ["gaussian", "laplacian", "energy"])
@pytest.mark.parametrize("batch", [None, 2])
def test_kernels(loss, batch, rng):
    a, x, b, y = measures(rng, batch=batch)
    mass = 1.0 if loss == "energy" else 1.5  # totals may differ
    inputs = a, x, mass * b, y
    options = {"loss": loss, "blur": 0.6}
    # The original takes distances below 1e-4 for 1e-4.
    close(SamplesLoss(**options)(*inputs), original(**options)(*inputs), 1e-3)
    got, expected = (f(**options, potentials=True)(*inputs) for f in (SamplesLoss, original))
    close(got, expected, 1e-3)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SamplesLoss(**options)(inputs[0], x, *inputs[2:]), x)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach", [None, 0.7])
def test_potentials(reach, debias, rng):
    """Shapes and values, up to the constant that balanced ones leave open."""
    options = {"blur": 1.0, "reach": reach, "debias": debias, "potentials": True}
    for inputs in (measures(rng), measures(rng, batch=2)):
        got = SamplesLoss(**options, tol=1e-8)(*inputs)
        expected = original(**options)(*inputs)
        if reach is None:
            shift = (got[0] - expected[0]).mean(-1, keepdim=True)
            got = (got[0] - shift, got[1] + shift)
        close(got, expected, 1e-2)  # the original's have not converged


def test_signatures_and_shapes(rng):
    """(x, y), weights with a last dimension of 1, labels, batches of one."""
    a, x, b, y = measures(rng)
    ours, theirs = SamplesLoss(blur=0.5), original(blur=0.5)
    labels = torch.zeros(len(x), dtype=torch.long)
    assert_close(ours(labels, a, x, None, b, y), ours(a, x, b, y))
    assert_close(ours(a[:, None], x, b[:, None], y), ours(a, x, b, y))
    calls = [
        (x, y),
        (x[None], y[None]),
        (a, x, b, y),
        (a[None, :, None], x[None], b[None], y[None]),
    ]
    for call in calls:
        got = ours(*call)
        close(got, theirs(*call) if call[0].shape != (1, 9, 1) else got, 1e-3)


def test_cost_function(rng):
    """It gets batches, and p makes eps of blur."""
    a, x, b, y = measures(rng)

    def cost(x, y):
        assert x.dim() == y.dim() == 3
        return (x[:, :, None] - y[:, None]).abs().sum(-1)

    options = {"cost": cost, "blur": 0.7, "p": 1.5, "reach": 0.9}
    close(SamplesLoss(**options, tol=1e-6)(a, x, b, y), original(**options)(a, x, b, y), 1e-3)


def test_totals_that_differ(rng):
    """The divergence agrees; without self terms the original's constant is half of
    eps (m_a + m_b) in place of eps m_a m_b."""
    a, x, b, y = measures(rng)
    a, b, eps = 2 * a, 3 * b, 0.5**2
    options = {"blur": 0.5, "reach": 0.8}
    close(SamplesLoss(**options, tol=1e-6)(a, x, b, y), original(**options)(a, x, b, y), 1e-3)
    got, theirs = (f(**options, debias=False)(a, x, b, y) for f in (SamplesLoss, original))
    close(got, theirs + eps * (2 * 3 - (2 + 3) / 2), 1e-3)
    exact = oracle.loss(x, y, 2 * eps, a, b, debiased=False, rho=(2 * 0.8**2,) * 2)
    close(got, exact.value / 2, 1e-3)


def test_attributes_can_be_changed(rng):
    """As one anneals blur."""
    a, x, b, y = measures(rng)
    loss = SamplesLoss(blur=1.0)
    loss.blur = 0.3
    assert_close(loss(a, x, b, y), SamplesLoss(blur=0.3)(a, x, b, y))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "hausdorff"}, NotImplementedError, "hausdorff"),
        ({"kernel": torch.cdist}, NotImplementedError, "kernel="),
        ({"cost": "SqDist(X,Y)"}, NotImplementedError, "KeOps"),
        ({"loss": "wasserstein"}, ValueError, "loss must be one of"),
        ({"backend": "keops"}, ValueError, "backend must be one of"),
        ({"p": 3}, ValueError, "p must be 1 or 2"),
    ],
)
def test_no_counterpart(options, error, message):
    with pytest.raises(error, match=message):
        SamplesLoss(**options)


def test_scaling_says_that_it_does_nothing():
    with pytest.warns(UserWarning, match="scaling= has no effect"):
        SamplesLoss(scaling=0.9)


X, Y, A = torch.zeros(4, 2), torch.ones(5, 2), torch.full((4,), 0.25)


@pytest.mark.parametrize(
    "inputs",
    [(X,), (X, Y[:, :1]), (X[None], Y), (X[0], Y[0]), (A[:3], X, A, Y), (A, X, X, Y)],
)
def test_errors_are_those_of_the_original(inputs):
    for loss in (SamplesLoss(), original()):
        with pytest.raises(ValueError, match=r"must|should|takes|accepts"):
            loss(*inputs)
