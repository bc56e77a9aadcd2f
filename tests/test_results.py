"""What a solve returns besides its value, and the losses as modules."""

from __future__ import annotations

import copy
import warnings

import oracle
import pytest
import torch
from backends import BACKENDS
from helpers import (
    COSTS,
    METHODS,
    STRENGTHS,
    agree,
    clouds,
    make_weights,
    randn,
    rho,
    some_of,
    unequal,
)
from torch import Tensor

import otloss


def solved(rng: torch.Generator, method: str = "dense", **options: object):
    """(clouds, result) of a weighted problem."""
    c = clouds(rng, 7, 6, 3, weights="random")
    options = {"tol": 1e-10, "max_iters": 20_000, **options}
    return c, otloss.solve_sample(c.x, c.y, 0.5, a=c.a, b=c.b, method=method, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cost", COSTS)
def test_everything_about_one_solve(cost, method, rng):
    c, result = solved(rng, method, cost=cost)
    C = oracle.cost(c.x, c.y, cost)
    truth = oracle.solve(C, c.a, c.b, 0.5)
    f, g = result.potentials
    assert f.shape == (7,)
    assert g.shape == (6,)
    torch.testing.assert_close(result.plan, truth.P, rtol=1e-6, atol=1e-9)
    formula = c.a[:, None] * c.b * ((f[:, None] + g - C) / 0.5).exp()
    torch.testing.assert_close(result.plan, formula)
    torch.testing.assert_close(result.value, truth.value)
    torch.testing.assert_close(result.value, (c.a * f).sum() + (c.b * g).sum())
    torch.testing.assert_close(result.value_linear, truth.transport)
    torch.testing.assert_close(result.marginals[0], result.plan.sum(1))
    torch.testing.assert_close(result.marginals[1], result.plan.sum(0))
    assert result.converged is True
    assert isinstance(result.n_iters, int)
    assert result.n_iters > 0
    assert repr(result).startswith("OTResult((7, 6), eps=0.5")


@some_of("backend, n_iters", BACKENDS, [1, 3, 10])
def test_marginal_error_is_the_plans(backend, n_iters, rng):
    """L1 distance of the plan's marginals to a and b, the larger of the two, over the mass."""
    c, total = clouds(rng, 9, 8, 2, weights="random").to(backend.device), 3.0
    a, b, options = total * c.a, total * c.b, {"n_iters": n_iters, "method": backend.method}
    result = otloss.solve_sample(c.x, c.y, 0.1, a=a, b=b, **options)
    rows = float((result.plan.sum(1) - a).abs().sum()) / total
    columns = float((result.plan.sum(0) - b).abs().sum()) / total
    assert result.marginal_error == pytest.approx(max(rows, columns), rel=1e-9)
    assert result.marginal_error > 1e-6  # the columns are exact after g, the rows are not
    assert result.n_iters == n_iters
    # the parallel with the definition: L iterations from zero potentials
    f, g = oracle.iterate(oracle.cost(c.x, c.y, "sqeuclidean"), a, b, 0.1, n_iters)[-1]
    torch.testing.assert_close(result.potentials[0], f)
    torch.testing.assert_close(result.potentials[1], g)


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("method", METHODS)
def test_tol_is_kept(method, tol, rng):
    """`converged` speaks of the plan that is returned."""
    _, result = solved(rng, method, tol=tol)
    assert result.converged
    # The last column update is half a step beyond the potentials that were tested.
    assert result.marginal_error <= 1.5 * tol


@pytest.mark.parametrize("method", METHODS)
def test_marginal_error_leaves_the_plan_differentiable(method, rng):
    """Whatever is asked first."""
    c, gradients = clouds(rng, 9, 8, 2), []
    v = randn(rng, 9, 8)
    for first in (False, True):
        x = c.x.clone().requires_grad_()
        result = otloss.solve_sample(x, c.y, 0.3, tol=1e-8, method=method)
        if first:
            assert isinstance(result.marginal_error, float)
        (gradient,) = torch.autograd.grad((v * result.plan).sum(), x)
        gradients.append(gradient)
    assert float(gradients[0].abs().max()) > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@some_of("backend, strength", BACKENDS, STRENGTHS)
def test_unbalanced_results(backend, strength, rng):
    """What `marginal_error` and the maps mean where the plan need not have the marginals a, b."""
    c = unequal(clouds(rng, 9, 8, 2, weights="random"), 3.0).to(backend.device)
    rho_x, rho_y = rho(strength)
    options = {"a": c.a, "b": c.b, "unbalanced": strength, "method": backend.method}
    for stop in ({"n_iters": 2}, {"tol": 1e-8}):
        result = otloss.solve_sample(c.x, c.y, 0.3, **options, **stop)
        f, g = result.potentials
        wanted = c.a * (-f / rho_x).exp(), c.b * (-g / rho_y).exp()
        errors = [
            float((got - w).abs().sum() / w.sum())
            for got, w in zip(result.marginals, wanted, strict=True)
        ]
        assert result.marginal_error == pytest.approx(max(errors), rel=1e-6, abs=1e-13)
    assert result.converged
    assert result.marginal_error <= 1e-8
    torch.testing.assert_close(result.extend(c.x), f, rtol=1e-6, atol=1e-7)
    image = result.plan @ c.y / result.plan.sum(1, keepdim=True)
    torch.testing.assert_close(result.barycentric_map(), image)


def test_outliers_are_not_transported(rng):
    """A few points far away keep their weight, and the map does not move the others for them."""
    x, y = randn(rng, 40, 2), randn(rng, 40, 2)
    y[:4] += 100
    result = otloss.solve_sample(x, y, 0.1, unbalanced=2.0)
    assert float(result.marginals[1][:4].sum()) < 1e-12
    clean = otloss.solve_sample(x, y[4:], 0.1, b=torch.full((36,), 1 / 40).double(), unbalanced=2.0)
    torch.testing.assert_close(
        result.barycentric_map(), clean.barycentric_map(), rtol=1e-2, atol=1e-2
    )


def test_unbalanced_warm_start(rng):
    c = unequal(clouds(rng, 30, 25, 2, weights="random"), 3.0)
    options = {"a": c.a, "b": c.b, "unbalanced": 5.0, "tol": 1e-8}
    cold = otloss.solve_sample(c.x, c.y, 0.1, **options)
    warm = otloss.solve_sample(c.x, c.y, 0.1, init=cold, **options)
    assert warm.n_iters < cold.n_iters
    torch.testing.assert_close(warm.value, cold.value)
    module = otloss.SinkhornDivergence(0.1, unbalanced=5.0, tol=1e-8, warm_start=True)
    first = module(c.x, c.y, c.a, c.b)
    torch.testing.assert_close(module(c.x, c.y, c.a, c.b), first, rtol=1e-6, atol=1e-9)
    plain = otloss.sinkhorn_divergence(c.x, c.y, 0.1, a=c.a, b=c.b, unbalanced=5.0, tol=1e-8)
    torch.testing.assert_close(first, plain, rtol=0, atol=0)


def test_apply_is_the_plan(rng):
    c, result = solved(rng)
    v, w = randn(rng, 6), randn(rng, 6, 4)
    torch.testing.assert_close(result.apply(v), result.plan @ v)
    torch.testing.assert_close(result.apply(w), result.plan @ w)
    torch.testing.assert_close(result.apply(c.x, axis=0), result.plan.T @ c.x)


def test_barycentric_map(rng):
    c, result = solved(rng)
    image = result.barycentric_map()
    torch.testing.assert_close(image, (result.plan @ c.y) / c.a[:, None])
    # It is where the gradient of the squared distance points: dOT/dx = 2 a (x - T(x)).
    x = c.x.requires_grad_()
    again = otloss.solve_sample(x, c.y, 0.5, a=c.a, b=c.b, tol=1e-10)
    (grad,) = torch.autograd.grad(again.value, x)
    torch.testing.assert_close(
        grad, 2 * c.a[:, None] * (c.x.detach() - image), rtol=1e-6, atol=1e-9
    )


def test_barycentric_map_of_padding_is_zero(rng):
    c = clouds(rng, 7, 6, 2, weights="random")
    a = c.a.clone()
    a[2] = 0
    a /= a.sum()
    image = otloss.solve_sample(c.x, c.y, 0.5, a=a, b=c.b).barycentric_map()
    assert not bool(image[2].any())
    assert bool(image.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cost", COSTS)
def test_extend(cost, method, rng):
    """f on the points themselves, and the formula elsewhere."""
    c, result = solved(rng, method, cost=cost)
    f, g = result.potentials
    torch.testing.assert_close(result.extend(c.x), f, rtol=1e-7, atol=1e-8)
    new = randn(rng, 4, 3)
    expected = oracle.softmin(oracle.cost(new, c.y, cost), g, c.b, 0.5)
    torch.testing.assert_close(result.extend(new), expected)


def test_transport_objective_is_value_linear(rng):
    c, result = solved(rng)
    linear = otloss.solve_sample(
        c.x, c.y, 0.5, a=c.a, b=c.b, tol=1e-10, objective="transport"
    ).value
    torch.testing.assert_close(linear, result.value_linear)
    assert linear < result.value


@pytest.mark.parametrize("method", METHODS)
def test_warm_start(method, rng):
    """From the solution nothing is left to do; the answer does not depend on the start."""
    x, y = randn(rng, 40, 3), randn(rng, 30, 3)
    options = {"tol": 1e-7, "max_iters": 50_000, "method": method}
    cold = otloss.solve_sample(x, y, 0.1, **options)
    for init in (cold, cold.potentials):
        warm = otloss.solve_sample(x, y, 0.1, init=init, **options)
        assert warm.n_iters < cold.n_iters
        torch.testing.assert_close(warm.plan, cold.plan, rtol=1e-3, atol=1e-8)
    near = otloss.solve_sample(x + 0.001 * randn(rng, 40, 3), y, 0.1, init=cold, **options)
    assert near.n_iters <= cold.n_iters
    other = otloss.solve_sample(x, y, 0.1, init=(randn(rng, 40), randn(rng, 30)), **options)
    agree(other, cold)


def test_a_warm_start_is_not_changed(rng):
    c, result = solved(rng)
    before = [v.clone() for v in result.potentials]
    otloss.solve_sample(c.x + 1, c.y, 0.3, a=c.a, b=c.b, init=result)
    for v, w in zip(result.potentials, before, strict=True):
        assert torch.equal(v, w)


def test_inputs_are_not_changed(rng):
    c = clouds(rng, 7, 6, 3, weights="padded").require_grad()
    before = c.double()
    loss = otloss.sinkhorn_divergence(c.x, c.y, 0.5, a=c.a, b=c.b)
    loss.backward()
    for t, old in zip(c.inputs(), before.inputs(), strict=True):
        assert torch.equal(t.detach(), old)


def test_methods_agree_and_auto_is_one_of_them(rng):
    c = clouds(rng, 20, 15, 3, weights="random")
    losses = [
        otloss.sinkhorn_divergence(c.x, c.y, 0.5, a=c.a, b=c.b, tol=1e-9, method=method)
        for method in ("auto", *METHODS)
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-7, atol=1e-9)


def test_genevays_convention(rng):
    """2 W(a, b) - W(a, a) - W(b, b) is twice the divergence with the transport objective."""
    c = clouds(rng, 7, 6, 3, weights="random")

    def W(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:  # noqa: N802
        return otloss.solve_sample(x, y, 0.5, a=a, b=b, tol=1e-10).value_linear

    paper = 2 * W(c.x, c.y, c.a, c.b) - W(c.x, c.x, c.a, c.a) - W(c.y, c.y, c.b, c.b)
    ours = otloss.sinkhorn_divergence(c.x, c.y, 0.5, a=c.a, b=c.b, objective="transport", tol=1e-10)
    torch.testing.assert_close(2 * ours, paper, rtol=1e-7, atol=1e-9)


@some_of(
    "backend, objective, debiased, strength",
    BACKENDS, ["regularized", "transport"], [True, False], [None, *STRENGTHS], whole=3,
)  # fmt: skip
def test_fixed_iterations(backend, objective, debiased, strength, rng):
    """n_iters: exactly that number, in all three problems, also of a cloud against itself."""
    c = clouds(rng, 7, 6, 3, weights="random")
    c = (c if strength is None else unequal(c, 0.4)).to(backend.device)
    function = otloss.sinkhorn_divergence if debiased else otloss.sinkhorn_loss
    for count in (1, 2, 7):
        options = {"n_iters": count, "objective": objective}
        call = {"unbalanced": strength, "method": backend.method, **options}
        got = function(c.x, c.y, 0.3, a=c.a, b=c.b, **call)
        options |= {"debiased": debiased, "rho": None if strength is None else rho(strength)}
        truth = oracle.loss(c.x, c.y, 0.3, c.a, c.b, **options)
        torch.testing.assert_close(got, truth.value, rtol=1e-9, atol=1e-11)


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
def test_a_change_in_place_after_the_solve_is_noticed(quantity, method, rng):
    """What is computed later would be of other points than the potentials."""
    for name in ("x", "y", "a", "b"):
        c, result = solved(rng, method)
        with torch.no_grad():
            getattr(c, name).mul_(1.01)
        with pytest.raises(RuntimeError, match=rf"^{name} was changed in place after the solve"):
            ON_DEMAND[quantity](result)
        assert result.converged
        assert bool(result.value.isfinite())
    c, result = solved(rng, method)
    ON_DEMAND[quantity](result)  # not changed


def test_an_optimiser_step_on_a_cost_matrix_is_noticed(rng):
    C = randn(rng, 5, 4).requires_grad_()
    result = otloss.solve(C, 0.5)
    before = result.plan.detach().clone()
    result.value.backward()
    torch.optim.SGD([C], lr=0.1).step()
    assert torch.equal(result.plan, before)  # it has been made already
    with pytest.raises(RuntimeError, match=r"^C was changed in place"):
        result.value_linear  # noqa: B018


def test_results_in_inference_mode(rng):
    """Whose tensors do not count their changes."""
    with torch.inference_mode():
        result = otloss.solve_sample(randn(rng, 5, 2), randn(rng, 4, 2), 0.5)
        assert result.duality_gap < 1e-2
        assert result.plan.shape == (5, 4)


# ------------------------------------------------------------------------------------- status


def test_last_status(rng):
    """Of the worst problem of the last call."""
    x, y = randn(rng, 30, 2), randn(rng, 25, 2)
    result = otloss.solve_sample(x, y, 0.05)
    status = otloss.last_status()
    assert status.converged is True
    assert status.n_iters == result.n_iters
    assert 0 <= status.marginal_error <= 1e-3
    with pytest.warns(otloss.ConvergenceWarning):
        otloss.sinkhorn_divergence(x, y, 0.01, tol=1e-9, max_iters=2)
    status = otloss.last_status()
    assert status.converged is False
    assert status.n_iters == 2
    assert status.marginal_error > 1e-9
    batch = torch.stack([x, x]), torch.stack([y, x[:25] + 1])
    otloss.sinkhorn_loss(*batch, 0.5, cost=torch.cdist)
    assert otloss.last_status().converged is True


@pytest.mark.parametrize("status", ["converged", "n_iters"])
def test_a_status_that_was_not_read_warns_when_it_is(status, rng, monkeypatch):
    """As on CUDA, where a solve does not wait to see whether it converged."""
    x, y = randn(rng, 30, 2), randn(rng, 25, 2)
    monkeypatch.setattr(otloss._check, "readable", lambda t: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = otloss.solve_sample(x, y, 0.01, tol=1e-9, max_iters=2)
        fixed = otloss.solve_sample(x, y, 0.01, tol=1e-9, n_iters=2)
        assert not fixed.converged
        assert not otloss.last_status().converged
    with pytest.warns(otloss.ConvergenceWarning, match="stopped after 2 iter") as caught:
        getattr(result, status)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert result.n_iters == 2
        assert result.converged is False


class TestModules:
    def test_same_as_the_functions(self, rng):
        c = clouds(rng, 7, 6, 3, weights="random")
        x2, y2 = randn(rng, 5, 3), randn(rng, 4, 3)
        pairs = [
            (
                otloss.SinkhornDivergence(0.5, cost="euclidean")(c.x, c.y, c.a, c.b),
                otloss.sinkhorn_divergence(c.x, c.y, 0.5, a=c.a, b=c.b, cost="euclidean"),
            ),
            (otloss.SinkhornLoss(0.5)(c.x, c.y), otloss.sinkhorn_loss(c.x, c.y, 0.5)),
            (
                otloss.MinibatchEnergyDistance(0.5)(c.x, x2, c.y, y2),
                otloss.minibatch_energy_distance(c.x, x2, c.y, y2, 0.5),
            ),
            (
                otloss.EnergyDistance()(c.x, c.y, c.a, c.b),
                otloss.energy_distance(c.x, c.y, a=c.a, b=c.b),
            ),
        ]
        for module, function in pairs:
            torch.testing.assert_close(module, function, rtol=0, atol=0)

    def test_they_print_their_configuration(self):
        assert repr(otloss.SinkhornDivergence(0.5, cost="cosine")).count("cost='cosine'") == 1
        assert "eps=0.5" in repr(otloss.SinkhornLoss(0.5))
        assert "cost='euclidean'" in repr(otloss.EnergyDistance())

    def test_they_copy_and_hold_no_parameters(self, rng):
        module = otloss.SinkhornDivergence(0.5, tol=1e-4)
        x, y = randn(rng, 5, 2), randn(rng, 4, 2)
        assert not list(module.parameters())
        assert torch.equal(copy.deepcopy(module)(x, y), module(x, y))

    def test_warm_start_changes_the_work_and_not_the_result(self, rng):
        """The second call of a slow flow starts where the first ended."""
        x, y = randn(rng, 30, 2), randn(rng, 25, 2)
        module = otloss.SinkhornDivergence(0.05, tol=1e-8, warm_start=True, max_iters=20_000)
        module(x, y)
        short = otloss.SinkhornDivergence(0.05, tol=1e-8, warm_start=True, max_iters=3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", otloss.ConvergenceWarning)
            for _ in range(300):  # 3 passes a call get there in the end
                last = short(x, y)
        expected = otloss.sinkhorn_divergence(x, y, 0.05, tol=1e-8, max_iters=20_000)
        torch.testing.assert_close(module(x, y), expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-6)
        assert module(x[:7], y).isfinite()  # other shapes start anew

    def test_a_warm_start_outlives_inference_mode(self, rng):
        """A validation step leaves nothing that a training step cannot be differentiated with."""
        module = otloss.SinkhornDivergence(0.5, warm_start=True)
        x, y = randn(rng, 6, 2).requires_grad_(), randn(rng, 5, 2)
        with torch.inference_mode():
            module(x, y)
        module(x, y).backward()
        assert bool(x.grad.isfinite().all())

    def test_a_warm_start_forgets_what_is_not_finite(self, rng, monkeypatch):
        """On CUDA data is not read, and a step with NaN in it raises nothing."""
        monkeypatch.setattr(otloss._check, "readable", lambda t: False)
        x, y = randn(rng, 2, 40, 3), randn(rng, 2, 30, 3)
        module = otloss.SinkhornDivergence(0.1, warm_start=True, tol=1e-6)
        expected = module(x, y)
        bad = x.clone()
        bad[0] = torch.nan
        assert module(bad, y).isnan().tolist() == [True, False]
        torch.testing.assert_close(module(x, y), expected, rtol=1e-4, atol=1e-6)

    def test_warm_start_and_fixed_iterations_exclude_each_other(self):
        with pytest.raises(ValueError, match="warm_start must be False with n_iters"):
            otloss.SinkhornDivergence(0.5, warm_start=True, n_iters=3)


@pytest.mark.parametrize("method", METHODS)
def test_a_result_explains_how_it_was_solved(method, rng):
    assert solved(rng, method)[1].explain() == f"{method} on cpu"


def test_show_config(capsys):
    assert otloss.show_config() is None
    printed = capsys.readouterr().out
    config = otloss.show_config(mode="dicts")
    for key, value in config.items():
        assert key in printed
        assert str(value) in printed
    assert config["otloss"] == otloss.__version__
    assert config["torch"] == torch.__version__


def test_weights_can_be_learned(rng):
    """Weights of a model through a softmax: descent on the loss ends near those of the target."""
    points = randn(rng, 5, 2)
    target = make_weights(rng, (5,), "random")
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    losses = []
    for _ in range(100):
        optimiser.zero_grad()
        a = logits.softmax(0)
        loss = otloss.sinkhorn_divergence(points, points.clone(), 1.0, a=a, b=target, tol=1e-5)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] <= 0.05 * losses[0]
