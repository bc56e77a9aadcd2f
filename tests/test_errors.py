"""A wrong call never returns a number: every error says what was given and what is expected."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import METHODS, rand, randn
from torch.testing import assert_close

import otloss

X, Y = torch.zeros(4, 3), torch.ones(5, 3)
A, B = torch.full((4,), 0.25), torch.full((5,), 0.2)
EPS = 0.5

FUNCTIONS = {
    "sinkhorn_divergence": otloss.sinkhorn_divergence,
    "sinkhorn_loss": otloss.sinkhorn_loss,
    "solve_sample": otloss.solve_sample,
    "solve": lambda x, y, eps, **k: otloss.solve(torch.cdist(x, y), eps, **k),
    "minibatch": lambda x, y, eps, **k: otloss.minibatch_energy_distance(x, x, y, y, eps, **k),
    "SinkhornDivergence": lambda x, y, eps, **k: otloss.SinkhornDivergence(eps, **k)(x, y),
}

OPTIONS = [
    *(
        ({"eps": eps}, ValueError, rf"eps must be finite and > 0, got {eps}")
        for eps in (0, 0.0, -1.0, math.nan, math.inf, -math.inf)
    ),
    *(
        ({"eps": eps}, TypeError, r"eps must be a number, got")
        for eps in ("0.1", None, True, 1j, [0.1])
    ),
    ({"eps": 10**400}, ValueError, r"must be finite and > 0, got more than 1.8e308"),
    ({"tol": 10**400}, ValueError, r"must be finite and > 0, got more than 1.8e308"),
    ({"tol": 0}, ValueError, r"tol must be finite and > 0, got 0"),
    ({"tol": "x"}, TypeError, r"tol must be a number, got str"),
    ({"max_iters": 0}, ValueError, r"max_iters must be at least 1, got 0"),
    ({"max_iters": 2**63}, ValueError, r"max_iters must be less than 2\*\*63, got 9223372036854"),
    ({"max_iters": 2.5}, TypeError, r"max_iters must be an integer, got float: 2.5"),
    ({"n_iters": 0}, ValueError, r"n_iters must be at least 1, got 0"),
    ({"n_iters": True}, TypeError, r"n_iters must be an integer, got bool"),
    ({"objective": "x"}, ValueError, r"objective must be one of 'regularized', .*got 'x'"),
    ({"backward": "x"}, ValueError, r"backward must be one of 'auto', 'envelope', .*got 'x'"),
    ({"backward": None}, ValueError, r"backward must be one of .*got None"),
    ({"method": "x"}, ValueError, r"method must be one of 'auto', 'dense', .*got 'x'"),
    ({"backward": "unrolled"}, ValueError, r'"unrolled" .*give n_iters'),
]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(("option", "kind", "message"), OPTIONS, ids=str)
def test_options(function, option, kind, message):
    with pytest.raises(kind, match=message):
        function(X, Y, **{"eps": EPS, **option})


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "solve"])
def test_precision(name):
    with pytest.raises(ValueError, match=r"precision must be one of .*'tf32', got 'bf16'"):
        FUNCTIONS[name](X, Y, EPS, precision="bf16")


def test_totals_may_differ_where_a_marginal_is_soft():
    more = torch.full((5,), 0.5)
    for unbalanced in (1.0, (None, 1.0), (1.0, None)):
        otloss.sinkhorn_loss(X, Y, EPS, b=more, unbalanced=unbalanced)
    for unbalanced in (None, (None, None)):
        with pytest.raises(ValueError, match=r"same total mass .* give unbalanced="):
            otloss.sinkhorn_loss(X, Y, EPS, b=more, unbalanced=unbalanced)


@pytest.mark.parametrize(
    ("cost", "kind", "message"),
    [
        ("sqeuclid", ValueError, r"cost must be one of 'sqeuclidean', .*got 'sqeuclid'"),
        (2, TypeError, r"cost must be a name or a function \(x, y\) -> C, got int"),
        (lambda x, y: 1.0, ValueError, r"cost must return a tensor of shape \(4, 5\).*got 1.0"),
        (lambda x, y: x, ValueError, r"cost must return a tensor .*got a tensor of shape \(4, 3\)"),
        (lambda x, y: torch.cdist(x, y) + 0j, ValueError, r"of real numbers, .*got .*complex64"),
        (lambda x, y: x.mul_(1) @ y.mT, ValueError, "must not change its arguments in place"),
    ],
    ids=["name", "kind", "number", "shape", "complex", "in place"],
)
@pytest.mark.parametrize(
    "function",
    [
        lambda cost: otloss.sinkhorn_loss(X, Y, EPS, cost=cost),
        lambda cost: otloss.energy_distance(X, Y, cost=cost),
        lambda cost: otloss.cost_matrix(X, Y, cost),
    ],
    ids=["loss", "energy", "cost_matrix"],
)
def test_cost(function, cost, kind, message):
    with pytest.raises(kind, match=message):
        function(cost)


def test_modules_name_arguments_that_they_lack():
    with pytest.raises(TypeError, match="SinkhornDivergence takes no argument reach"):
        otloss.SinkhornDivergence(EPS, reach=1.0)


NESTED = torch.nested.nested_tensor([X, Y], layout=torch.jagged)
CLOUDS = [
    (
        X[0],
        Y,
        ValueError,
        r"x must have shape \(n, d\) or \(B, n, d\), got .*shape \(3,\).*\(n, 1\)",
    ),
    (
        X[None, None],
        Y,
        ValueError,
        r"x must have shape .*got .*shape \(1, 1, 4, 3\).*x.flatten\(1\)",
    ),
    (X[:0], Y, ValueError, r"x must not be empty, got a tensor of shape \(0, 3\)"),
    (X, Y[:0], ValueError, r"y must not be empty, got a tensor of shape \(0, 3\)"),
    (X[:, :0], Y[:, :0], ValueError, r"x must not be empty, got a tensor of shape \(4, 0\)"),
    (X[:0, None], Y[:0, None], ValueError, r"x must not be empty"),
    (X, Y[:, :2], ValueError, r"x and y must have the same dimension d, got 3 and 2"),
    (X.expand(2, 4, 3), Y.expand(3, 5, 3), ValueError, r"same batch size B, got 2 and 3"),
    (X.expand(2, 4, 3), Y, ValueError, r"both be single clouds or both batches, got .*\(2, 4, 3\)"),
    (X.long(), Y, TypeError, r"x must be a floating-point tensor.*torch.int64"),
    (X, Y.int(), TypeError, r"y must be a floating-point tensor.*torch.int32"),
    (X, Y.bool(), TypeError, r"y must be a floating-point tensor.*torch.bool"),
    (X.to(torch.cfloat), Y, TypeError, r"x must be a floating-point tensor.*torch.complex64"),
    (X.to(torch.float8_e4m3fn), Y, TypeError, r"x must be a floating-point tensor.*float8"),
    (X.to_sparse(), Y, TypeError, r"x must be a dense tensor, got layout torch.sparse_coo"),
    (X.numpy(), Y, TypeError, r"x must be a torch.Tensor, got ndarray"),
    (X, [[0.0]], TypeError, r"y must be a torch.Tensor, got list: otloss.pad makes one"),
    (X, None, TypeError, r"y must be a torch.Tensor, got NoneType"),
    (NESTED, Y.expand(2, 5, 3), TypeError, r"x must be a dense tensor, got a nested one: pad"),
    (X, Y.to("meta"), ValueError, r"x and y must be on one device, got cpu and meta"),
]


@pytest.mark.parametrize("function", [
    lambda x, y: otloss.sinkhorn_divergence(x, y, EPS),
    lambda x, y: otloss.solve_sample(x, y, EPS),
    lambda x, y: otloss.sinkhorn_loss(x, y, EPS, cost=torch.cdist),
    otloss.energy_distance,
    otloss.cost_matrix,
], ids=["divergence", "solve_sample", "callable", "energy", "cost_matrix"])  # fmt: skip
@pytest.mark.parametrize(("x", "y", "kind", "message"), CLOUDS)
def test_clouds(function, x, y, kind, message):
    with pytest.raises(kind, match=message):
        function(x, y)


@pytest.mark.parametrize("position", range(1, 4))
def test_clouds_of_the_minibatch_distance_are_named(position):
    clouds = [X, X, X, X]
    clouds[position] = X[:, :2]
    name = ("x1", "x2", "y1", "y2")[position]
    with pytest.raises(ValueError, match=rf"x1 and {name} must have the same dimension d"):
        otloss.minibatch_energy_distance(*clouds, EPS)


NAN, INF = math.nan, math.inf
WEIGHTS = [
    (A[:3], B, ValueError, r"a must have shape \(4,\), one weight per point of .*\(3,\)"),
    (A[None], B, ValueError, r"a must have shape \(4,\).*got a tensor of shape \(1, 4\)"),
    (A, B[:, None], ValueError, r"b must have shape \(5,\).*\(5, 1\)"),
    (A * torch.tensor([-1, 1, 1, 3]), B, ValueError, r"a must be non-negative.*least .* -0.25"),
    (A, B * NAN, ValueError, r"b must be non-negative, but its least value is nan"),
    (A * torch.tensor([1, INF, 1, 1]), B, ValueError, r"a must be finite.*largest value is inf"),
    (A * 0, B, ValueError, r"a must have a positive total, but its weights are all 0"),
    (2 * A, B, ValueError, r"same total mass for balanced transport, got .*2.*1.*normalise"),
    (A, None, None, r""),
    (3 * A, None, ValueError, r"same total mass for balanced transport"),
    (A.to("meta"), B, ValueError, r"must be on one device, got cpu and meta"),
    (A.long(), B, TypeError, r"a must be a floating-point tensor"),
    (A > 0, B, TypeError, r"a must be floating-point weights, got a mask: give mask / mask.sum"),
    ([0.25] * 4, B, TypeError, r"a must be a torch.Tensor, got list"),
]


@pytest.mark.parametrize("function", [
    lambda a, b: otloss.sinkhorn_divergence(X, Y, EPS, a=a, b=b),
    lambda a, b: otloss.solve(torch.ones(4, 5), EPS, a=a, b=b),
    lambda a, b: otloss.energy_distance(X, Y, a=a, b=b),
], ids=["divergence", "solve", "energy"])  # fmt: skip
@pytest.mark.parametrize(("a", "b", "kind", "message"), WEIGHTS)
def test_weights(function, a, b, kind, message):
    if kind is None:
        function(a, b)
        return
    with pytest.raises(kind, match=message):
        function(a, b)


def test_weights_of_a_batch():
    x, y, b = X.expand(2, 4, 3), Y.expand(2, 5, 3), B.expand(2, 5)
    with pytest.raises(ValueError, match=r"a must have shape \(2, 4\)"):
        otloss.sinkhorn_loss(x, y, EPS, a=A, b=b)
    one_of_two = torch.stack([A, torch.zeros(4)])
    with pytest.raises(ValueError, match=r"a must have a positive total"):
        otloss.sinkhorn_loss(x, y, EPS, a=one_of_two, b=b)
    with pytest.raises(ValueError, match=r"same total mass.*got 2 and 1 in problem 1 of 2"):
        otloss.sinkhorn_loss(x, y, EPS, a=torch.stack([A, 2 * A]), b=b)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize(
    "cost",
    ["sqeuclidean", "euclidean", "cosine", torch.cdist],
    ids=["sqeuclidean", "euclidean", "cosine", "callable"],
)
@pytest.mark.parametrize("d", [3, 40])  # costs from differences, and from products
@pytest.mark.parametrize("method", METHODS)
def test_data_that_is_not_finite(method, d, cost, name, value):
    data = {"x": torch.full((4, d), 2.0), "y": torch.ones(5, d)}
    data[name][2, 1] = value
    x, y = data["x"], data["y"]
    message = rf"{name} must be finite, but {name}\[2, 1\] is {value}; 1 of \d+ values"
    if not (method == "streamed" and callable(cost)):
        for function in (otloss.sinkhorn_divergence, otloss.sinkhorn_loss, otloss.solve_sample):
            with pytest.raises(ValueError, match=message):
                function(x, y, EPS, cost=cost, method=method)
    with pytest.raises(ValueError, match=message):
        otloss.energy_distance(x, y, cost=cost)
    if not callable(cost):
        with pytest.raises(ValueError, match=message):
            otloss.cost_matrix(x, y, cost)


@pytest.mark.parametrize("value", [NAN, INF])
def test_other_functions_say_where_it_is_too(value):
    bad = X.clone()
    bad[2, 0] = value
    for call in (otloss.cost_matrix, otloss.energy_distance):
        with pytest.raises(ValueError, match=r"x must be finite, but x\[2, 0\]"):
            call(bad, Y)
    with pytest.raises(ValueError, match=r"y1 must be finite, but y1\[2, 0\]"):
        otloss.minibatch_energy_distance(Y, Y, bad, X, 0.1)
    C = torch.rand(4, 4)
    C[1, 3] = -value  # of infinity, which forbids a pair, the negative
    with pytest.raises(ValueError, match=r"C must be finite, but C\[.*1, 3\]"):
        otloss.solve(C, 1.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_costs_that_overflow(cost, method):
    with pytest.raises(ValueError, match=r"overflow torch.float32|cost matrix must be finite"):
        otloss.sinkhorn_loss(1e30 * (X + 1), -1e30 * Y, EPS, cost=cost, method=method)


@pytest.mark.parametrize("scale", [1e80, 1e100, 1e150])
@pytest.mark.parametrize("method", ["dense", "streamed"])
def test_sums_that_overflow(method, scale, rng):
    """The costs are finite, what the solver makes of them is not."""
    x, y = scale * randn(rng, 20, 3), scale * randn(rng, 30, 3)
    with pytest.raises(ValueError, match=r"sums of costs up to .* overflow torch.float64: scale"):
        otloss.sinkhorn_loss(x, y, 0.1 * scale**2, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-19), (torch.float64, 1e-160)])
def test_squares_that_underflow(dtype, scale, cost, method, rng):
    x, y = scale * randn(rng, 9, 3, dtype=dtype), scale * randn(rng, 7, 3, dtype=dtype)
    for a, b in ((x, y), (x[:1], y[:1])):
        with pytest.raises(ValueError, match=rf"squares of distances underflow {dtype}"):
            otloss.sinkhorn_loss(a, b, 1.0, cost=cost, method=method)
    assert otloss.sinkhorn_loss(x[:1], x[:1], 1.0, cost=cost, method=method) == 0
    # a point of weight 0 may be anywhere
    far, a = torch.cat([x[:1], x[:1] + 1]), torch.tensor([1.0, 0.0], dtype=dtype)
    assert otloss.sinkhorn_loss(far, x[:1], 1.0, a=a, cost=cost, method=method) == 0
    # one problem of several
    pair = [torch.stack([t / scale, t]) for t in (x, y)]
    with pytest.raises(ValueError, match=r"points of x and y are at most .*e-(19|160) apart"):
        otloss.sinkhorn_loss(*pair, 1.0, cost=cost, method=method)


@pytest.mark.parametrize("scale", [1e-21, 1e-30, 1e-40])
@pytest.mark.parametrize(
    "call",
    [
        otloss.energy_distance,
        partial(otloss.energy_distance, cost="sqeuclidean"),
        partial(otloss.energy_distance, method="streamed"),
        partial(otloss.energy_distance, method="reference"),
        partial(otloss.cost_matrix, cost="euclidean"),
        otloss.cost_matrix,
        partial(otloss.mmd, bandwidth=1.0),
        partial(otloss.mmd, kernel="laplacian", bandwidth=1.0),
        partial(otloss.mmd, kernel="energy"),
        otloss.sliced_wasserstein,
        lambda x, y: otloss.wasserstein_1d(x[:, 0], y[:, 0]),
    ],
)
def test_means_that_underflow(call, scale, rng):
    x, y = (scale * (1 + rand(rng, n, 3, dtype=torch.float32)) for n in (9, 7))
    with pytest.raises(ValueError, match=r"squares .* underflow torch.float32: points of x and y"):
        call(x, -y)
    assert bool((call(x[:1], x[:1]).abs() < 1e-6).all())


def test_distances_that_do_not_underflow(rng):
    """To the power 1 no squares are taken."""
    x, y = rand(rng, 9, 1, dtype=torch.float32), rand(rng, 7, 1, dtype=torch.float32)
    expected = otloss.wasserstein_1d(x[:, 0], y[:, 0], 1)
    assert_close(1e30 * otloss.wasserstein_1d(1e-30 * x[:, 0], 1e-30 * y[:, 0], 1), expected)
    with pytest.raises(ValueError, match=r"squares of spacing=1e-170 underflow"):
        otloss.solve_grid(x.mT / x.sum(), x.mT / x.sum(), 1.0, spacing=1e-170)


@pytest.mark.parametrize(
    "call",
    [
        otloss.energy_distance,
        partial(otloss.energy_distance, method="streamed"),
        otloss.sliced_wasserstein,
        lambda x, y: otloss.wasserstein_1d(x[:, 0], y[:, 0]),
        lambda x, y: otloss.solve_grid(x.abs(), x.abs(), 1.0),
    ],
)
def test_means_that_overflow(call, rng):
    x, y = 3e38 - 1e38 * rand(rng, 20, 3, dtype=torch.float32), torch.full((20, 3), -3e38)
    with pytest.raises(ValueError, match=r"sums not overflow torch.float32"):
        call(x, y)


def test_a_mask_of_large_costs():
    """The message names a mask that works, and it does."""
    C, mask = torch.rand(3, 3), 1 - torch.eye(3)
    with pytest.raises(ValueError, match=r"If large costs forbid pairs, .*at most 2.1e\+05"):
        otloss.solve(C + 1e9 * mask, 0.1)
    plan = otloss.solve(C + 11 * mask, 0.1).plan
    assert_close(plan, torch.eye(3) / 3, rtol=0, atol=1e-6)


def test_batched_gradients_are_refused(rng):
    x = randn(rng, 4, 3).requires_grad_()
    loss = otloss.sinkhorn_divergence(x, randn(rng, 5, 3), 0.5).expand(3)
    with pytest.raises(NotImplementedError, match=r"with is_grads_batched=True.* one at a time"):
        torch.autograd.grad(loss, x, torch.eye(3).double(), is_grads_batched=True)
    (first,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="vectorize=True"):
        torch.autograd.grad(first, x, torch.eye(12).view(12, 4, 3).double(), is_grads_batched=True)


def test_callable_cost_that_is_not_finite():
    with pytest.raises(ValueError, match=r"cost matrix must be finite.*20 of 20 values"):
        otloss.sinkhorn_loss(X, Y, EPS, cost=lambda x, y: torch.cdist(x, y) * NAN)
    with pytest.raises(ValueError, match=r"all costs of row 0 are infinite"):
        otloss.sinkhorn_loss(X, Y, EPS, cost=lambda x, y: torch.cdist(x, y) / 0)


@pytest.mark.parametrize("method", METHODS)
def test_eps_that_the_dtype_cannot_resolve(method):
    """(f + g - C) / eps would have no correct digit: 4 * 1.2e-7 * 3 = 1.4e-6."""
    with pytest.raises(ValueError, match=r"eps=1e-06 is below .*float32 .* up to 3 \(least: 1.43"):
        otloss.sinkhorn_loss(X, Y, 1e-6, method=method, n_iters=1)
    double = otloss.sinkhorn_loss(X.double(), Y.double(), 1e-6, method=method)
    assert double.item() == pytest.approx(3, abs=1e-5)
    with pytest.warns(otloss.ConvergenceWarning, match="float32 resolves no smaller"):
        otloss.sinkhorn_loss(X, Y, 1e-5, method=method)
    otloss.sinkhorn_loss(X, Y, 1e-3, method=method)


@pytest.mark.parametrize("method", ["dense", "reference"])
@pytest.mark.parametrize("scale", [1e-37, 1e-40, 1e-90])
def test_potentials_that_underflow(scale, method, rng):
    C = rand(rng, 5, 4)
    expected = otloss.solve(C, 0.1, method=method).value
    value = otloss.solve(scale * C, 0.1 * scale, method=method).value
    assert_close(value / scale, expected, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"below what torch.float32 can .* data of larger scale"):
        otloss.solve((scale * C).float(), 0.1 * scale, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_eps_below_the_rounding_of_cosines(method, rng):
    """1 - cos has the rounding of 1, however small it is, as between points far from 0."""
    x, y = (1e3 + randn(rng, n, 3, dtype=torch.float32) for n in (6, 5))
    with pytest.raises(ValueError, match=r"eps=1e-08 is below what torch.float32 can resolve"):
        otloss.sinkhorn_loss(x, y, 1e-8, cost="cosine", method=method)


@pytest.mark.parametrize("method", ["dense", "reference"])
def test_convergence_warning(method, rng):
    """It says what was reached, what was asked, and what to change; the result says so too."""
    x, y = randn(rng, 50, 2), randn(rng, 40, 2)
    message = r"stopped after 3 iterations at a marginal error of .*above tol=1e-09.*Raise max_iters \(now 3\), eps \(now 0.05; the largest cost is .*\) or tol"  # noqa: E501
    with pytest.warns(otloss.ConvergenceWarning, match=message) as caught:
        otloss.sinkhorn_divergence(x, y, 0.05, tol=1e-9, max_iters=3, method=method)
    assert len(caught) == 1
    with pytest.warns(otloss.ConvergenceWarning) as caught:
        result = otloss.solve_sample(x, y, 0.05, tol=1e-9, max_iters=3, method=method)
    assert caught[0].filename == __file__
    assert not result.converged
    assert result.marginal_error > 1e-9
    assert result.n_iters == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        otloss.solve_sample(x, y, 0.05, tol=1e-9, max_iters=100_000, method=method)
        # no test, no warning
        fixed = otloss.solve_sample(x, y, 0.05, n_iters=3, tol=1e-9, method=method)
    assert (fixed.converged, fixed.n_iters) == (False, 3)


@pytest.mark.parametrize("max_iters", [1, 2, 3, 5, 9])
def test_max_iters_is_a_limit(max_iters, rng):
    x, y = randn(rng, 30, 2), randn(rng, 20, 2)
    with pytest.warns(otloss.ConvergenceWarning):
        result = otloss.solve_sample(x, y, 0.001, tol=1e-9, max_iters=max_iters)
    assert result.n_iters == max_iters


def loss(unbalanced: Any) -> Any:
    return lambda: otloss.sinkhorn_loss(X, Y, EPS, unbalanced=unbalanced)


def started(f: torch.Tensor, g: torch.Tensor) -> Any:
    return lambda: otloss.solve_sample(X, Y, EPS, init=(f, g))


def solved(C: Any) -> Any:
    return lambda: otloss.solve(C, EPS)


def asked(question: Callable[[otloss.OTResult], Any], of_points: bool = True) -> Any:
    points, costs = (lambda: otloss.solve_sample(X, Y, EPS)), solved(torch.zeros(4, 5))
    return lambda: question(points() if of_points else costs())


F, G = torch.zeros(4), torch.zeros(5)
REFUSED: list[tuple[Any, Any, str]] = [
    (loss(0.0), ValueError, r"unbalanced must be finite and > 0, got 0.0"),
    (loss(-1), ValueError, r"unbalanced must be finite and > 0, got -1"),
    (loss("x"), TypeError, r"unbalanced must be a number, got str"),
    (loss(1e-39), ValueError, r"unbalanced must be at least 1.18e-38 in torch.float32, got 1e-39"),
    (loss((1.0, 2.0, 3.0)), ValueError, r"one number or a pair \(rho_x, rho_y\)"),
    (loss((1.0, -2.0)), ValueError, r"unbalanced must be finite and > 0, got -2.0"),
    (loss(math.inf), ValueError, r"got inf; None makes the marginal a constraint"),
    (
        lambda: otloss.minibatch_energy_distance(X, X, Y, Y, EPS, unbalanced=1.0),
        TypeError, "unbalanced",
    ),
    (lambda: otloss.MinibatchEnergyDistance(EPS, unbalanced=1.0), TypeError, "unbalanced"),
    (solved(F[:3]), ValueError, r"C must have shape \(n, m\) or \(B, n, m\), got .*\(3,\)"),
    (solved(X[:0]), ValueError, r"C must not be empty, got a tensor of shape \(0, 3\)"),
    (solved(X.int()), TypeError, r"C must be a floating-point tensor"),
    (solved([[0.0]]), TypeError, r"C must be a torch.Tensor, got list"),
    (solved(torch.tensor([[0, NAN]])), ValueError, r"C must be finite.*is nan; 1 of 2 values"),
    (solved(torch.tensor([[0, -INF]])), ValueError, r"C must be finite.*is -inf; 1 of 2 values"),
    (
        solved(torch.tensor([[0, INF]])),
        ValueError, r"all costs of column 1 are infinite.*weight 0.5 must go somewhere",
    ),
    (started(F[:3], G), ValueError, r"init f must have shape \(4,\), got .*\(3,\)"),
    (started(F, G[None]), ValueError, r"init g must have shape \(5,\)"),
    (started(F.long(), G), TypeError, r"init f must be a floating-point"),
    (started(F + NAN, G), ValueError, r"init f must be finite.*4 of 4"),
    (asked(lambda r: r.apply(G, axis=2)), ValueError, r"axis must be 0 or 1, got 2"),
    (asked(lambda r: r.apply(F)), ValueError, r"v must have 5 rows for axis=1, got .*\(4,\)"),
    (
        asked(lambda r: r.apply(torch.zeros(5, 2), axis=0)),
        ValueError, r"v must have 4 rows for axis=0, got .*\(5, 2\)",
    ),
    (asked(lambda r: r.apply(G.int())), TypeError, r"v must be a floating-point tensor"),
    (
        asked(lambda r: r.extend(X[:, :2])),
        ValueError, r"y and x_new must have the same dimension d, got 3 and 2",
    ),
    (asked(lambda r: r.barycentric_map(), False), ValueError, r"needs the points: use solve_sampl"),
    (asked(lambda r: r.extend(X), False), ValueError, r"needs the points: use solve_sample\(x, y"),
    (lambda: otloss.SinkhornDivergence(-1.0), ValueError, r"eps must be finite and > 0"),
    (lambda: otloss.SinkhornLoss(1.0, cost="x"), ValueError, r"cost must be one of"),
    (
        lambda: otloss.MinibatchEnergyDistance(1.0, backward="x"),
        ValueError, r"backward must be one of",
    ),
    (lambda: otloss.EnergyDistance(cost="x"), ValueError, r"cost must be one of"),
    (lambda: otloss.EnergyDistance(method="x"), ValueError, r"method must be one of"),
    (lambda: otloss.show_config("x"), ValueError, r"mode must be one of 'stdout', .* got 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED)
def test_a_wrong_argument_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.jacrev])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: otloss.mmd(x, x + 1, "energy"),
        lambda x: otloss.sliced_wasserstein(x, x + 1),
        lambda x: otloss.sinkhorn_divergence_grid(x, x, 0.5),
        lambda x: otloss.barycenter_grid(torch.stack([x, x]), torch.ones(2) / 2, 0.5),
    ],
)
def test_function_transforms_without_a_rule_are_refused_by_name(function, transform):
    x = torch.rand(2, 4, 3) if transform is torch.func.vmap else torch.rand(4, 3)
    with pytest.raises(NotImplementedError, match=r"batch \(B, n, d\) in place of vmap"):
        transform(function)(x)
