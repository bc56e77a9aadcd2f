"""Solves without cost matrices: the same results, in memory of the size of the clouds.

Both engines run the same solver, so one schedule of iterations must give the same numbers up to
rounding; converged results agree to the tolerance whatever the start. Iterations and gradients of
one solution are compared in test_regimes.py.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import BACKENDS
from helpers import (
    COSTS,
    STRENGTHS,
    close,
    clouds,
    pick,
    rand,
    randn,
    scaled,
    slow_but,
    some_of,
    unequal,
)
from torch.testing import assert_close

import otloss
from otloss import energy
from otloss import method as methods

ROOT = Path(__file__).parents[1]
EXACT = {"tol": 1e-9, "max_iters": 20_000}
OBJECTIVES = ("regularized", "transport")


@some_of(
    "backend, cost, d, weights, objective, strength",
    [name for name in BACKENDS if "streamed" in name], COSTS, [2, 9, 17, 40],
    ["uniform", "random", "padded"], OBJECTIVES, [None, *STRENGTHS], whole=3,
)  # fmt: skip
def test_values_and_gradients_are_those_of_the_stored_matrix(
    backend, rng, cost, d, weights, objective, strength
):
    """Of losses, and through cost matrices the exact gradient of the transport value."""
    most = 40 if backend.emulated else 80
    c = clouds(rng, pick(rng, 1, most), pick(rng, 33, most), d, weights=weights)
    c = unequal(c, 0.3, strength).to(backend.device)
    x, y = (t if w is None else t[w > 0] for t, w in ((c.x, c.a), (c.y, c.b)))
    eps = 0.1 * float(otloss.cost_matrix(x, y, cost).mean())
    options = {"unbalanced": strength and scaled(strength, 20 * eps), "objective": objective}
    c.require_grad()
    dense, streamed = (
        c.loss(eps, cost=cost, method=method, **options, **EXACT)
        for method in ("dense", "streamed")
    )
    close(streamed, dense, 1e-8, floor=eps)
    grads = c.grads(streamed)
    close(grads, c.grads(dense), 1e-6, floor=1e-3 * eps)
    if weights == "padded":
        assert not grads[0][c.a == 0].any()


def test_precision_changes_nothing_on_a_cpu(rng):
    c = clouds(rng, 40, 50, 20, dtype=torch.float32).require_grad()
    found = [c.loss(5.0, method="streamed", precision=word) for word in ("float32", "tf32")]
    assert torch.equal(*found)
    assert all(map(torch.equal, *(c.grads(loss) for loss in found)))


@pytest.mark.parametrize("method", ["dense", "streamed"])
def test_the_gaussian_start_saves_passes(method, rng):
    """Far apart and of different spread: most of the potential is the Gaussians'."""
    x, y = randn(rng, 400, 4), randn(rng, 400, 4)
    y = 3 * y @ torch.diag(torch.tensor([1.0, 0.2, 2.0, 0.5]).double()) + 9
    default, cold = (
        otloss.solve_sample(x, y, 1.0, method=method, tol=1e-2, init=init).n_iters
        for init in (None, (torch.zeros(400).double(), torch.zeros(400).double()))
    )
    assert default < cold


@pytest.mark.parametrize("strength", [None, 2.0], ids=str)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("batch", [None, 2])
def test_what_results_tell_is_that_of_the_stored_matrix(rng, batch, cost, strength, monkeypatch):
    """In blocks of a few rows, the last of which is smaller; gradients too."""
    c = clouds(rng, 31, 26, 3, weights="padded", batch=batch)
    for x, w in ((c.x, c.a), (c.y, c.b)):  # empty bins and padding
        x[w == 0] = torch.where(rand(rng, int((w == 0).sum()), 1) < 0.5, 0.5, math.nan).to(x)
    c.require_grad()
    monkeypatch.setattr(methods, "BLOCK_BYTES", 8 * 26 * (batch or 1) * 7)
    lead = () if batch is None else (batch,)
    shapes = ((12, 3), (26,), (31, 4))
    (new, right, left), results = (randn(rng, *lead, *shape) for shape in shapes), []
    for method in ("dense", "streamed"):
        result = c.solve(0.5, cost=cost, unbalanced=strength, method=method, **EXACT)
        told = [result.value_linear, *result.marginals, result.apply(right)]
        told += [result.apply(left, axis=0), result.barycentric_map(), result.extend(new)]
        grads = c.grads(sum(t.square().sum() for t in told))
        results.append([*told, torch.as_tensor(result.marginal_error), *grads])
        assert (result._kept_plan is not None) == (method == "dense")
    close(*results, 1e-6, floor=1e-3)


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


@pytest.mark.parametrize("case", slow_but(MEMORY, "envelope"))
def test_memory_does_not_grow_with_the_matrix(case):
    body, sizes, most = MEMORY[case]
    script = f"""
import otloss, torch
from otloss import method
from benchmarks.memory import resident_peak
method.dense_budget = {methods.dense_budget if case == "result" else 0}
def call(n, m):
    x, y = torch.rand(n, 3).requires_grad_(), torch.rand(m, 3).requires_grad_()
{body}
call(50, 60)
before = resident_peak()
call{sizes}
print(resident_peak() - before)
"""
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


@pytest.mark.parametrize("mode", ["unrolled", "implicit"])
def test_gradients_of_losses_make_no_matrix(rng, mode, monkeypatch):
    """What a loss and a result hand back, with a budget that no matrix fits in."""
    monkeypatch.setattr(methods, "dense_budget", 0)
    c = clouds(rng, 45, 70, 3, weights="random").require_grad()
    kw = {"n_iters": 6} if mode == "unrolled" else {"tol": 1e-11, "max_iters": 20_000}

    def gradients(method: str) -> tuple[torch.Tensor, ...]:
        given = {"method": method, "backward": mode, **kw}
        f, g = c.solve(0.5, **given).potentials
        loss = c.loss(0.5, objective="transport", **given)
        return c.grads(loss + f.sin().sum() + g.cos().sum())

    close(gradients("streamed"), gradients("dense"), 1e-7)
    loss = c.loss(0.5, debiased=False, method="streamed", objective="transport", **kw)
    (first,) = torch.autograd.grad(loss, c.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="dense_budget"):
        first.sum().backward()


@some_of("cost, batch, padded", COSTS, [None, 2], [False, True], whole=3)
@pytest.mark.parametrize("d", [3, 40])
def test_energy_distance_in_blocks(d, cost, batch, padded, rng, monkeypatch):
    """Value, gradients and second derivatives as from stored matrices."""
    c = clouds(rng, 30, 20, d, weights="padded" if padded else "random", batch=batch)
    if padded:
        c.x[c.a == 0], c.y[c.b == 0] = math.nan, math.inf
    c.require_grad()
    monkeypatch.setattr(methods, "BLOCK_BYTES", 8 * 20 * 7)
    found = []
    for method in ("dense", "streamed"):
        loss = c.energy(cost=cost, method=method).sum()
        first = torch.autograd.grad(loss, c.inputs(), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), (c.x, c.y))
        found.append([loss, *first, *second])
    assert_close(*found, rtol=1e-7, atol=1e-10)


def test_energy_distance_streams_above_the_budget(rng, monkeypatch):
    x, y = randn(rng, 30, 3), randn(rng, 20, 3)
    expected, asked = otloss.energy_distance(x, y), []
    plain = energy.build_costs
    monkeypatch.setattr(energy, "build_costs", lambda *args: asked.append(args[3]) or plain(*args))
    monkeypatch.setattr(methods, "dense_budget", 100)
    assert_close(otloss.energy_distance(x, y), expected)
    assert asked == ["streamed"] * 3
    asked.clear()
    otloss.energy_distance(x, y, method="dense")
    assert asked == ["dense"]
