"""Partial transport against the enlarged problem of the oracle, POT's linear program and finite
differences."""

import oracle
import pytest
import torch
from helpers import rand, randn

import otloss
from otloss.reference import marginals
from otloss.reference.solver import fixed_iterations

BALANCED = marginals.marginals_of(float("inf"), float("inf"), 0, 1)
EPS, TIGHT = 0.3, {"tol": 1e-11, "max_iters": 5000}


@pytest.fixture
def clouds(rng):
    x, y = randn(rng, 7, 2), 1 + randn(rng, 9, 2)
    a, b = rand(rng, 7) + 0.1, rand(rng, 9) + 0.1
    return x, y, a / a.sum(), 1.3 * b / b.sum()


def by_points(x, y, a, b, mass, cost="sqeuclidean", **options):
    return otloss.solve_sample(x, y, EPS, a=a, b=b, mass=mass, cost=cost, **(TIGHT | options))


def by_matrix(x, y, a, b, mass, cost="sqeuclidean", **options):
    C = otloss.cost_matrix(x, y, cost)
    return otloss.solve(C, EPS, a=a, b=b, mass=mass, **(TIGHT | options))


WAYS = {
    "points": by_points,
    "matrix": by_matrix,
    "streamed": lambda *given, **o: by_points(*given, method="streamed", **o),
    "reference": lambda *given, **o: by_points(*given, method="reference", **o),
}


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("objective", ["regularized", "transport"])
@pytest.mark.parametrize("backward", ["envelope", "implicit"])
def test_agrees_with_the_oracle(clouds, way, cost, objective, backward):
    mass = torch.tensor(0.6, dtype=torch.float64)
    x, y, a, b, m = given = leaves(*clouds, mass)
    result = WAYS[way](*given, cost, objective=objective, backward=backward)
    found = torch.autograd.grad(result.value, given, allow_unused=True, materialize_grads=True)
    C = oracle.cost(x, y, cost)
    larger = oracle.enlarged(C, a, b, m)
    expected = oracle.term(*larger, EPS, objective, backward)
    torch.testing.assert_close(result.value, expected.value, rtol=1e-7, atol=1e-9)
    for one, right in zip(found, expected.grads(*given), strict=True):
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-6)
    P = oracle.solve(*larger, EPS).P[:-1, :-1]
    torch.testing.assert_close(result.plan, P, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(result.value_linear, (P * C).sum(), rtol=1e-6, atol=1e-9)
    assert result.converged
    assert result.duality_gap < 1e-8


@pytest.mark.parametrize("way", ["points", "matrix", "streamed"])
def test_small_eps_is_the_linear_program(clouds, way):
    ot = pytest.importorskip("ot")
    x, y, a, b = clouds
    C = oracle.cost(x, y, "sqeuclidean")
    for mass in (0.2, 0.7, 0.95):
        exact = ot.partial.partial_wasserstein2(a.numpy(), b.numpy(), C.numpy(), m=mass)
        options = {"a": a, "b": b, "mass": mass, "tol": 1e-5, "max_iters": 20000}
        eps = 1e-3 * float(exact)
        if way == "matrix":
            result = otloss.solve(C, eps, **options)
        else:
            method = "auto" if way == "points" else way
            result = otloss.solve_sample(x, y, eps, method=method, **options)
        assert float(result.value_linear) == pytest.approx(float(exact), rel=0.01)
        assert float(result.plan.sum()) == pytest.approx(mass, rel=1e-3)
        assert bool((result.marginals[0] <= a + 1e-4).all())
        assert bool((result.marginals[1] <= b + 1e-4).all())


@pytest.mark.parametrize("way", ["points", "matrix", "streamed", "reference"])
def test_little_mass_is_not_lost_in_the_tolerance(clouds, way):
    result = WAYS[way](*clouds, 1e-4, tol=1e-3)
    assert result.converged
    assert result.marginal_error <= 1e-3
    assert float(result.plan.sum()) == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("way", ["points", "matrix", "streamed", "reference"])
def test_errors_are_over_the_mass_that_moves(clouds, way):
    """Those of a warning and of the last status too, which are of before the last update."""
    with pytest.warns(otloss.ConvergenceWarning, match=r"above tol=1e-11\.") as warned:
        result = WAYS[way](*clouds, 1e-3, max_iters=3)
    status = otloss.last_status()
    assert not status.converged
    assert 0.5 * status.marginal_error <= result.marginal_error <= status.marginal_error
    assert f"{status.marginal_error:.2e}" in str(warned[0].message)


def test_the_whole_mass_is_balanced_transport(clouds):
    x, y, a, b = clouds
    b = (b / b.sum()).requires_grad_()
    part, whole = by_points(x, y, a, b, 1.0), otloss.solve_sample(x, y, EPS, a=a, b=b, **TIGHT)
    torch.testing.assert_close(part.value, whole.value)
    torch.testing.assert_close(part.plan, whole.plan, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("way", ["points", "matrix", "streamed"])
@pytest.mark.parametrize("quantity", ["plan", "potentials", "barycentric_map", "marginals"])
@pytest.mark.parametrize("n_iters", [None, 4])
def test_gradients_of_results_are_those_of_finite_differences(clouds, way, quantity, n_iters):
    if (way, quantity) == ("matrix", "barycentric_map"):
        pytest.skip("a matrix has no points")

    def of(x, a, mass):
        result = WAYS[way](x, clouds[1], a, clouds[3], mass, n_iters=n_iters)
        found = getattr(result, quantity)
        found = found() if callable(found) else found
        if quantity == "potentials":  # balanced ones are free up to a constant
            return found[0][:, None] + found[1]
        return found[1] if isinstance(found, tuple) else found

    given = leaves(clouds[0], clouds[2], torch.tensor(0.6, dtype=torch.float64))
    torch.autograd.gradcheck(of, given, atol=1e-5, rtol=1e-3, nondet_tol=1e-12)


@pytest.mark.parametrize("way", ["points", "matrix", "streamed", "reference"])
@pytest.mark.parametrize("objective", ["regularized", "transport"])
def test_iterations_are_differentiated_exactly(clouds, way, objective):
    """Three iterations, through autograd of plain torch on the enlarged matrix."""
    mass = torch.tensor(0.6, dtype=torch.float64)
    x, y, a, b, m = given = leaves(*clouds, mass)
    result = WAYS[way](*given, objective=objective, n_iters=3)
    C, *weights = oracle.enlarged(oracle.cost(x, y, "sqeuclidean"), a, b, m)
    f, g = fixed_iterations(
        C[None], *(w[None] for w in weights), torch.zeros(1, 10).to(C), EPS, 3, BALANCED
    )[:2]
    number = ["regularized", "transport"].index(objective)
    of_weights = [w[None] for w in weights]
    expected = marginals.value(EPS, C[None], f, g, *of_weights, number, BALANCED)[0]
    torch.testing.assert_close(result.value, expected, rtol=1e-10, atol=1e-12)
    for one, right in zip(
        torch.autograd.grad(result.value, given), torch.autograd.grad(expected, given), strict=True
    ):
        torch.testing.assert_close(one, right, rtol=1e-8, atol=1e-10)


def test_second_derivatives(clouds):
    def value(x, mass):
        return by_points(x, clouds[1], clouds[2], clouds[3], mass, tol=1e-13).value

    given = leaves(clouds[0], torch.tensor(0.6, dtype=torch.float64))
    assert torch.autograd.gradgradcheck(value, given, atol=1e-4)


@pytest.mark.parametrize("method", ["dense", "streamed"])
@pytest.mark.parametrize("objective", ["regularized", "transport"])
def test_a_batch_is_its_problems(rng, method, objective):
    """Of clouds and masses that differ, padded with points that hold anything."""
    x, y, a = randn(rng, 3, 21, 3), randn(rng, 3, 18, 3), rand(rng, 3, 21) + 0.1
    x[1, 15:], a[1, 15:] = torch.nan, 0
    mass = a.sum(-1) * torch.tensor([0.3, 0.6, 0.8]).to(a)
    b = 1.1 * a.sum(-1, True) / 18 * torch.ones(3, 18).to(a)
    eps = torch.tensor([0.2, 0.3, 0.5]).to(a)
    options = TIGHT | {"method": method, "objective": objective}
    x, y, mass = leaves(x, y, mass)
    together = otloss.solve_sample(x, y, eps, a=a, b=b, mass=mass, **options)
    found = torch.autograd.grad(together.value.sum(), (x, y, mass))
    for k, count in enumerate((21, 15, 21)):
        each = leaves(x[k, :count].detach(), y[k].detach(), mass[k].detach())
        alone = otloss.solve_sample(
            *each[:2], float(eps[k]), a=a[k, :count], b=b[k], mass=each[2], **options
        )
        torch.testing.assert_close(together.value[k], alone.value)
        torch.testing.assert_close(together.plan[k, :count], alone.plan, rtol=1e-6, atol=1e-9)
        for one, right in zip(found, torch.autograd.grad(alone.value, each), strict=True):
            of_problem = one[k, :count] if one is found[0] else one[k]
            torch.testing.assert_close(of_problem, right, rtol=1e-6, atol=1e-9)
    assert bool((found[0][1, 15:] == 0).all())


def test_batches_and_padding(clouds):
    """Two problems at once, one with points of weight 0 that hold anything."""
    x, y, a, b = clouds
    alone = [by_points(x, y, a, b, 0.5), by_points(x[:4], y, a[:4], b, 0.2)]
    xs, weights = torch.stack([x, x]), torch.stack([a, a])
    xs[1, 4:], weights[1, 4:] = torch.nan, 0
    mass = torch.tensor([0.5, 0.2], dtype=torch.float64)
    xs, weights, mass = leaves(xs, weights, mass)
    ys, bs = y.expand(2, -1, -1), b.expand(2, -1)
    together = by_points(xs, ys, weights, bs, mass)
    torch.testing.assert_close(together.value, torch.stack([r.value for r in alone]))
    torch.testing.assert_close(together.plan[1, :4], alone[1].plan, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(together.barycentric_map()[0], alone[0].barycentric_map())
    together.value.sum().backward()
    assert bool((xs.grad[1, 4:] == 0).all())
    assert bool((weights.grad[1, 4:] == 0).all())


@pytest.mark.parametrize("way", ["points", "matrix", "reference"])
@pytest.mark.parametrize("objective", ["regularized", "transport"])
@pytest.mark.parametrize("n_iters", [None, 20])
def test_empty_bins(clouds, way, objective, n_iters):
    """More weight where there is none also adds to what stays."""
    x, y, a, b = clouds
    a[2], b[4] = 0, 0
    more = [torch.zeros_like(w).index_fill_(0, torch.tensor(i), 1.0) for w, i in ((a, 2), (b, 4))]

    def at(s, t):
        weights = a + s * more[0], b + t * more[1]
        return WAYS[way](x, y, *weights, 0.5, objective=objective, n_iters=n_iters).value

    s, t = leaves(*torch.zeros(2, dtype=torch.float64))
    found = torch.autograd.grad(at(s, t), (s, t))
    h = 2e-5  # the difference is off by a third of h^2 f''', which a small empty bin makes large
    for k, one in enumerate(found):
        v = [float(at(*((n * h, 0.0) if k == 0 else (0.0, n * h)))) for n in range(3)]
        expected = (4 * v[1] - 3 * v[0] - v[2]) / (2 * h)
        assert float(one) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_starts_and_new_points(clouds):
    result = by_points(*clouds, 0.6)
    for start in (result, result.potentials):
        again = by_points(*clouds, 0.6, init=start)
        assert again.n_iters < result.n_iters
    f = result.extend(clouds[0])
    torch.testing.assert_close(f, result.potentials[0], rtol=1e-6, atol=1e-8)
    i, j = result.sample(50)
    assert bool((result.plan[i, j] > 0).all())


def test_negative_and_forbidden_costs(clouds):
    """A constant added to all costs adds itself times the mass."""
    x, y, a, b = clouds
    C = oracle.cost(x, y, "sqeuclidean")
    value = otloss.solve(C, EPS, a=a, b=b, mass=0.6, **TIGHT).value
    shifted = otloss.solve(C - 40, EPS, a=a, b=b, mass=0.6, **TIGHT).value
    torch.testing.assert_close(shifted, value - 40 * 0.6)
    for method in ("dense", "streamed"):
        found = by_points(
            x, y, a, b, 0.6, cost=lambda x, y: otloss.cost_matrix(x, y) - 40, method=method
        )
        torch.testing.assert_close(found.value, shifted)
    C[2] = torch.inf  # point 2 stays
    plan = otloss.solve(C, EPS, a=a, b=b, mass=0.6, **TIGHT).plan
    assert bool((plan[2] == 0).all())
    torch.testing.assert_close(plan.sum(), torch.tensor(0.6, dtype=torch.float64))


def test_single_precision(clouds):
    exact = by_points(*clouds, 0.6)
    found = by_points(*(t.float() for t in clouds), 0.6, tol=1e-5)
    torch.testing.assert_close(found.value, exact.value.float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.plan, exact.plan.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["dense", "streamed"])
def test_compiled(clouds, method):
    """Streamed with a mass that is given: a weight that may be 0 is not looked at."""

    def value(x, mass):
        mass = mass.detach() if method == "streamed" else mass
        given = TIGHT | {"a": clouds[2], "b": clouds[3], "mass": mass, "method": method}
        return otloss.solve_sample(x, clouds[1], EPS, **given).value

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    given = leaves(clouds[0], torch.tensor(0.6, dtype=torch.float64))
    unused = {"allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(value(*given), given, **unused)
    found = torch.autograd.grad(compiled(*given), given, **unused)
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mass": 2.0}, ValueError, "at most the totals"),
        ({"mass": 0.0}, ValueError, "mass must be finite and > 0"),
        ({"mass": torch.tensor(-1.0)}, ValueError, "mass must be positive"),
        ({"mass": torch.tensor(float("nan"))}, ValueError, "mass must be positive"),
        ({"mass": torch.ones(3)}, ValueError, r"mass must have shape \(\) or \(1,\)"),
        ({"mass": "all"}, TypeError, "mass must be a number"),
        ({"mass": 0.5, "unbalanced": 1.0}, ValueError, "mass= and unbalanced="),
        ({"mass": 0.5, "method": "multiscale"}, NotImplementedError, "mass= is not available"),
    ],
)
def test_wrong_calls_say_what_is_wrong(clouds, options, error, message):
    x, y, a, b = clouds
    with pytest.raises(error, match=message):
        otloss.solve_sample(x, y, EPS, a=a, b=b, **options)


def test_what_is_not_available_says_so(clouds):
    value = by_points(
        *leaves(*clouds), 0.5, cost=otloss.cost_matrix, method="streamed", objective="transport"
    ).value
    with pytest.raises(NotImplementedError, match='method="dense"'):
        value.backward()


def test_inside_torch_func_it_is_refused_by_name(rng):
    x, y = rand(rng, 3, 4, 2), rand(rng, 3, 5, 2)
    with pytest.raises(NotImplementedError, match=r"mass= is not available inside torch\.func"):
        torch.func.vmap(lambda x, y: otloss.solve_sample(x, y, 0.1, mass=0.5).value)(x, y)
