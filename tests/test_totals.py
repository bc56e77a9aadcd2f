"""Values and gradients at any totals and any eps, in float32: what cancels is left out on paper."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from backends import BACKENDS
from helpers import COSTS, METHODS, STRENGTHS, Clouds, clouds, randn, some_of
from torch import Tensor
from torch.autograd import grad

import otloss

SINGLE, DOUBLE = torch.float32, torch.float64
EPS = (1e-2, 1.0, 1e3, 1e6, 1e12)  # over the mean cost, like rho
RHO = (0.1, 1.0, 1e3, 1e6, math.inf)
TOTALS = ((1.0, 1.0), (1e6, 1e6), (1e-3, 1e-3), (1e-3, 1e3), (1e6, 1e5))


def relative(found: Tensor, true: Tensor) -> float:
    return float((found.detach().double() - true.detach()).norm() / true.detach().norm())


def as_single_takes_them(c: Clouds) -> Clouds:
    """Numbers of float32 in float64, whose totals are 1, or equal, where they are to rounding."""
    a, b = (w.detach().double() for w in (c.a, c.b))
    a, b = (w / w.sum() if abs(w.sum() - 1) < 1e-6 else w for w in (a, b))
    b = b * (a.sum() / b.sum()) if abs(a.sum() / b.sum() - 1) < 1e-6 else b
    return Clouds(c.x.detach().double(), c.y.detach().double(), a, b).require_grad()


@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")  # float32 ends at its rounding
@some_of("method, eps, rho, totals", METHODS, EPS, RHO, TOTALS, whole=2)
def test_float32_keeps_its_digits(method, eps, rho, totals, rng):
    """OT, S and the gradients of S in x and a against float64, and that against the oracle where
    its own sums, of the size of eps m_a m_b, leave digits."""
    if math.isinf(rho):
        totals = (totals[0], totals[0])
    c = clouds(rng, 20, 15, 3, weights="random")
    unit = float(torch.cdist(c.x, c.y).square().mean())
    single = Clouds(c.x, c.y, totals[0] * c.a, totals[1] * c.b)
    single = Clouds(*(t.to(SINGLE) for t in vars(single).values())).require_grad()
    exact, strength = as_single_takes_them(single), None if math.isinf(rho) else rho * unit
    call = {"unbalanced": strength, "max_iters": 5000}
    found, true = (
        [d.loss(eps * unit, debiased=debiased, tol=tol, method=how, **call) for debiased in (0, 1)]
        for d, tol, how in ((single, 1e-6, method), (exact, 1e-13, "auto"))
    )
    assert relative(found[0], true[0]) < 1e-6
    assert relative(found[1], true[1]) < 1e-5
    got, expected = (grad(v[1], (d.x, d.a)) for v, d in ((found, single), (true, exact)))
    assert relative(got[0], expected[0]) < 1e-4  # tol over the least eps, in units of costs
    if math.isinf(rho):
        got, expected = ([g[0], g[1] - g[1].mean()] for g in (got, expected))
    assert relative(got[1], expected[1]) < 1e-3  # to first order in the marginal error
    if eps <= 1 and max(totals) / min(totals) < 10 and rho <= 1e3:
        pair = None if strength is None else (strength, strength)
        for debiased, value in zip((False, True), true, strict=True):
            x, y, *weights = vars(exact).values()
            by_oracle = oracle.loss(x, y, eps * unit, *weights, debiased=debiased, rho=pair)
            assert relative(value, by_oracle.value) < 1e-7


@some_of("backend, seed", BACKENDS, [0, 1])
def test_close_histograms_of_large_totals(backend, seed):
    """The divergence is 5e-6 of m C: a last update in double makes it right to the last digits."""
    right = (0.1860952382, 0.1702230094)[seed]
    rng = torch.Generator().manual_seed(seed)
    a = (torch.rand(784, generator=rng) * 255).round()
    b = (a + 5 * torch.randn(784, generator=rng)).clamp(min=0).round()
    line = torch.linspace(0, 1, 28)
    c = Clouds(torch.cartesian_prod(line, line), torch.cartesian_prod(line, line), a, b)
    loss = c.to(backend.device).loss(0.01, unbalanced=1.0, tol=1e-6, method=backend.method)
    assert loss.item() == pytest.approx(right, rel=2e-6)


@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")  # float32 ends at its rounding
@some_of("backend, strength, batch", BACKENDS, [None, *STRENGTHS], [None, 2])
def test_terms_that_cancel(backend, strength, batch, rng):
    """The divergence of close directions is 1e-8, a tenth of what float32 rounds its terms by."""
    c = clouds(rng, 60, 60, 3, batch=batch)
    c = Clouds(c.x, c.x + 1e-4 * randn(rng, *c.x.shape), None, None).to(SINGLE).to(backend.device)
    options = {"cost": "cosine", "unbalanced": strength}
    got = c.loss(0.1, tol=1e-6, method=backend.method, **options)
    right = c.double().loss(0.1, tol=1e-10, max_iters=10_000, method="dense", **options)
    assert relative(got.cpu(), right) < 5e-3


@some_of("method, cost, scale, eps", METHODS, COSTS, [1.0, 1e-5], [1e6, 1e12], whole=2)
def test_eps_far_above_the_costs(method, cost, scale, eps, rng):
    """The divergence is the energy distance, the loss the mean cost: to rounding, in float32."""
    c = clouds(rng, 40, 30, 3, dtype=SINGLE)
    c = Clouds(scale * c.x, scale * c.y, None, None)
    options = {"cost": cost, "method": method}
    energy = otloss.energy_distance(c.x.double(), c.y.double(), cost=cost)
    mean = otloss.cost_matrix(c.x.double(), c.y.double(), cost).mean()
    size = float(mean)
    assert abs(c.loss(eps * size, **options) - energy) < 1e-6 * size
    assert abs(c.loss(eps * size, debiased=False, **options) - mean) < 2e-6 * size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objective", ["regularized", "transport"])
@pytest.mark.parametrize("mode", ["envelope", "implicit", "unrolled"])
@pytest.mark.parametrize("total", [1.0, 1.5])
def test_gradient_in_both_totals(total, mode, objective, method, rng):
    """OT(t a, t b) = t OT(a, b) - eps m t log t, but for the transport's envelope, whose plan is
    held constant; the divergence is proportional to t."""
    c = clouds(rng, 8, 6, 2, weights="random")
    options = {"objective": objective, "backward": mode, "method": method}
    options |= {"n_iters": 200} if mode == "unrolled" else {"tol": 1e-12, "max_iters": 10_000}
    held = mode == "envelope" and objective == "transport"
    for debiased in (False, True):

        def at(t: float | Tensor, debiased: bool = debiased) -> Tensor:
            return Clouds(c.x, c.y, t * c.a, t * c.b).loss(2.0, debiased=debiased, **options)

        t, h = torch.tensor(total, dtype=DOUBLE, requires_grad=True), 1e-4
        difference = (at(total + h) - at(total - h)) / (2 * h)
        (slope,) = grad(at(t), t)
        assert slope.item() == pytest.approx(0.0 if held else difference.item(), abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_equal_clouds_are_at_distance_0(dtype, cost, method, rng):
    """Exactly, but for a cosine that is 1 to rounding; and with no gradient but rounding."""
    c = clouds(rng, 20, 20, 3, weights="random", dtype=dtype)
    for strength in (None, 1.0):
        both = Clouds(c.x, c.x.clone(), 7 * c.a, 7 * c.a.clone()).require_grad()
        loss = both.loss(0.2, cost=cost, method=method, unbalanced=strength)
        assert loss == 0 or (cost == "cosine" and loss < 1e-11)
        for of_input in both.grads(loss):
            assert of_input.abs().max() < 1e-5
