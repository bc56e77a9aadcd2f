"""torch.func: vmap, grad and jacrev of losses and solves are those of a loop, in one call of the
kernels."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from helpers import METHODS, rand, randn, simplex, some_of
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

import otloss

V, N, M, D = 3, 6, 5, 2
EPS = 0.4
MODES = {
    "envelope": {"tol": 1e-9, "backward": "envelope"},
    "implicit": {"tol": 1e-9, "objective": "transport"},
    "unrolled": {"n_iters": 4},
    "unbalanced": {"tol": 1e-9, "unbalanced": 0.6},
}


def l1(x: Tensor, y: Tensor) -> Tensor:
    """A cost that is a function, smooth."""
    return ((x.unsqueeze(-2) - y.unsqueeze(-3)).square() + 0.1).sqrt().sum(-1)


LOSSES = {
    "divergence": otloss.sinkhorn_divergence,
    "loss": otloss.sinkhorn_loss,
    "function": lambda *args, **kw: otloss.sinkhorn_divergence(*args, cost=l1, **kw),
    "value": lambda *args, **kw: otloss.solve_sample(*args, **kw).value,
    "f": lambda *args, **kw: otloss.solve_sample(*args, **kw).potentials[0],
    "g": lambda *args, **kw: otloss.solve_sample(*args, **kw).potentials[1],
    "matrix": lambda x, y, *args, **kw: otloss.solve(otloss.cost_matrix(x, y), *args, **kw).value,
}


def call(loss, mode, method="auto"):
    """``(x, y, a, b) -> loss``, or without weights."""
    if loss in ("function", "matrix") and method == "streamed":
        pytest.skip("of stored matrices")
    if loss in ("f", "g") and mode == "envelope":
        pytest.skip("gradients of the value only")

    def function(x, y, a=None, b=None):
        return LOSSES[loss](x, y, EPS, a=a, b=b, method=method, **MODES[mode])

    return function


def inputs(rng, weights, batch=(V,)):
    x, y = rand(rng, *batch, N, D), rand(rng, *batch, M, D)
    if not weights:
        return [x, y]
    return [x, y, simplex(randn(rng, *batch, N)), simplex(randn(rng, *batch, M))]


def loop(function, tensors):
    return torch.stack([function(*each) for each in zip(*tensors, strict=True)])


def weighted(t):
    """A number made of potentials, with the constants that they leave open too, or a value."""
    return (t * torch.arange(1.0, 1 + len(t)).to(t)).sum() if t.dim() else t


def gradients(function, tensors):
    """By plain autograd."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(weighted(function(*leaves)), leaves)


@pytest.fixture
def solves(monkeypatch):
    """Counts the calls of the kernels."""
    counted, solve = [], otloss.ops.solve
    monkeypatch.setattr(otloss.ops, "solve", lambda *args: counted.append(args) or solve(*args))
    return counted


@some_of("loss, mode, method, weights", [*LOSSES], [*MODES], METHODS, [True, False], whole=2)
def test_vmap_and_gradients_of_each_sample(loss, mode, method, weights, rng):
    function, tensors = call(loss, mode, method), inputs(rng, weights)
    assert_close(vmap(function)(*tensors), loop(function, tensors))
    wanted = tuple(range(len(tensors)))
    found = vmap(grad(lambda *t: weighted(function(*t)), wanted))(*tensors)
    for k, each in enumerate(zip(*tensors, strict=True)):
        assert_close(tuple(t[k] for t in found), gradients(function, each))


def test_one_call_of_the_kernels(rng, solves, monkeypatch):
    function, (x, y) = call("divergence", "envelope"), inputs(rng, False, (2, V))
    vmap(vmap(grad(function)))(x, y)
    taken, backward = [], otloss.ops.envelope_backward
    monkeypatch.setattr(
        otloss.ops, "envelope_backward", lambda *args: taken.append(args) or backward(*args)
    )
    jacobian = jacrev(vmap(function))(x[0], y[0])
    assert_close(jacobian.sum(1), vmap(grad(function))(x[0], y[0]))
    solves.pop()
    assert len(solves) == 2
    assert len(taken) == 2
    assert [args[2][0].shape[0] for args in solves] == [2 * V, V]


@pytest.mark.parametrize("mapped", list(itertools.product([True, False], repeat=4))[:-1])
def test_any_arguments_are_mapped(mapped, rng):
    function, tensors = call("divergence", "envelope"), inputs(rng, True)
    given = [t if there else t[0] for t, there in zip(tensors, mapped, strict=True)]
    dims = tuple(0 if there else None for there in mapped)
    full = [t if there else t[:1].expand_as(t) for t, there in zip(tensors, mapped, strict=True)]
    assert_close(vmap(function, dims)(*given), loop(function, full))
    wanted = (0, 1, 2, 3)
    assert_close(vmap(grad(function, wanted), dims)(*given), vmap(grad(function, wanted))(*full))


def test_axes_anywhere_and_batches_inside(rng):
    """in_dims and out_dims, clouds that have a batch themselves, and eps of each problem."""
    x, y, a, b = inputs(rng, True, (V, 2))
    eps = 0.3 + rand(rng, V, 2)

    def function(x, y, eps, a, b):
        return otloss.sinkhorn_divergence(x, y, eps, a=a, b=b, tol=1e-9)

    expected = loop(function, (x, y, eps, a, b))
    moved = x.movedim(0, 2), y, eps.mT, a.movedim(0, 1), b
    dims = (2, 0, 1, 1, 0)
    assert_close(vmap(function, dims, out_dims=1)(*moved), expected.mT)
    assert_close(vmap(function, (0, 0, None, 0, None))(x, y, eps[0], a, b[0]),
                 loop(function, (x, y, eps[:1].expand(V, 2), a, b[:1].expand_as(b))))  # fmt: skip

    # one row of weights for the batch, and one eps
    def one(x, a, eps):
        return function(x, y[0], eps, a, b[0]).sum()

    of_x, of_a, of_eps = vmap(grad(one, (0, 1, 2)), (0, None, 0))(x, a[0, :1], eps[:, 0])
    for k in range(V):
        assert_close((of_x[k], of_a[k], of_eps[k]), gradients(one, (x[k], a[0, :1], eps[k, 0])))


def test_nested(rng):
    x, y = inputs(rng, False)
    function = call("divergence", "envelope")
    every = vmap(vmap(function, (None, 0)), (0, None))(x, y)
    of_x = vmap(vmap(grad(function), (None, 0)), (0, None))(x, y)
    for i, j in itertools.product(range(V), repeat=2):
        assert_close(every[i, j], function(x[i], y[j]))
        assert_close(of_x[i, j], gradients(function, (x[i], y[j]))[0])


@pytest.mark.parametrize("mode", [*MODES])
@pytest.mark.parametrize("loss", ["divergence", "f"])
def test_jacobians_and_second_derivatives(loss, mode, rng):
    function, (x, y) = call(loss, mode), inputs(rng, False)
    of_x = lambda x: function(x, y[0])  # noqa: E731
    assert_close(jacrev(of_x)(x[0]), torch.autograd.functional.jacobian(of_x, x[0]))
    total = lambda x, y: function(x, y).square().sum()  # noqa: E731
    hessian = torch.autograd.functional.hessian(lambda x: total(x, y[0]), x[0])
    assert_close(jacrev(grad(total))(x[0], y[0]), hessian)
    assert_close(vmap(jacrev(grad(total)))(x, y)[0], hessian)
    assert_close(jacrev(vmap(grad(total)))(x, y)[0, :, :, 0], hessian)
    assert_close(grad(lambda x: vmap(grad(total))(x, y).square().sum())(x)[0],
                 2 * torch.einsum("ijkl,kl->ij", hessian, grad(total)(x[0], y[0])))  # fmt: skip


@some_of("loss, mode", [*LOSSES], [*MODES], whole=2)
def test_finite_differences(loss, mode, rng):
    function, tensors = call(loss, mode), inputs(rng, True, ())
    value, step = function(*tensors), 1e-5
    seed = randn(rng, *value.shape, 1)[..., 0]
    along = [randn(rng, *t.shape) for t in tensors[:2]] + [
        w * (u - (w * u).sum()) for w, u in ((w, randn(rng, *w.shape)) for w in tensors[2:])
    ]
    _, back = vjp(function, *tensors)
    slope = sum((g * u).sum() for g, u in zip(back(seed), along, strict=True))
    ahead, behind = (
        function(*(t + s * u for t, u in zip(tensors, along, strict=True))) for s in (step, -step)
    )
    assert_close(slope, (seed * (ahead - behind)).sum() / (2 * step), rtol=1e-5, atol=1e-7)


def test_what_is_mapped_may_leave_the_others_alone(rng):
    """A gradient that is mapped though the call is not: of a sum with mapped coefficients."""
    function, (x, y) = call("divergence", "envelope"), inputs(rng, False, ())
    scale = rand(rng, V)
    expected = scale[:, None, None] * gradients(function, (x, y))[0]
    of_x = grad(lambda x, s: s * function(x, y))
    assert_close(vmap(of_x, (None, 0))(x, scale), expected)
    slope = lambda s: vjp(lambda x: function(x[None], y[None]), x)[1](s)[0].square().sum()  # noqa: E731
    assert_close(vmap(grad(slope))(scale[:, None]), 2 * scale[:, None] * slope(torch.ones(1).to(x)))
    second = jacrev(of_x)(x, scale[0])
    assert_close(vmap(jacrev(of_x), (None, 0))(x, scale)[0], second)


def test_parameters_of_a_model(rng):
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, D)).double()
    loss = otloss.SinkhornDivergence(EPS, tol=1e-9)
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    x, y = inputs(rng, False)

    def of_sample(parameters, x, y):
        return loss(functional_call(model, parameters, (x,)), y)

    found = vmap(grad(of_sample), (None, 0, 0))(parameters, x, y)
    for k in range(V):
        expected = torch.autograd.grad(loss(model(x[k]), y[k]), [*model.parameters()])
        assert_close([g[k] for g in found.values()], [*expected])


def test_parameters_of_a_cost_and_of_eps(rng):
    x, y, a, b = inputs(rng, True)
    a[:, 0] = 0
    a, x[:, 0] = a / a.sum(-1, True), torch.nan  # padding, which the function never sees

    def loss(scale, eps, x, y, a, b):
        cost = lambda x, y: scale * l1(x, y)  # noqa: E731
        return otloss.sinkhorn_divergence(x, y, eps, a=a, b=b, cost=cost, tol=1e-10)

    scale, eps = torch.tensor(1.3, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    found = vmap(grad(loss, (0, 1)), (None, None, 0, 0, 0, 0))(scale, eps, x, y, a, b)
    for k in range(V):
        part = lambda scale, eps, k=k: loss(scale, eps, x[k], y[k], a[k], b[k])  # noqa: E731
        assert_close((found[0][k], found[1][k]), gradients(part, (scale, eps)))
        step = 1e-6
        slope = (part(scale, eps + step) - part(scale, eps - step)) / (2 * step)
        assert_close(found[1][k], slope, rtol=1e-5, atol=1e-7)


def test_leaves_of_plain_autograd(rng):
    """What is mapped may be differentiated around vmap, by torch.autograd, twice."""
    function, (x, y) = call("divergence", "envelope"), inputs(rng, False)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(vmap(function)(leaf, y).sum(), leaf, create_graph=True)
    assert_close(found, gradients(lambda x: function(x, y).sum(), (x,))[0])
    (second,) = torch.autograd.grad(found[0, 0, 0], leaf)
    assert_close(second[0], jacrev(grad(function))(x[0], y[0])[0, 0])
    with torch.no_grad():
        assert not vmap(function)(leaf, y).requires_grad


def test_one_matrix_for_many_weights(rng, solves):
    """It is not copied."""
    C, a, b = rand(rng, N, M), simplex(randn(rng, V, N)), simplex(randn(rng, V, M))
    value = vmap(lambda a, b: otloss.solve(C, EPS, a=a, b=b, tol=1e-9).value)
    expected = otloss.solve(C, EPS, a=a, b=b, tol=1e-9).value
    assert_close(value(a, b), expected)
    assert [args[0][0].shape for args in solves] == 2 * [(1, N, M)]
    of_C = vmap(grad(lambda C, a: otloss.solve(C, EPS, a=a, tol=1e-9).value), (None, 0))(C, a)
    plans = [otloss.solve(C, EPS, a=w, tol=1e-9).plan for w in a]
    assert_close(of_C, torch.stack(plans), rtol=1e-6, atol=1e-9)


def test_results(rng):
    x, y = inputs(rng, False)
    first = otloss.solve_sample(x, y, EPS)

    def convergence(x, y, f, g):
        r = otloss.solve_sample(x, y, EPS, init=(f, g))
        return r.converged, r.n_iters, r.marginal_error, *r.potentials

    converged, n_iters, error, f, g = vmap(convergence)(x, y, *first.potentials)
    assert converged.all()
    assert (n_iters <= first.n_iters).all()
    assert (error <= 1e-3).all()
    assert f.shape == (V, N)
    assert g.shape == (V, M)
    assert otloss.last_status().converged
    with pytest.raises(NotImplementedError, match="a result has value, potentials"):
        vmap(lambda x, y: otloss.solve_sample(x, y, EPS).plan)(x, y)


def test_other_losses(rng):
    x, y = randn(rng, V, 2, N, D), randn(rng, V, 2, N, D)
    four = lambda x, y: otloss.minibatch_energy_distance(*x, *y, 0.1, tol=1e-9)  # noqa: E731
    energy = lambda x, y: otloss.EnergyDistance()(x[0], y[0])  # noqa: E731
    own = lambda x, y: otloss.cost_matrix(x[0], x[0], "euclidean").sum() + y.sum()  # noqa: E731
    function = lambda x, y: otloss.energy_distance(x[0], y[0], cost=l1)  # noqa: E731
    for loss in (four, energy, own, function):
        assert_close(vmap(loss)(x, y), loop(loss, (x, y)))
        assert_close(vmap(grad(loss))(x, y)[1], gradients(loss, (x[1], y[1]))[0])


def test_warm_starts(rng, solves):
    loss, (x, y) = otloss.SinkhornDivergence(0.05, warm_start=True), inputs(rng, False)
    for _ in range(2):
        vmap(grad(loss))(x, y)
    assert otloss.last_status().n_iters <= 3
    assert [len(args[11]) for args in solves] == [0, 6]  # init


def test_data_is_read_as_always(rng):
    x, y, a, b = inputs(rng, True)
    function = call("divergence", "envelope")
    with pytest.raises(ValueError, match="x must be finite"):
        vmap(function)(x / 0, y)
    with pytest.raises(ValueError, match="a must be non-negative"):
        vmap(grad(function))(x, y, -a, b)
    with pytest.warns(otloss.ConvergenceWarning, match="stopped"):
        vmap(lambda x, y: otloss.sinkhorn_loss(x, y, 1e-3, max_iters=2))(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vmap(grad(function))(x, y, a, b)


X = torch.rand(3, 4, 2)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda: vmap(lambda x: otloss.mmd(x, x, "energy"))(X), NotImplementedError, "torch.func"),
        (lambda: vmap(lambda x: otloss.sinkhorn_loss(x, x, 1.0))(X[0]), ValueError, "x must have"),
        (lambda: vmap(lambda x: otloss.solve(x, 1.0).value)(X[0]), ValueError, "C must have"),
        (lambda: vmap(lambda e: otloss.sinkhorn_loss(X[0], X[0], e))(-X[0, 0]), ValueError, "eps"),
        (
            lambda: jvp(lambda x: otloss.sinkhorn_loss(x, x + 1, 1.0), (X,), (X,)),
            NotImplementedError, "use torch.func.jacrev",
        ),
        (
            lambda: jacfwd(lambda x: otloss.solve_sample(x, x + 1, 1.0).value)(X[0]),
            NotImplementedError, "use torch.func.jacrev",
        ),
        (
            lambda: grad(lambda a: otloss.sinkhorn_loss(X[0], X[1], 1.0, a=a, cost=l1))(
                torch.tensor([0.0, 0.5, 0.25, 0.25])
            ),
            NotImplementedError, "detach the weights",
        ),
    ],
)  # fmt: skip
def test_refused_by_name(function, error, message):
    with pytest.raises(error, match=message):
        function()


def test_gradients_of_autograd_that_are_batched_say_what_to_use(rng):
    x, y = (t.requires_grad_() for t in inputs(rng, False))
    loss = otloss.sinkhorn_divergence(x, y, EPS)
    with pytest.raises(NotImplementedError, match=r"use torch\.func\.jacrev"):
        torch.autograd.grad(loss, x, torch.eye(V, dtype=torch.float64), is_grads_batched=True)
