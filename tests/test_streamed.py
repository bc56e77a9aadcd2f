"""Solves without cost matrices: the same results, in memory of the size of the clouds.

Both engines run the same solver, so one schedule of iterations must give the same numbers up to
rounding; converged results agree to the tolerance whatever the start.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from backends import BACKENDS

import otloss
from otloss import method as methods
from otloss import ops

ROOT = Path(__file__).parents[1]
FIRST_ORDER = {"tol": 1e-9, "max_iters": 20_000}


def _eps(c: helpers.Clouds, cost: str, fraction: float) -> float:
    xs, ys = (x if w is None else x[w > 0] for x, w in ((c.x, c.a), (c.y, c.b)))
    return fraction * otloss.cost_matrix(xs.detach(), ys.detach(), cost).mean().item()


def _divergence(
    c: helpers.Clouds, eps: float, cost: str, method: str, **kwargs: object
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    value = otloss.sinkhorn_divergence(
        c.x, c.y, eps, a=c.a, b=c.b, cost=cost, method=method, **kwargs
    )
    return value, torch.autograd.grad(value.sum(), c.inputs())


@helpers.some_of(
    "backend, cost, d, weights, objective, strength",
    [name for name in BACKENDS if "streamed" in name], helpers.COSTS, [2, 9, 17, 40],
    ["uniform", "random", "padded"], ["regularized", "transport"], [None, *helpers.STRENGTHS],
    whole=3,
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_stored_matrix(
    backend, rng, cost, d, weights, objective, strength
):
    """Of losses, and through cost matrices the exact gradient of the transport value."""
    most = 40 if backend.emulated else 80
    n, m = helpers.pick(rng, 1, most), helpers.pick(rng, 33, most)
    c = helpers.clouds(rng, n, m, d, weights=weights)
    c = (c if strength is None else helpers.unequal(c, 0.3)).to(backend.device).require_grad()
    eps = _eps(c, cost, 0.1)
    options = {"unbalanced": strength and helpers.scaled(strength, 20 * eps)}
    options |= {"objective": objective, **FIRST_ORDER}
    dense, dense_grads = _divergence(c, eps, cost, "dense", **options)
    streamed, grads = _divergence(c, eps, cost, "streamed", **options)
    helpers.close(streamed, dense, 1e-8, scale=float(dense.detach().abs()) + eps)
    for got, expected in zip(grads, dense_grads, strict=True):
        helpers.close(got, expected, 1e-6, scale=float(expected.norm()) + 1e-3 * eps)
    if c.a is not None and weights == "padded":
        assert (grads[0][c.a.detach() == 0] == 0).all()


@pytest.mark.parametrize("cost", helpers.COSTS)
@pytest.mark.parametrize("fraction", [1.0, 1e-3])
def test_iterations_are_those_of_the_stored_matrix(rng, cost, fraction):
    """From a cold start at small eps most sums underflow and are done again, columns included."""
    c = helpers.clouds(rng, 70, 131, 3, weights="wide")
    eps = _eps(c, cost, fraction)
    kwargs = {"a": c.a, "b": c.b, "cost": cost, "n_iters": 4}
    dense = otloss.solve_sample(c.x, c.y, eps, method="reference", **kwargs)
    streamed = otloss.solve_sample(c.x, c.y, eps, method="streamed", **kwargs)
    for got, expected in zip(streamed.potentials, dense.potentials, strict=True):
        helpers.close(got, expected, 1e-10)


def test_precision_changes_nothing_on_a_cpu(rng):
    c = helpers.clouds(rng, 40, 50, 20, dtype=torch.float32).require_grad()
    exact, grads = _divergence(c, 5.0, "sqeuclidean", "streamed")
    allowed, same = _divergence(c, 5.0, "sqeuclidean", "streamed", precision="tf32")
    assert bool(exact == allowed)
    assert all(torch.equal(x, y) for x, y in zip(grads, same, strict=True))


def test_threads_share_the_rows_of_one_problem(rng, threads):
    c = helpers.clouds(rng, 700, 800, 3)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(
            otloss.solve_sample(c.x, c.y, 0.5, method="streamed", n_iters=3).potentials[0]
        )
    helpers.close(results[1], results[0], 1e-12)


def test_the_gaussian_start_saves_passes(rng):
    """Far apart and of different spread: most of the potential is the Gaussians'."""
    x = helpers.randn(rng, 400, 4)
    y = 3 * helpers.randn(rng, 400, 4) @ torch.diag(torch.tensor([1.0, 0.2, 2.0, 0.5]).double()) + 9
    nothing = torch.zeros(400).double(), torch.zeros(400).double()
    for method in ("dense", "streamed"):
        default, cold = (
            otloss.solve_sample(x, y, 1.0, method=method, tol=1e-2, init=init).n_iters
            for init in (None, nothing)
        )
        assert default < cold, (method, default, cold)


@pytest.mark.parametrize("strength", [None, 2.0], ids=str)
@pytest.mark.parametrize("cost", helpers.COSTS)
@pytest.mark.parametrize("batch", [None, 2])
def test_what_results_tell_is_that_of_the_stored_matrix(rng, batch, cost, strength, monkeypatch):
    """In blocks of a few rows, the last of which is smaller; gradients too."""
    c = helpers.clouds(rng, 31, 26, 3, weights="padded", batch=batch)
    for x, w in ((c.x, c.a), (c.y, c.b)):  # of either kind
        x[w == 0] = torch.where(helpers.rand(rng, int((w == 0).sum()), 1) < 0.5, 0.5, math.nan).to(
            x
        )
    c.require_grad()
    monkeypatch.setattr(methods, "BLOCK_BYTES", 8 * 26 * (batch or 1) * 7)
    lead = () if batch is None else (batch,)
    new = helpers.randn(rng, *lead, 12, 3)
    right, left = helpers.randn(rng, *lead, 26), helpers.randn(rng, *lead, 31, 4)
    results = []
    for method in ("dense", "streamed"):
        result = otloss.solve_sample(
            c.x, c.y, 0.5, a=c.a, b=c.b, cost=cost, unbalanced=strength, method=method,
            **FIRST_ORDER,
        )  # fmt: skip
        told = [result.value_linear, *result.marginals, result.apply(right)]
        told += [result.apply(left, axis=0), result.barycentric_map(), result.extend(new)]
        grads = torch.autograd.grad(sum(t.square().sum() for t in told), c.inputs())
        results.append([*told, torch.as_tensor(result.marginal_error), *grads])
        assert (result._kept_plan is not None) == (method == "dense")
    for one, other in zip(*results, strict=True):
        helpers.close(one, other, 1e-6, scale=float(other.detach().norm()) + 1e-3)


# What a call keeps, its sizes, the bytes that it may add. 8000 x 8000 float32 costs take 0.26 GB,
# of which autograd through the plan keeps several; 12 000 x 10 000 0.48 GB, 7000 x 6000 0.17 GB.
RESULT = """
    result = otloss.solve_sample(x, y, 1.0, method="streamed", n_iters=2)
    (result.barycentric_map().sum() + result.value_linear).backward()
    result.extend(y), result.marginal_error
"""
LOSS = """
    otloss.sinkhorn_loss(x, y, 1.0, method="streamed", **{}).backward()
"""
ENVELOPE = {"n_iters": 1, "backward": "envelope"}
MEMORY = {
    "energy": (
        "    otloss.energy_distance(x, y, method='streamed').backward()",
        (12_000, 10_000),
        # a block of rows, ten times that on the way to the gradient
        15 * methods.BLOCK_BYTES,
    ),
    "result": (RESULT, (8000, 8000), 800e6),
    "envelope": (LOSS.format(ENVELOPE), (8000, 8000), 100e6),
    "unrolled": (LOSS.format({"objective": "transport", "n_iters": 6}), (7000, 6000), 40e6),
    "implicit": (LOSS.format({"objective": "transport", "tol": 0.1}), (7000, 6000), 40e6),
}


@pytest.mark.parametrize("case", helpers.slow_but(MEMORY, "envelope"))
def test_memory_does_not_grow_with_the_matrix(case):
    body, sizes, most = MEMORY[case]
    script = (
        "import otloss, torch\n"
        "from otloss import method\n"
        "from benchmarks.memory import resident_peak\n"
        f"method.dense_budget = {methods.dense_budget if case == 'result' else 0}\n"
        "def call(n, m):\n"
        "    x, y = torch.rand(n, 3).requires_grad_(), torch.rand(m, 3).requires_grad_()\n"
        f"{body}\n"
        "call(50, 60)\n"
        "before = resident_peak()\n"
        f"call{sizes}\n"
        "print(resident_peak() - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(run.stdout) < most, f"{int(run.stdout) / 1e6:.0f} MB more"


def test_auto_keeps_matrices_within_the_budget(monkeypatch):
    points, sizes = [torch.zeros(10, 30)], [(1000, 1000)]
    assert methods.choose_method(points, sizes, 4) == "dense"
    monkeypatch.setattr(methods, "dense_budget", 3_999_999)
    assert methods.choose_method(points, sizes, 4) == "streamed"


def test_auto_streams_few_dimensions_later_if_the_gradient_takes_many_passes():
    points, sizes = [torch.zeros(10, 3)], [(1000, 1000)]
    assert methods.choose_method(points, sizes, 4) == "streamed"
    assert methods.choose_method(points, sizes, 4, many_passes_back=True) == "dense"
    assert methods.choose_method(points, [(4000, 4000)], 4, many_passes_back=True) == "streamed"


def test_what_it_cannot_do_is_refused(rng):
    c = helpers.clouds(rng, 5, 6, 2)
    with pytest.raises(NotImplementedError, match="needs a cost given by name"):
        otloss.sinkhorn_loss(c.x, c.y, 1.0, method="streamed", cost=lambda x, y: x @ y.mT)


# ------------------------------------------------------------------- gradients without matrices

MODES = ("unrolled", "implicit")
Rho = tuple[float, float]  # rho_x, rho_y
RHO: tuple[Rho, ...] = ((math.inf, math.inf), (2.0, 0.5), (math.inf, 0.7), (0.7, math.inf))


def _problem(
    rng: torch.Generator, cost: str, d: int, objective: int, rho: Rho, mode: str, **kw: Any
) -> tuple[list[Any], Any, list[Any]]:
    """A divergence's three pairs, solved: gradients of what was found, those of f and g from
    outside, the problem, and what the mode's gradient takes of the solution."""
    sizes = kw.get("sizes", (helpers.pick(rng, 33, 90), helpers.pick(rng, 65, 140)))
    c = helpers.clouds(rng, *sizes, d, weights="padded", batch=kw.get("batch", 2))
    eps = kw.get("eps", 0.5 if cost == "cosine" else 0.5 * d**0.5)
    weights, pairs = [c.a, c.b], [0, 1, 0, 0, 1, 1]
    coefficients, kind = [1.0, -0.5, -0.7], helpers.COSTS.index(cost)
    n_iters = 5 if mode == "unrolled" else -1
    points = [c.x, c.y]
    level = kw.get("level", 0.0)  # of the potentials that iterations start from
    init = [torch.full_like(weights[i], level).where(weights[i] > 0, 0.0) for i in pairs]
    init = init if level else []
    problem = ops.problems(
        weights, pairs, coefficients, eps, points=points, kind=kind, rho=rho, objective=objective
    )
    loss, _, f, g, traces, _ = helpers.solved(
        problem,
        init,
        tol=1e-10,
        max_iters=20_000,
        n_iters=n_iters,
        trace=mode == "unrolled",
        dense=True,
    )
    outside = [[helpers.randn(rng, *t.shape) for t in side] for side in (f, g)]
    before = [helpers.randn(rng, *loss.shape), *outside]
    return before, problem, [init, traces] if mode == "unrolled" else [f, g]


def _in_float32(values: list[Any]) -> list[Any]:
    return [v.float() if isinstance(v, torch.Tensor) else _in_float32(v) for v in values]


def _through_matrices(mode: str, before: Any, problem: Any, after: Any, wanted: list[int]) -> Any:
    clouds = (problem.points, problem.weights, problem.pairs, problem.kind)
    costs, gradient = ops.cost(*clouds), getattr(ops, f"{mode}_backward")
    stored, every = problem._replace(costs=costs, points=[]), list(range(len(costs)))
    grad_costs, _, grad_a, grad_b, *_ = gradient(*before, *stored, *after, every, [], True)
    grads = ops.cost_backward(grad_costs, costs, *clouds, wanted)
    return [*grads, *grad_a, *grad_b]


def _without(mode: str, before: Any, problem: Any, after: Any, wanted: list[int]) -> Any:
    gradient = getattr(ops, f"{mode}_backward")
    _, grads, grad_a, grad_b, *_ = gradient(*before, *problem, *after, [], wanted, True)
    return [*grads, *grad_a, *grad_b]


@helpers.some_of(
    "mode, cost, d, objective, rho", MODES, helpers.COSTS, [1, 3, 20], [0, 1], RHO, whole=3
)
def test_gradients_are_those_of_the_stored_matrix(rng, mode, cost, d, objective, rho):
    """Of one solution, so that nothing but rounding differs."""
    parts = _problem(rng, cost, d, objective, rho, mode)
    expected, got = (call(mode, *parts, [0, 1]) for call in (_through_matrices, _without))
    for one, other in zip(got, expected, strict=True):
        helpers.close(one, other, 1e-10, scale=float(other.norm()) + 1e-3)
    for x, w in zip(got, parts[1].weights, strict=False):
        assert (x[w == 0] == 0).all()


@pytest.mark.parametrize("sizes", [(1, 1), (1, 70), (67, 1), (4, 1030)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_small_and_of_long_rows(rng, mode, sizes):
    parts = _problem(rng, "euclidean", 3, 1, RHO[1], mode, sizes=sizes)
    expected, got = (call(mode, *parts, [0, 1]) for call in (_through_matrices, _without))
    for one, other in zip(got, expected, strict=True):
        helpers.close(one, other, 1e-10, scale=float(other.norm()) + 1e-3)


@pytest.mark.parametrize(("rho", "level"), [((0.03, 0.05), 0.0), ((0.7, math.inf), 50.0)])
@pytest.mark.parametrize("objective", [0, 1])
def test_gradients_where_the_softmaxes_of_an_iteration_are_far_apart(rng, objective, rho, level):
    """By a factor of a row, or of a column, that is out of range: both take an exponential."""
    eps = 0.02
    parts = _problem(rng, "sqeuclidean", 3, objective, rho, "unrolled", eps=eps, level=level)
    weights, (init, traces) = parts[1].weights, parts[2][:2]
    n, trace, b = weights[0].shape[1], traces[0], weights[1]
    if level:
        factor = torch.where(b > 0, (init[1] - trace[:, 0, n:]) / eps, 0.0)
    else:
        factor = trace[..., :n] / rho[0]
    assert factor.max() > 60 * math.log(2)  # kTrusted
    expected, got = (call("unrolled", *parts, [0, 1]) for call in (_through_matrices, _without))
    for one, other in zip(got, expected, strict=True):
        helpers.close(one, other, 1e-10, scale=float(other.norm()) + 1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_in_float32(rng, mode):
    parts = _problem(rng, "sqeuclidean", 20, 1, RHO[0], mode)
    expected = _without(mode, *parts, [0, 1])
    before, problem, after = parts
    points, weights = _in_float32(problem.points), _in_float32(problem.weights)
    single = problem._replace(points=points, weights=weights)
    got = _without(mode, _in_float32(before), single, _in_float32(after), [0, 1])
    for one, other in zip(got, expected, strict=True):
        helpers.close(one, other, 1e-3, scale=float(other.norm()) + 1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_leave_out_what_is_not_wanted(rng, mode):
    parts = _problem(rng, "sqeuclidean", 3, 0, RHO[0], mode)
    every = _without(mode, *parts, [0, 1])
    assert torch.equal(_without(mode, *parts, [1])[0], every[1])
    assert len(_without(mode, *parts, [])) == len(every) - 2


@pytest.mark.parametrize("mode", MODES)
def test_gradients_on_threads(rng, mode, threads):
    """Rows of each problem in two parts, the second at any row."""
    parts = _problem(rng, "sqeuclidean", 3, 1, RHO[0], mode, sizes=(701, 803), batch=1)
    torch.set_num_threads(1)
    expected = _without(mode, *parts, [0, 1])
    torch.set_num_threads(4)
    for one, other in zip(_without(mode, *parts, [0, 1]), expected, strict=True):
        helpers.close(one, other, 1e-9, scale=float(other.norm()) + 1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_losses_make_no_matrix(rng, mode, monkeypatch):
    """What a loss and a result hand back, with a budget that no matrix fits in."""
    monkeypatch.setattr(methods, "dense_budget", 0)
    c = helpers.clouds(rng, 45, 70, 3, weights="random").require_grad()
    kw: dict[str, Any] = {"tol": 1e-11, "max_iters": 20_000}
    kw = {"n_iters": 6} if mode == "unrolled" else kw

    def gradients(method: str) -> tuple[torch.Tensor, ...]:
        given = {"a": c.a, "b": c.b, "method": method, "backward": mode, **kw}
        loss = otloss.sinkhorn_divergence(c.x, c.y, 0.5, objective="transport", **given)
        f, g = otloss.solve_sample(c.x, c.y, 0.5, **given).potentials
        return torch.autograd.grad(loss + f.sin().sum() + g.cos().sum(), c.inputs())

    for one, other in zip(gradients("streamed"), gradients("dense"), strict=True):
        helpers.close(one, other, 1e-7)
    loss = otloss.sinkhorn_loss(c.x, c.y, 0.5, method="streamed", objective="transport", **kw)
    (first,) = torch.autograd.grad(loss, c.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="dense_budget"):
        first.sum().backward()


@helpers.some_of("cost, batch, padded", helpers.COSTS, [None, 2], [False, True], whole=3)
@pytest.mark.parametrize("d", [3, 40])
def test_energy_distance_in_blocks(d, cost, batch, padded, rng, monkeypatch):
    """Value, gradients and second derivatives as from stored matrices."""
    c = helpers.clouds(rng, 30, 20, d, weights="padded" if padded else "random", batch=batch)
    if padded:
        c.x[c.a == 0] = math.nan
    c.require_grad()
    monkeypatch.setattr(methods, "BLOCK_BYTES", 8 * 20 * 7)
    found = []
    for method in ("dense", "streamed"):
        loss = otloss.energy_distance(c.x, c.y, a=c.a, b=c.b, cost=cost, method=method).sum()
        first = torch.autograd.grad(loss, c.inputs(), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), (c.x, c.y))
        found.append([loss, *first, *second])
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-10)


def test_energy_distance_streams_above_the_budget(rng, monkeypatch):
    x, y = helpers.randn(rng, 30, 3), helpers.randn(rng, 20, 3)
    expected, asked = otloss.energy_distance(x, y), []
    plain = otloss.losses.build_costs
    monkeypatch.setattr(
        otloss.losses, "build_costs", lambda *args: asked.append(args[3]) or plain(*args)
    )
    monkeypatch.setattr(methods, "dense_budget", 100)
    torch.testing.assert_close(otloss.energy_distance(x, y), expected)
    assert asked == ["streamed"] * 3
    asked.clear()
    otloss.energy_distance(x, y, method="dense")
    assert asked == ["dense"]
    with pytest.raises(NotImplementedError, match="needs a cost given by name"):
        otloss.energy_distance(x, y, method="streamed", cost=torch.cdist)
