"""What a solve returns besides its value, and the losses as modules."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import oracle
import pytest
import torch
from backends import BACKENDS
from helpers import (
    COSTS,
    METHODS,
    STRENGTHS,
    Clouds,
    agree,
    clouds,
    make_weights,
    randn,
    rho,
    some_of,
    unequal,
)
from torch import Tensor
from torch.testing import assert_close

import otloss

TIGHT: dict[str, Any] = {"tol": 1e-10, "max_iters": 20_000}


@pytest.fixture
def c(rng: torch.Generator) -> Clouds:
    return clouds(rng, 7, 6, 3, weights="random")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cost", COSTS)
def test_everything_about_one_solve(cost, method, c, rng):
    result, C = c.solve(0.5, cost=cost, method=method, **TIGHT), oracle.cost(c.x, c.y, cost)
    truth, (f, g), P = oracle.solve(C, c.a, c.b, 0.5), result.potentials, result.plan
    assert (f.shape, g.shape) == ((7,), (6,))
    assert_close(P, truth.P, rtol=1e-6, atol=1e-9)
    assert_close(P, c.a[:, None] * c.b * ((f[:, None] + g - C) / 0.5).exp())
    assert_close(result.value, truth.value)
    assert_close(result.value, (c.a * f).sum() + (c.b * g).sum())
    assert_close(result.value_linear, truth.transport)
    assert_close(result.marginals, (P.sum(1), P.sum(0)))
    assert result.converged is True
    assert isinstance(result.n_iters, int)
    assert result.n_iters > 0
    assert repr(result).startswith("OTResult((7, 6), eps=0.5")
    assert result.explain() == f"{method} on cpu"
    v, w, new = randn(rng, 6), randn(rng, 6, 4), randn(rng, 4, 3)
    told = result.apply(v), result.apply(w), result.apply(c.x, axis=0), result.barycentric_map()
    assert_close(told, (P @ v, P @ w, P.T @ c.x, P @ c.y / c.a[:, None]))
    # f on the points themselves, and the formula elsewhere
    assert_close(result.extend(c.x), f, rtol=1e-7, atol=1e-8)
    assert_close(result.extend(new), oracle.softmin(oracle.cost(new, c.y, cost), g, c.b, 0.5))
    transport = c.solve(0.5, cost=cost, method=method, objective="transport", **TIGHT).value
    assert_close(transport, result.value_linear)
    assert transport < result.value


@some_of("backend, n_iters", BACKENDS, [1, 3, 10])
def test_marginal_error_is_the_plans(backend, n_iters, rng):
    """L1 distance of the plan's marginals to a and b, the larger of the two, over the mass."""
    c, total = clouds(rng, 9, 8, 2, weights="random").to(backend.device), 3.0
    c.a, c.b = total * c.a, total * c.b
    result = c.solve(0.1, n_iters=n_iters, method=backend.method)
    sides = zip((result.plan.sum(1), result.plan.sum(0)), (c.a, c.b), strict=True)
    error = max(float((got - w).abs().sum()) / total for got, w in sides)
    assert result.marginal_error == pytest.approx(error, rel=1e-9)
    assert result.marginal_error > 1e-6  # the columns are exact after g, the rows are not
    assert result.n_iters == n_iters
    # the parallel with the definition: L iterations from zero potentials
    C = oracle.cost(c.x, c.y, "sqeuclidean")
    assert_close(result.potentials, oracle.iterate(C, c.a, c.b, 0.1, n_iters)[-1])


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("method", METHODS)
def test_tol_is_kept(method, tol, c):
    """`converged` speaks of the plan that is returned."""
    result = c.solve(0.5, method=method, **{**TIGHT, "tol": tol})
    assert result.converged
    # The last column update is half a step beyond the potentials that were tested.
    assert result.marginal_error <= 1.5 * tol


@pytest.mark.parametrize("method", METHODS)
def test_marginal_error_leaves_the_plan_differentiable(method, rng):
    """Whatever is asked first."""
    c, gradients, v = clouds(rng, 9, 8, 2).require_grad(), [], randn(rng, 9, 8)
    for first in (False, True):
        result = c.solve(0.3, tol=1e-8, method=method)
        if first:
            assert isinstance(result.marginal_error, float)
        gradients.append(torch.autograd.grad((v * result.plan).sum(), c.x))
    assert bool(gradients[0][0].any())
    assert_close(*gradients)


@some_of("backend, strength", BACKENDS, STRENGTHS)
def test_unbalanced_results(backend, strength, rng):
    """What `marginal_error` and the maps mean where the plan need not have the marginals a, b."""
    c = unequal(clouds(rng, 9, 8, 2, weights="random"), 3.0).to(backend.device)
    rho_x, rho_y = rho(strength)
    for stop in ({"n_iters": 2}, {"tol": 1e-8}):
        result = c.solve(0.3, unbalanced=strength, method=backend.method, **stop)
        f, g = result.potentials
        targets = oracle.target_marginal(c.a, f, rho_x), oracle.target_marginal(c.b, g, rho_y)
        sides = zip(result.marginals, targets, strict=True)
        error = max(float((got - w).abs().sum() / w.sum()) for got, w in sides)
        assert result.marginal_error == pytest.approx(error, rel=1e-6, abs=1e-13)
    assert result.converged
    assert result.marginal_error <= 1e-8
    assert_close(result.extend(c.x), f, rtol=1e-6, atol=1e-7)
    image = result.plan @ c.y / result.plan.sum(1, keepdim=True)
    assert_close(result.barycentric_map(), image)


def test_outliers_are_not_transported(rng):
    """A few points far away keep their weight, and the map does not move the others for them."""
    x, y = randn(rng, 40, 2), randn(rng, 40, 2)
    y[:4] += 100
    result = otloss.solve_sample(x, y, 0.1, unbalanced=2.0)
    assert float(result.marginals[1][:4].sum()) < 1e-12
    clean = otloss.solve_sample(x, y[4:], 0.1, b=torch.full((36,), 1 / 40).double(), unbalanced=2.0)
    assert_close(result.barycentric_map(), clean.barycentric_map(), rtol=1e-2, atol=1e-2)


def test_unbalanced_warm_start(rng):
    c = unequal(clouds(rng, 30, 25, 2, weights="random"), 3.0)
    options = {"unbalanced": 5.0, "tol": 1e-8}
    cold = c.solve(0.1, **options)
    warm = c.solve(0.1, init=cold, **options)
    assert warm.n_iters < cold.n_iters
    assert_close(warm.value, cold.value)
    module = otloss.SinkhornDivergence(0.1, warm_start=True, **options)
    first = module(*c.inputs())
    assert_close(module(*c.inputs()), first, rtol=1e-6, atol=1e-9)
    assert_close(first, c.loss(0.1, **options), rtol=0, atol=0)


def test_barycentric_map(c):
    """It is where the gradient of the squared distance points: dOT/dx = 2 a (x - T(x))."""
    result = c.require_grad().solve(0.5, tol=1e-10)
    (grad,) = torch.autograd.grad(result.value, c.x)
    image = result.barycentric_map()
    assert_close(grad, 2 * c.a[:, None] * (c.x - image), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_plan_of_small_weights(method):
    """Of points whose weights have a product that underflows, alone or since all weights are
    small."""
    x = torch.tensor([[0.0], [5.0], [10.0]])
    w = torch.tensor([1.0, 1e-30, 1e-15])
    every = torch.full((3,), 1e-25)
    for a, mass in ((w, None), (every, None), (every, 2.9e-25)):
        result = otloss.solve_sample(x, x + 0.1, 0.1, a=a, b=a, mass=mass, method=method)
        assert_close(result.plan.diagonal() / a, torch.ones(3), rtol=0.2, atol=0)
        assert_close(result.marginals[0] / a, torch.ones(3), rtol=0.2, atol=0)
        assert result.argmax().tolist() == [0, 1, 2]
        assert_close(result.barycentric_map(), x + 0.1, rtol=1e-3, atol=0)
        assert_close(result.value_linear / result.plan.sum(), torch.tensor(0.01), rtol=1e-3, atol=0)
        assert result.marginal_error <= 1e-3


@pytest.mark.parametrize("how", [{"unbalanced": 0.5}, {"unbalanced": (0.5, None)}, {"mass": 0.5}])
@pytest.mark.parametrize("method", [*METHODS, "multiscale"])
def test_barycentric_map_of_points_that_move_next_to_nothing(method, how, rng):
    """Less than single precision holds, in part or all of it."""
    if "mass" in how and method == "multiscale":
        pytest.skip("not of partial transport")
    x, y = torch.rand(40, 2, generator=rng), torch.rand(30, 2, generator=rng)
    size, eps = (4, 0.05) if "mass" in how else (12, 0.2)
    for far in (1.0, torch.linspace(0, 1, 40)[:, None]):
        c = Clouds(x + size * far, y, None, None).require_grad()
        result = c.solve(eps, method=method, **how)
        f, g = (v.double() for v in result.potentials)
        fine = c.double()
        C = oracle.cost(fine.x, fine.y, "sqeuclidean")
        shares = ((f[:, None] + g - C) / eps).softmax(1)
        with torch.no_grad():
            assert_close(result.barycentric_map().double(), shares @ fine.y, rtol=0, atol=1e-4)
    (got,) = torch.autograd.grad(result.barycentric_map().square().sum(), c.x)
    fine.require_grad()
    right = fine.solve(eps, method="dense", tol=1e-8, **how).barycentric_map()
    (right,) = torch.autograd.grad(right.square().sum(), fine.x)
    assert float((got - right).norm()) <= 0.03 * float(right.norm())


def test_barycentric_map_of_padding_is_zero(c):
    c.a[2] = 0
    c.a /= c.a.sum()
    image = c.solve(0.5).barycentric_map()
    assert not image[2].any()
    assert bool(image.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_warm_start(method, rng):
    """From the solution nothing is left to do; the answer does not depend on the start."""
    c, options = clouds(rng, 40, 30, 3), {"tol": 1e-7, "max_iters": 50_000, "method": method}
    cold = c.solve(0.1, **options)
    for init in (cold, cold.potentials):
        warm = c.solve(0.1, init=init, **options)
        assert warm.n_iters < cold.n_iters
        assert_close(warm.plan, cold.plan, rtol=1e-3, atol=1e-8)
    agree(c.solve(0.1, init=(randn(rng, 40), randn(rng, 30)), **options), cold)
    c.x = c.x + 0.001 * randn(rng, 40, 3)
    assert c.solve(0.1, init=cold, **options).n_iters <= cold.n_iters


def test_nothing_given_is_changed(rng):
    """Neither a start nor an input."""
    c = clouds(rng, 7, 6, 3, weights="padded")
    result = c.solve(0.3)
    before = c.double(), [v.clone() for v in result.potentials]
    c.require_grad().loss(0.5).backward()
    Clouds(c.x + 1, c.y, c.a, c.b).solve(0.3, init=result)
    assert all(map(torch.equal, c.inputs(), before[0].inputs()))
    assert all(map(torch.equal, result.potentials, before[1]))


def test_genevays_convention(c):
    """2 W(a, b) - W(a, a) - W(b, b) is twice the divergence with the transport objective."""
    pairs = c, Clouds(c.x, c.x, c.a, c.a), Clouds(c.y, c.y, c.b, c.b)
    across, *own = (pair.solve(0.5, tol=1e-10).value_linear for pair in pairs)
    ours = c.loss(0.5, objective="transport", tol=1e-10)
    assert_close(2 * ours, 2 * across - sum(own), rtol=1e-7, atol=1e-9)


@some_of(
    "backend, objective, debiased, strength",
    BACKENDS, ["regularized", "transport"], [True, False], [None, *STRENGTHS], whole=3,
)  # fmt: skip
def test_fixed_iterations(backend, objective, debiased, strength, c):
    """n_iters: exactly that number, in all three problems, also of a cloud against itself."""
    c = unequal(c, 0.4, strength).to(backend.device)
    for count in (1, 2, 7):
        options = {"n_iters": count, "objective": objective, "debiased": debiased}
        got = c.loss(0.3, unbalanced=strength, method=backend.method, **options)
        pair = None if strength is None else rho(strength)
        truth = oracle.loss(c.x, c.y, 0.3, c.a, c.b, rho=pair, **options)
        assert_close(got, truth.value, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------- changes in place

ON_DEMAND = {
    "plan": lambda r: r.plan,
    "value_linear": lambda r: r.value_linear,
    "marginals": lambda r: r.marginals,
    "marginal_error": lambda r: r.marginal_error,
    "duality_gap": lambda r: r.duality_gap,
    "apply": lambda r: r.apply(torch.ones(6).double()),
    "barycentric_map": lambda r: r.barycentric_map(),
    "extend": lambda r: r.extend(torch.zeros(2, 3).double()),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantity", ON_DEMAND)
def test_a_change_in_place_after_the_solve_is_noticed(quantity, method, c):
    """What is computed later would be of other points than the potentials."""
    for changed in ("x", "y", "a", "b"):
        result = c.solve(0.5, method=method, **TIGHT)
        getattr(c, changed).mul_(1.0)
        with pytest.raises(RuntimeError, match=rf"^{changed} was changed in place after the solve"):
            ON_DEMAND[quantity](result)
        assert result.converged
        assert bool(result.value.isfinite())
    result = c.solve(0.5, method=method, **TIGHT)
    result.potentials[0].mul_(1.0)
    with pytest.raises(RuntimeError, match=r"^potential f was changed in place"):
        ON_DEMAND[quantity](result)
    ON_DEMAND[quantity](c.solve(0.5, method=method, **TIGHT))  # not changed


@pytest.mark.parametrize("empty", [False, True], ids=["", "empty bin"])
@pytest.mark.parametrize(
    ("method", "mass"), [*((method, None) for method in METHODS), ("dense", 0.5)]
)
def test_reading_without_gradients_takes_none_away(method, mass, empty, c):
    """What a result keeps of its first reading serves later ones, which may want a gradient."""
    if empty:
        c.a = torch.cat([c.a[:1] * 0, c.a[1:] / c.a[1:].sum()])

    def gradients(look: Any = None) -> tuple[Tensor, ...]:
        given = [t.detach().clone().requires_grad_() for t in (c.x, c.y, c.a)]
        x, y, a = given
        result = otloss.solve_sample(x, y, 0.5, a=a, b=c.b, mass=mass, method=method, **TIGHT)
        if look:
            with look():
                result.value_linear, result.plan, result.argmax()
        read = result.plan.square().sum() + result.value_linear + result.apply(y).square().sum()
        return torch.autograd.grad(read, given)

    for look in (torch.no_grad, torch.inference_mode):
        assert_close(gradients(look), gradients())


@pytest.mark.parametrize("quantity", ["value_linear", "apply", "extend"])
def test_a_change_in_place_before_the_gradient_is_noticed(quantity, c):
    c.x.requires_grad_()
    found = ON_DEMAND[quantity](c.solve(0.5, method="streamed"))
    with torch.no_grad():
        c.y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()


def test_an_optimiser_step_on_a_cost_matrix_is_noticed(rng):
    C = randn(rng, 5, 4).requires_grad_()
    result = otloss.solve(C, 0.5)
    before = result.plan.detach().clone()
    result.value.backward()
    torch.optim.SGD([C], lr=0.1).step()
    assert torch.equal(result.plan, before)  # it has been made already
    with pytest.raises(RuntimeError, match=r"^C was changed in place"):
        result.value_linear  # noqa: B018


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_a_copied_result_knows_what_was_changed(copied, rng):
    x, y = randn(rng, 5, 3).add_(0), randn(rng, 4, 3)  # x has been changed before the solve
    result = otloss.solve_sample(x, y, 0.5)
    assert_close(copied(result).plan, otloss.solve_sample(x, y, 0.5).plan)
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"^x was changed in place after the solve"):
        copied(result).plan  # noqa: B018


def test_results_in_inference_mode(rng):
    """Whose tensors do not count their changes."""
    c = clouds(rng, 5, 4, 2)
    with torch.inference_mode():
        result = c.solve(0.5)
        assert result.duality_gap < 1e-2
        assert result.plan.shape == (5, 4)
    c.require_grad().solve(0.5, init=result).value.backward()  # a start of training


# ------------------------------------------------------------------------------------- status


def test_last_status(rng):
    """Of the worst problem of the last call."""
    c = clouds(rng, 30, 25, 2)
    result, status = c.solve(0.05), otloss.last_status()
    assert status.converged is True
    assert status.n_iters == result.n_iters
    assert 0 <= status.marginal_error <= 1e-3
    easy = Clouds(torch.stack([c.x, 0 * c.x]), torch.stack([c.y, 0 * c.y]), None, None)
    for hard in (c, easy):
        with pytest.warns(otloss.ConvergenceWarning):
            hard.loss(0.01, tol=1e-9, max_iters=2)
        status = otloss.last_status()
        assert status.converged is False
        assert status.n_iters == 2
        assert status.marginal_error > 1e-9
    easy.loss(0.5, cost=torch.cdist, debiased=False)
    assert otloss.last_status().converged is True


@pytest.mark.parametrize("status", ["converged", "n_iters"])
def test_a_status_that_was_not_read_warns_when_it_is(status, rng, monkeypatch):
    """As on CUDA, where a solve does not wait to see whether it converged."""
    c = clouds(rng, 30, 25, 2)
    monkeypatch.setattr(otloss._check, "readable", lambda t: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result, fixed = c.solve(0.01, tol=1e-9, max_iters=2), c.solve(0.01, tol=1e-9, n_iters=2)
        assert not fixed.converged
        assert not otloss.last_status().converged
    with pytest.warns(otloss.ConvergenceWarning, match="stopped after 2 iter") as caught:
        getattr(result, status)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert result.n_iters == 2
        assert result.converged is False


# ------------------------------------------------------------------------------------ modules


def test_modules_are_the_functions(c, rng):
    x2, y2 = randn(rng, 5, 3), randn(rng, 4, 3)
    four, euclidean = (c.x, x2, c.y, y2), {"cost": "euclidean"}
    for module, function in (
        (otloss.SinkhornDivergence(0.5, **euclidean)(*c.inputs()), c.loss(0.5, **euclidean)),
        (otloss.SinkhornLoss(0.5)(*c.inputs()), c.loss(0.5, debiased=False)),
        (otloss.MinibatchEnergyDistance(0.5)(*four), otloss.minibatch_energy_distance(*four, 0.5)),
        (otloss.EnergyDistance()(*c.inputs()), c.energy()),
    ):
        assert_close(module, function, rtol=0, atol=0)


def test_modules_print_their_configuration():
    assert repr(otloss.SinkhornDivergence(0.5, cost="cosine")).count("cost='cosine'") == 1
    assert "eps=0.5" in repr(otloss.SinkhornLoss(0.5))
    assert "cost='euclidean'" in repr(otloss.EnergyDistance())


def test_modules_copy_and_hold_no_parameters(c):
    module = otloss.SinkhornDivergence(0.5, tol=1e-4)
    assert not list(module.parameters())
    assert torch.equal(copy.deepcopy(module)(c.x, c.y), module(c.x, c.y))


def test_warm_start_changes_the_work_and_not_the_result(rng):
    """The second call of a slow flow starts where the first ended."""
    c, options = clouds(rng, 30, 25, 2), {"tol": 1e-8, "max_iters": 20_000}
    module = otloss.SinkhornDivergence(0.05, warm_start=True, **options)
    module(c.x, c.y)
    short = otloss.SinkhornDivergence(0.05, warm_start=True, **{**options, "max_iters": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otloss.ConvergenceWarning)
        for _ in range(300):  # 3 passes a call get there in the end
            last = short(c.x, c.y)
    expected = c.loss(0.05, **options)
    assert_close(module(c.x, c.y), expected, rtol=1e-6, atol=1e-8)
    assert_close(last, expected, rtol=1e-3, atol=1e-6)
    assert module(c.x[:7], c.y).isfinite()  # other shapes start anew


def test_a_warm_start_outlives_inference_mode(c):
    """A validation step leaves nothing that a training step cannot be differentiated with."""
    module, x = otloss.SinkhornDivergence(0.5, warm_start=True), c.x.requires_grad_()
    with torch.inference_mode():
        module(x, c.y)
    module(x, c.y).backward()
    assert bool(x.grad.isfinite().all())


def test_a_warm_start_forgets_what_is_not_finite(rng, monkeypatch):
    """On CUDA data is not read, and a step with NaN in it raises nothing."""
    monkeypatch.setattr(otloss._check, "readable", lambda t: False)
    c = clouds(rng, 40, 30, 3, batch=2)
    module, bad = otloss.SinkhornDivergence(0.1, warm_start=True, tol=1e-6), c.x.clone()
    expected, bad[0] = module(c.x, c.y), torch.nan
    assert module(bad, c.y).isnan().tolist() == [True, False]
    assert_close(module(c.x, c.y), expected, rtol=1e-4, atol=1e-6)


def test_warm_start_and_fixed_iterations_exclude_each_other():
    with pytest.raises(ValueError, match="warm_start must be False with n_iters"):
        otloss.SinkhornDivergence(0.5, warm_start=True, n_iters=3)


def test_show_config(capsys):
    assert otloss.show_config() is None
    printed = capsys.readouterr().out
    config = otloss.show_config(mode="dicts")
    assert all(key in printed and str(value) in printed for key, value in config.items())
    assert (config["otloss"], config["torch"]) == (otloss.__version__, torch.__version__)


def test_weights_can_be_learned(rng):
    """Weights of a model through a softmax: descent on the loss ends near those of the target."""
    points, target = randn(rng, 5, 2), make_weights(rng, (5,), "random")
    logits, losses = torch.zeros(5, dtype=torch.float64, requires_grad=True), list[Tensor]()
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(100):
        optimiser.zero_grad()
        c = Clouds(points, points.clone(), logits.softmax(0), target)
        losses.append(c.loss(1.0, tol=1e-5))
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] <= 0.05 * losses[0]
