"""Densities on a grid against the dense solver on the same points, and finite differences."""

import math

import pytest
import torch
from backends import EMULATED, emulated, serving

import otloss
from otloss import ops
from otloss.reference import grid as reference


def densities(*shape, zeros=True, dtype=torch.float64):
    a, b = torch.rand(2, 2, *shape, dtype=torch.float64, generator=torch.manual_seed(0)) + 0.05
    if zeros:
        a[:, 0], b[:, -1] = 0, 0
    axes = tuple(range(1, a.dim()))
    return [(w / w.sum(axes, keepdim=True)).to(dtype) for w in (a, b)]


def points(*shape):
    each = [torch.arange(n, dtype=torch.float64) for n in shape]
    return torch.cartesian_prod(*each).reshape(-1, len(shape)).expand(2, -1, -1)


def relative(x, y):
    return float(((x - y.reshape(x.shape)).norm() / y.norm()).detach())


@pytest.mark.parametrize("shape", [(12, 9), (32, 32), (11,), (4, 3, 5)])
@pytest.mark.parametrize("unbalanced", [None, (10.0, None), 20.0])
def test_agrees_with_the_dense_solver(shape, unbalanced):
    a, b = densities(*shape)
    b, x = b * (1.3 if unbalanced else 1.0), points(*shape)
    options = {"unbalanced": unbalanced, "tol": 1e-7, "max_iters": 5000}
    grid = [w.clone().requires_grad_() for w in (a, b)]
    dense = [w.flatten(1).clone().requires_grad_() for w in (a, b)]
    S = otloss.sinkhorn_divergence_grid(*grid, 1.5, **options)
    expected = otloss.sinkhorn_divergence(x, x, 1.5, a=dense[0], b=dense[1], **options)
    assert relative(S, expected) < 1e-5
    of_grid = torch.autograd.grad(S.sum(), grid)
    for found, right in zip(of_grid, torch.autograd.grad(expected.sum(), dense), strict=True):
        assert relative(found, right) < 1e-4
    result = otloss.solve_grid(a, b, 1.5, **options)
    right = otloss.solve_sample(x, x, 1.5, a=a.flatten(1), b=b.flatten(1), **options)
    assert relative(result.value, right.value) < 1e-5
    assert relative(result.value_linear, right.value_linear) < 1e-5
    assert bool(result.converged.all())
    assert bool((result.marginal_error < 1e-6).all())
    there = a.flatten(1) > 0
    moved = result.barycentric_map().flatten(1, -2)
    assert relative(moved[there], right.barycentric_map()[there]) < 1e-5
    v = torch.rand_like(a)
    assert relative(result.apply(v, axis=0), right.apply(v.flatten(1), axis=0)) < 1e-5
    assert relative(result.plan, right.plan) < 1e-5


QUANTITIES = {
    "divergence": lambda a, b, w, **o: otloss.sinkhorn_divergence_grid(a, b, 2.0, **o),
    "value": lambda a, b, w, **o: otloss.solve_grid(a, b, 2.0, **o).value,
    "linear": lambda a, b, w, **o: otloss.solve_grid(a, b, 2.0, **o).value_linear,
    "potentials": lambda a, b, w, **o: w * otloss.solve_grid(a, b, 2.0, **o).potentials[0],
    "marginals": lambda a, b, w, **o: w * otloss.solve_grid(a, b, 2.0, **o).marginals[1],
    "plan": lambda a, b, w, **o: w.view(2, -1, 1) * otloss.solve_grid(a, b, 2.0, **o).plan,
    "map": lambda a, b, w, **o: w * otloss.solve_grid(a, b, 2.0, **o).barycentric_map()[..., 0],
}


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("unbalanced", [None, 20.0])
@pytest.mark.parametrize("n_iters", [None, 3])
def test_gradients_are_those_of_finite_differences(quantity, unbalanced, n_iters):
    a, b = densities(5, 4)
    options = {"unbalanced": unbalanced, "n_iters": n_iters, "tol": 1e-11, "max_iters": 3000}
    w, h = torch.randn_like(a), 1e-5
    da, db = torch.rand_like(a), torch.rand_like(b)
    db *= (da.sum((1, 2)) / db.sum((1, 2)))[:, None, None]
    given = [t.clone().requires_grad_() for t in (a, b)]
    value = QUANTITIES[quantity](*given, w, **options).sum()
    of_a, of_b = torch.autograd.grad(value, given)

    def at(t):  # one-sided: some weights are 0
        with torch.no_grad():
            return QUANTITIES[quantity](a + t * da, b + t * db, w, **options).sum()

    expected = (4 * at(h) - 3 * at(0) - at(2 * h)) / (2 * h)
    assert float((of_a * da + of_b * db).sum()) == pytest.approx(float(expected), rel=1e-3)


def test_second_derivatives():
    a, b = densities(4, 3, zeros=False)

    def divergence(a, b):
        return otloss.sinkhorn_divergence_grid(a, b, 2.0, unbalanced=5.0, tol=1e-13)

    given = [t.clone().requires_grad_() for t in (a, b)]
    assert torch.autograd.gradgradcheck(divergence, given, atol=1e-4)


@pytest.mark.parametrize("zeros", [False, True])
def test_second_derivatives_that_are_missing_say_so(zeros):
    """torch.autograd.grad, too, which does not visit a branch that has no way to its inputs."""
    a, b = densities(4, 3, zeros=zeros)
    a.requires_grad_()

    def once(value):
        return torch.autograd.grad(value.sum(), a, create_graph=True)[0].square().sum()

    result = otloss.solve_grid(a, b, 2.0, tol=1e-10)
    torch.autograd.grad(once(result.value), a, retain_graph=True)
    for value in (result.value_linear, result.potentials[0].square()):
        with pytest.raises(NotImplementedError, match="second derivative of a grid"):
            torch.autograd.grad(once(value), a)


@pytest.mark.parametrize("eps", [1e-3, 0.5, 300.0])
def test_means_are_those_of_the_reference(eps):
    """Also where all products of exponentials underflow."""
    generator = torch.manual_seed(1)
    axes = [torch.rand(n, n, dtype=torch.float64, generator=generator) * n for n in (33, 17)]
    v = 400 * torch.randn(2, 33 * 17, dtype=torch.float64, generator=generator)
    v[0, :20] = -math.inf
    u = torch.randn(2, 3, 33 * 17, dtype=torch.float64, generator=generator)
    arguments = axes, torch.tensor(eps, dtype=torch.float64), v, u
    for found, expected in zip(
        ops.grid_means(*arguments), reference.grid_means(*arguments), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.skipif(not EMULATED, reason="no compiler")
@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 4, 6)])
def test_emulated_kernel(shape):
    """Means, a solve over them and the system of its gradient, against plain torch."""
    a, b = (w.flatten(1) for w in densities(*shape))
    axes = [torch.rand(n, n, dtype=torch.float64) * n for n in shape]  # not symmetric
    half, tight, v = ops.number(0.5), ops.number(1e-9), 9 * torch.randn_like(a)
    v[0, 0] = -math.inf
    u = torch.randn(2, 3, a.shape[1], dtype=torch.float64)
    given = axes, [], [a, b], [0, 1], half, None, [], tight, 1000
    means = reference.grid_means(axes, half, v, u)
    solved = reference.grid_solve(*given)
    with serving(emulated()):
        torch.testing.assert_close(ops.grid_means(axes, half, v, u), means, rtol=1e-9, atol=1e-9)
        of_kernel = reference.solve(ops.grid_means, *given)
    torch.testing.assert_close(of_kernel[1:], solved[1:], rtol=1e-6, atol=1e-7)


def test_reference_takes_the_sweeps_of_the_kernels():
    a, b = densities(9, 8)
    results = [
        otloss.solve_grid(a, b, 3.0, spacing=(0.5, 2.0), tol=1e-6, method=method)
        for method in ("auto", "reference")
    ]
    assert torch.equal(results[0].n_iters, results[1].n_iters)
    assert relative(results[0].potentials[1], results[1].potentials[1]) < 1e-8


def test_periodic_and_given_costs():
    a, b = densities(6, 7, zeros=False)
    i = torch.arange(6)
    around = (i[:, None] - i).abs()
    around = torch.minimum(around, 6 - around).double().square()
    straight = (torch.arange(7)[:, None] - torch.arange(7)).double().square()
    S = otloss.sinkhorn_divergence_grid(a, b, 1.0, periodic=(True, False))
    given = otloss.sinkhorn_divergence_grid(a, b, 1.0, cost=[around, straight])
    torch.testing.assert_close(S, given, rtol=1e-5, atol=0)
    one_way = torch.rand(7, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cost\[1\] must be symmetric"):
        otloss.sinkhorn_divergence_grid(a, b, 1.0, cost=[around, one_way])


def test_single_precision():
    a, b = densities(8, 8, dtype=torch.float32)
    S = otloss.sinkhorn_divergence_grid(a, b, 2.0)
    assert S.dtype == torch.float32
    assert bool((S > 0).all())
    same = otloss.sinkhorn_divergence_grid(a, a.clone(), 2.0)
    assert bool((same.abs() < 1e-6 * S).all())
    assert bool((same >= 0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.rand(4)}, r"a must have shape \(B, N\)"),
        ({"b": torch.ones(1, 4, 5) / 10}, "total mass"),
        (
            {"a": torch.eye(4) / 4, "b": torch.ones(4, 4) / 16 + torch.eye(4)},
            r"one image is \(1, H, W\)",
        ),
        ({"b": torch.ones(1, 5, 4)}, "b must have shape"),
        ({"a": torch.zeros(1, 4, 5)}, "positive total"),
        ({"spacing": (1.0, 1.0, 1.0)}, "one per axis"),
        ({"cost": "euclidean"}, "cost must be 'sqeuclidean'"),
        ({"cost": [torch.rand(4, 4)]}, "one per axis"),
        ({"method": "dense"}, "method must be"),
        ({"init": [torch.full((1, 4, 5), math.nan)] * 2}, "init f must be finite.*20 of 20"),
    ],
)
def test_wrong_calls_say_what_is_wrong(change, message):
    arguments = {"a": torch.ones(1, 4, 5) / 20, "b": torch.ones(1, 4, 5) / 20, "eps": 1.0}
    with pytest.raises(ValueError, match=message):
        otloss.solve_grid(**(arguments | change))


@pytest.mark.parametrize("unbalanced", [None, (10.0, None), 20.0])
@pytest.mark.parametrize("n_iters", [None, 3])
def test_transport_agrees_with_the_dense_solver(unbalanced, n_iters):
    a, b = densities(7, 6)
    b, x = b * (1.3 if unbalanced else 1.0), points(7, 6)
    options = {"unbalanced": unbalanced, "n_iters": n_iters, "objective": "transport"}
    options |= {"tol": 1e-9, "max_iters": 5000}
    grid = [w.clone().requires_grad_() for w in (a, b)]
    dense = [w.flatten(1).clone().requires_grad_() for w in (a, b)]
    weights = {"a": dense[0], "b": dense[1]}
    for found, right in (
        (otloss.sinkhorn_divergence_grid(*grid, 1.5, **options),
         otloss.sinkhorn_divergence(x, x, 1.5, **weights, **options)),
        (otloss.solve_grid(*grid, 1.5, **options).value,
         otloss.solve_sample(x, x, 1.5, **weights, **options).value),
    ):  # fmt: skip
        assert relative(found, right) < 1e-6
        of_grid = torch.autograd.grad(found.sum(), grid)
        for one, other in zip(of_grid, torch.autograd.grad(right.sum(), dense), strict=True):
            assert relative(one, other) < 1e-4


@pytest.mark.parametrize("unbalanced", [None, (5.0, None), 20.0])
def test_eps_has_a_gradient(unbalanced):
    a, b = densities(6, 5)
    a, b = 2 * a, b * (2.6 if unbalanced else 2.0)
    options = {"unbalanced": unbalanced, "tol": 1e-11, "max_iters": 5000}
    eps = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    for function in (
        lambda eps: otloss.sinkhorn_divergence_grid(a, b, eps, **options).sum(),
        lambda eps: otloss.solve_grid(a, b, eps, **options).value.sum(),
    ):
        assert torch.autograd.gradcheck(function, eps, atol=1e-5)
    result = otloss.solve_grid(a, b, eps, **options)
    with pytest.raises(NotImplementedError, match="detach eps"):
        result.potentials[0].sum().backward()
    with pytest.raises(NotImplementedError, match="detach eps"):
        otloss.solve_grid(a, b, eps, n_iters=3, **options)
    with pytest.raises(ValueError, match="eps must be a number or"):
        otloss.solve_grid(a, b, torch.ones(2), **options)


COMPILED = {
    "divergence": lambda a, b: otloss.sinkhorn_divergence_grid(a, b, 2.0, unbalanced=9.0),
    "transport": lambda a, b: otloss.solve_grid(a, b, 2.0, objective="transport").value,
    "map": lambda a, b: otloss.solve_grid(a, b, 2.0).barycentric_map().square(),
    "iterations": lambda a, b: otloss.sinkhorn_divergence_grid(a, b, 2.0, n_iters=3),
}


SLOW = [pytest.param(k, marks=pytest.mark.slow) for k in ("map", "iterations")]


@pytest.mark.parametrize("quantity", ["divergence", "transport", *SLOW])
def test_compiles_without_a_break(quantity):
    given = [w.requires_grad_() for w in densities(5, 4)]

    def of(a, b):
        return COMPILED[quantity](a, b).sum()

    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(of(*given), given)
    for found, right in zip(torch.autograd.grad(compiled(*given), given), expected, strict=True):
        torch.testing.assert_close(found, right)


def test_linear_system_is_reported(monkeypatch):
    a, b = (w.requires_grad_() for w in densities(6, 5))
    result = otloss.solve_grid(a, b, 2.0)
    assert result.linear_system is None
    result.value_linear.sum().backward()
    iterations, residual = result.linear_system
    assert bool((iterations > 0).all())
    assert bool((residual < 1e-8).all())
    monkeypatch.setattr(reference, "MOST_STEPS", 2)
    result = otloss.solve_grid(a, b, 2.0)
    with pytest.warns(otloss.ConvergenceWarning, match="linear system"):
        result.value_linear.sum().backward()


@pytest.mark.parametrize("shape", [(2, 1), (2, 1, 1)])
def test_one_point(shape):
    """Nothing moves, in no direction."""
    a = torch.rand(shape, dtype=torch.float64) + 1
    result = otloss.solve_grid(a, 2 * a, 0.5, unbalanced=1.0, objective="transport")
    assert not result.value.any()
    assert not result.value_linear.any()
    assert not result.barycentric_map().any()
