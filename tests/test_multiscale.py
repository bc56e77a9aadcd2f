"""The multiscale engine: by property against float64, whatever it leaves out, at sizes where all
pairs can be looked at."""

from __future__ import annotations

import math
import signal
import time

import pytest
import torch
from helpers import Clouds, clouds, make_weights, rand, randn
from test_interruption import ended
from torch import Tensor
from torch.testing import assert_close

import otloss
from otloss import method as methods
from otloss import ops
from otloss._options import check_options

pytestmark = pytest.mark.skipif(not ops.NATIVE, reason="needs the native library")

TOL = 1e-3
N, M = 1500, 1300  # a level above the finest, and leaves that are not full


def _sphere(rng: torch.Generator, n: int) -> Tensor:
    return torch.nn.functional.normalize(randn(rng, n, 3), dim=1)


def _shapes(rng: torch.Generator) -> Clouds:
    flat = torch.cat([1.4 * (rand(rng, M, 2) - 0.5), torch.zeros(M, 1, dtype=torch.float64)], 1)
    return Clouds(_sphere(rng, N), flat, None, None)


def _clusters(rng: torch.Generator) -> Clouds:
    def cloud(n: int) -> Tensor:
        centres = 3 * randn(rng, 6, 2)
        return centres[torch.randint(6, (n,), generator=rng)] + 0.1 * randn(rng, n, 2)

    return Clouds(cloud(N), cloud(M), None, None)


def _line(rng: torch.Generator) -> Clouds:
    direction = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    return Clouds(rand(rng, N, 1) * direction, (0.3 + rand(rng, M, 1)) * direction, None, None)


def _far(rng: torch.Generator) -> Clouds:
    c = _shapes(rng)
    return Clouds(c.x, c.y + 3, None, None)  # further away float32 resolves no small eps


def _outliers(rng: torch.Generator) -> Clouds:
    x, y = randn(rng, N, 2), randn(rng, M, 2)
    x[::50] *= 8
    return Clouds(x, y + 0.5, None, None)


def _duplicates(rng: torch.Generator) -> Clouds:
    x = randn(rng, N // 10, 3).repeat(10, 1)
    return Clouds(x, torch.cat([x[:200], x[:1].expand(300, 3)]) + 0.1, None, None)


def _weighted(kind: str) -> object:
    def make(rng: torch.Generator) -> Clouds:
        return clouds(rng, N, M, 3, weights=kind)

    return make


KINDS = {
    "shapes": _shapes,
    "clusters": _clusters,
    "line": _line,
    "far": _far,
    "outliers": _outliers,
    "duplicates": _duplicates,
    "uniform": _weighted("uniform"),
    "wide": _weighted("wide"),
    "padded": _weighted("padded"),
    "small": lambda rng: clouds(rng, 40, 3, 2, weights="random"),
    "one": lambda rng: clouds(rng, 1, 1, 1),
    "eight": lambda rng: clouds(rng, N, M, 8),
}


def spread(c: Clouds) -> float:
    """The mean squared distance to the centre, in which eps is given here."""
    return float((c.y - c.y.mean(0)).square().sum(-1).mean().clamp(min=0.1))


def made(kind: str, rng: torch.Generator, dtype: torch.dtype, hardness: float):
    """Clouds, and eps; exact in float64 too."""
    c = KINDS[kind](rng).to(dtype)
    if kind == "padded":  # moderately far: here they are compared in one number with the others
        c = c.each(lambda t: t.clamp(-10, 10) if t.dim() == 2 else t)
    return c, hardness * spread(c.double())


def exact(c: Clouds, eps: float, **options) -> otloss.OTResult:
    with torch.no_grad():
        return c.double().solve(eps, method="dense", tol=1e-8, max_iters=5000, **options)


def true_error(c: Clouds, eps: float, f: Tensor, g: Tensor) -> float:
    """The marginal error of potentials, from all pairs in float64."""
    c = c.double()
    a, b = (w.double() for w in c.weights())
    b = b * (a.sum() / b.sum())
    cost = (c.x[:, None] - c.y).square().sum(-1)
    P = a[:, None] * b * ((f.double()[:, None] + g.double() - cost) / eps).exp()
    errors = (P.sum(1) - a).abs().sum(), (P.sum(0) - b).abs().sum()
    return float(max(errors) / a.sum())


def rounding(c: Clouds, eps: float, f: Tensor, g: Tensor) -> float:
    """Of a density of the plan, relative: of the potentials' dtype, and of tiles in float32."""
    return max(1e-6, 8 * torch.finfo(f.dtype).eps * float(f.abs().max() + g.abs().max()) / eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("hardness", [1.0, 0.02])
@pytest.mark.parametrize("kind", KINDS)
def test_value_marginals_and_potentials(kind, hardness, dtype, rng):
    c, eps = made(kind, rng, dtype, hardness)
    with torch.no_grad():
        got = c.solve(eps, method="multiscale", tol=TOL)
    right = exact(c, eps)
    assert got.converged
    error = true_error(c, eps, *got.potentials)
    assert error <= got.marginal_error + rounding(c, eps, *got.potentials)
    assert got.marginal_error <= TOL
    below = float(right.value) - float(got.value)
    noise = 64 * torch.finfo(dtype).eps * abs(float(right.value)) + 2 * right.duality_gap
    noise += TOL * eps  # what is left out makes potentials larger
    assert -noise <= below <= 20 * TOL * abs(float(right.value)) + noise
    assert abs(below) <= got.duality_gap + noise  # of all pairs, in float64


def _far_outlier(rng: torch.Generator) -> Clouds:
    x, y = randn(rng, 600, 3), randn(rng, 500, 3)
    y[0] *= 1e4
    return Clouds(x, y, None, None)


def _sparse(rng: torch.Generator) -> Clouds:
    """Leaves that are far wider than the square root of eps."""
    return Clouds(rand(rng, 900, 1), rand(rng, 8, 1), None, None)


# Terms of exponents that single precision does not hold.
@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")
@pytest.mark.parametrize(("make", "eps"), [(_far_outlier, 0.1), (_sparse, 2e-6)])
def test_wide_leaves_cost_no_digits(make, eps, rng):
    c = make(rng).require_grad()
    with torch.no_grad():
        got = c.solve(eps, method="multiscale", tol=1e-4, max_iters=50)
    assert true_error(c, eps, *got.potentials) <= got.marginal_error + 1e-6
    assert got.marginal_error < 1
    grads = c.grads(c.loss(eps, method="multiscale", tol=1e-3, max_iters=50))
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")  # the error holds all the same
@pytest.mark.parametrize("total", [1.0, 700.0])
def test_rounding_is_within_the_error(total, rng):
    """Of few distinct points, of costs far larger than eps: what is rounded of the points, of the
    potentials, or again where these are brought to other totals, is off in one direction."""
    for _ in range(10):
        x, y = (randn(rng, 2, 3)[torch.randint(2, (n,), generator=rng)] for n in (N, M))
        a, b = (total * make_weights(rng, (n,), "random") for n in (N, M))
        c = Clouds(x, y + 3, a, b).to(torch.float32)
        got = c.solve(1e-3, method="multiscale", tol=TOL, max_iters=50)
        assert true_error(c, 1e-3, *got.potentials) <= 1.02 * got.marginal_error + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_at_the_potentials(kind, rng):
    """Of all pairs in float64, but for what may be left out, over the largest distance."""
    c, eps = made(kind, rng, torch.float32, 0.05)
    c.x.requires_grad_(), c.y.requires_grad_()
    result = c.solve(eps, method="multiscale", tol=TOL)
    got = torch.autograd.grad(result.value, (c.x, c.y))
    potentials = [v.detach() for v in result.potentials]
    f, g = (v.double() for v in potentials)
    fine = c.double()
    a, b = fine.weights()
    cost = (fine.x[:, None] - fine.y).square().sum(-1)
    P = torch.where(a[:, None] * b > 0, a[:, None] * b * ((f[:, None] + g - cost) / eps).exp(), 0)
    cost = torch.where(P > 0, cost, 0)  # padding lies anywhere
    allowed = 2 * float(cost.amax().sqrt()) * (TOL / 20 + rounding(fine, eps, *potentials))
    for z, other, plan, grad in ((fine.x, fine.y, P, got[0]), (fine.y, fine.x, P.T, got[1])):
        right = 2 * (plan.sum(1)[:, None] * z - plan @ other)
        assert float((grad.double() - right).norm(dim=1).sum()) <= allowed


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_points_and_weights(kind, rng):
    """At a tol that makes them exact: with outliers 1e-3 leaves up to 2%, by any method."""
    c, eps = made(kind, rng, torch.float64, 0.05)
    c = Clouds(c.x, c.y, *c.weights()).require_grad()
    fine = c.double().require_grad()
    got = c.grads(c.loss(eps, method="multiscale", tol=TOL / 10))
    right = fine.grads(fine.loss(eps, method="dense", tol=1e-8, max_iters=5000))
    for one, other, w in zip(got, right, (*c.weights(), *c.weights()), strict=True):
        if one.dim() == 1:  # known up to a constant where totals are held
            one, other = (t * (w > 0) for t in (one.double(), other))
            one, other = (t - (w * t).sum() / w.sum() for t in (one, other))
            size = float((w * other.abs()).sum().detach())
            assert (w * (one - other).abs()).sum() <= 0.02 * size + 2 * TOL * eps
        else:
            scale = float(2 * (w[:, None] * (c.x.amax() - c.x.amin())).detach().norm())
            assert float((one - other).norm()) <= 5 * TOL * (float(other.norm()) + 0.02 * scale)


def test_gradients_are_derivatives(rng):
    """Of the value that is returned, by differences: in float64, where tol can be small."""
    c = clouds(rng, 700, 600, 3, weights="random").require_grad()
    options = {"method": "multiscale", "tol": 1e-5}
    grads = c.grads(c.loss(0.1, **options))
    directions = [randn(rng, *t.shape) for t in c.inputs()]
    for k, w in ((2, c.a), (3, c.b)):  # along changes that keep the total
        directions[k] = w.detach() * (directions[k] - (w.detach() * directions[k]).sum())
    slopes = []
    for h in (2e-3, -2e-3):
        pairs = zip(c.inputs(), directions, strict=True)
        moved = Clouds(*[(t + h * v).detach() for t, v in pairs])
        slopes.append(moved.loss(0.1, **options) / 4e-3)
    expected = float(slopes[0] - slopes[1])
    found = [float((g * v).sum()) for g, v in zip(grads, directions, strict=True)]
    assert abs(sum(found) - expected) <= 1e-3 * sum(map(abs, found))


@pytest.mark.parametrize("hardness", [1.0, 0.02])
def test_what_a_result_offers(hardness, rng):
    c, eps = made("shapes", rng, torch.float32, hardness)
    weights = (make_weights(rng, (len(z),), "padded").float() for z in (c.x, c.y))
    c = Clouds(c.x, c.y, *weights)
    with torch.no_grad():
        got = c.solve(eps, method="multiscale", tol=TOL)
        f, g = got.potentials
        P = c.double().solve(eps, method="dense", init=(f.double(), g.double()), n_iters=1)
        right = got.plan  # of its potentials
        fresh = c.solve(eps, method="multiscale", tol=TOL)
    assert fresh.explain() == "multiscale on cpu"
    u, v = randn(rng, N, 2).float(), randn(rng, M).float()
    for one, other in (
        (fresh.apply(v), right @ v),
        (fresh.apply(u, axis=0), right.T @ u),
        (fresh.marginals[0], right.sum(1)),
        (fresh.marginals[1], right.sum(0)),
        (fresh.value_linear, got.value_linear),
        (fresh.barycentric_map(), got.barycentric_map()),
    ):
        assert float((one - other).norm()) <= 2 * TOL * float(other.norm())
    there = c.a > 0
    extended = fresh.extend(c.x)[there]
    assert float(c.a[there] @ (extended - f[there]).abs()) <= 2 * TOL * eps
    assert P.plan.shape == (N, M)


def test_products_where_eps_is_large(rng):
    """Polynomials in place of exponentials, which are right where these are near 1."""
    c = Clouds(rand(rng, 2200, 3), rand(rng, 2100, 3), None, None)
    with torch.no_grad():
        result = c.solve(10.0, method="multiscale", tol=1e-5)
        f, g = result.potentials
        P = ((f[:, None] + g - (c.x[:, None] - c.y).square().sum(-1)) / 10).exp() / (2200 * 2100)
        assert float((result.apply(torch.ones_like(g)) - P.sum(1)).abs().sum()) <= 2e-6


def _other_points(c: Clouds, rng: torch.Generator) -> Tensor:
    """Points of either cloud, some of them twice, between them and far from both."""
    near, size = torch.cat([c.x, c.x[:5], c.y]), 1 + float(c.x.abs().amax())
    apart = near[:50] + size * randn(rng, len(near[:50]), c.x.shape[1]).to(c.x.dtype)
    return torch.cat([near, apart, 40 * apart])


@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")  # they hold all the same
@pytest.mark.parametrize(
    ("hardness", "strength", "cost", "dtype"),
    [
        (1.0, None, "sqeuclidean", torch.float32),
        (0.02, None, "sqeuclidean", torch.float64),
        (0.02, None, "cosine", torch.float32),
        (0.02, 0.7, "sqeuclidean", torch.float32),
        (0.005, (None, 2.0), "sqeuclidean", torch.float64),
    ],
)
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("one", "line")])
def test_gap_and_new_points_without_all_pairs(
    kind, hardness, strength, cost, dtype, rng, monkeypatch
):
    """The gap is that of all pairs, but that its plan lacks what is left out."""
    c, eps = made(kind, rng, dtype, hardness)
    eps = hardness if cost == "cosine" else eps
    options = {"method": "multiscale", "cost": cost, "unbalanced": strength, "tol": TOL}
    new = _other_points(c, rng)
    with torch.no_grad():
        result = c.solve(eps, max_iters=30, **options)
        with monkeypatch.context() as patch:
            patch.setattr("otloss.result.build_costs", None)  # nothing else reads pairs
            patch.setattr("otloss.result.in_blocks", None)
            gap, extended = result.duality_gap, result.extend(new)
        monkeypatch.setattr(type(result), "_prunes", lambda *_: False)
        right = result.duality_gap
        g, b = (v.double() for v in (result.potentials[1], c.weights()[1]))
        C = otloss.cost_matrix(new.double(), c.y.double(), cost)
        f = -eps * torch.where(b > 0, b.log() + (g - C) / eps, -torch.inf).logsumexp(1)
        if strength == 0.7:
            f *= strength / (strength + eps)
    rounding = 1e-12 * float(f.abs().mean() + g.abs().mean())
    assert abs(gap - right) <= 1e-4 * right + 2e-7 * eps + rounding
    allowed = 1e-6 * eps + rounding + 2 * torch.finfo(dtype).eps * f.abs()
    assert ((extended.double() - f).abs() <= allowed).all()


@pytest.mark.parametrize("outlier", [0.0, 60.0])  # of which e^{-f / rho} is 0 in double
@pytest.mark.parametrize("shift", [0.0, 8.0])
def test_gap_of_little_that_is_transported(shift, outlier, rng, monkeypatch):
    """What is left out of it is little of the plan, and points of none hide nothing."""
    x, y = randn(rng, N, 2), randn(rng, M, 2) + shift
    x[0] += outlier
    with torch.no_grad():
        result = Clouds(x, y, None, None).solve(
            0.1, method="multiscale", unbalanced=2.0, tol=1e-4, max_iters=200
        )
        assert result.converged
        gap, mass = result.duality_gap, float(result.marginals[0].sum())
        monkeypatch.setattr(type(result), "_prunes", lambda *_: False)
        right = result.duality_gap
    assert abs(gap - right) <= 1e-4 * right + 2e-8 * mass + 1e-14


def test_points_without_a_place_are_extended_by_all_pairs(rng):
    """Those of no direction, and those that are not finite."""
    c = _shapes(rng).to(torch.float32)
    with torch.no_grad():
        result = c.solve(0.1, method="multiscale", cost="cosine", tol=TOL)
        found = result.extend(torch.stack([torch.zeros(3), c.x[0]]))
        assert_close(found[1:], result.extend(c.x[:1]))
        direct = -0.1 * ((result.potentials[1].double() - 1) / 0.1).exp().mean().log()
        assert_close(found[0].double(), direct, rtol=1e-5, atol=1e-6)
        assert result.extend(torch.full((1, 3), torch.nan)).isnan().all()


def test_derivatives_of_a_result_are_those_of_all_pairs(rng):
    """Products that have a gradient, and potentials, by the implicit one."""
    c = clouds(rng, 300, 250, 2).require_grad()
    options = {"tol": 1e-5}
    weight = randn(rng, 300)
    for quantity in (
        lambda r: (r.barycentric_map() * weight[:, None]).sum(),
        lambda r: r.potentials[0] @ weight,
        lambda r: r.value_linear,
    ):
        results = [c.solve(0.2, method=m, **options) for m in ("multiscale", "dense")]
        one, other = (c.grads(quantity(r)) for r in results)
        for got, right in zip(one, other, strict=True):
            assert float((got - right).norm()) <= 1e-3 * float(right.norm())


@pytest.mark.parametrize("options", [{}, {"unbalanced": (0.5, None)}, {"cost": "cosine"}], ids=str)
@pytest.mark.parametrize("eps", [1.0, 0.2])
def test_implicit_gradients_from_lists(eps, options, rng):
    """Of both potentials, of one of a cloud against itself, and of transport values."""
    c = clouds(rng, 700, 600, 3, weights="random").require_grad()
    v, w = randn(rng, 700), randn(rng, 600)

    def potentials(c: Clouds, **how) -> Tensor:
        f, g = c.solve(eps, **options, **how).potentials
        return f @ v.to(f) + g @ w.to(g)

    def own(c: Clouds, **how) -> Tensor:  # f + g is determined where the plan falls apart
        r = otloss.solve_sample(c.x, c.x, eps, a=c.a, b=c.a, **options, **how)
        return sum(r.potentials) @ v.to(c.x) + 0 * (c.y.sum() + c.b.sum())

    def transport(c: Clouds, **how) -> Tensor:
        return c.loss(eps, objective="transport", **options, **how)

    for quantity in (potentials, own, transport):
        found = c.grads(quantity(c, method="multiscale", tol=1e-5))
        right = c.grads(quantity(c, method="dense", tol=1e-9, max_iters=5000))
        for got, expected in zip(found, right, strict=True):
            assert float((got - expected).norm()) <= 2e-3 * float(expected.norm())


def test_second_derivatives(rng):
    c = clouds(rng, 200, 150, 2).require_grad()
    found = []
    for method in ("multiscale", "dense"):
        (grad,) = torch.autograd.grad(c.loss(0.2, method=method, tol=1e-5), c.x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), c.x)[0])
    assert float((found[0] - found[1]).norm()) <= 1e-3 * float(found[1].norm())


@pytest.mark.parametrize("strength", [0.5, (2.0, 0.1), (None, 0.5)], ids=str)
def test_unbalanced(strength, rng):
    c = clouds(rng, N, M, 2, weights="random")
    c = Clouds(c.x, c.y, c.a, 1.5 * c.b).to(torch.float32).require_grad()
    fine = c.double().require_grad()
    options = {"unbalanced": strength}
    got = c.loss(0.1, method="multiscale", tol=TOL, **options)
    right = fine.loss(0.1, method="dense", tol=1e-8, max_iters=5000, **options)
    assert (got - right).abs().item() <= 20 * TOL * right.abs().item()
    for one, other in zip(c.grads(got), fine.grads(right), strict=True):
        assert float((one - other).norm()) <= 10 * TOL * float(other.norm())


@pytest.mark.parametrize(("shift", "eps"), [(4.0, 0.1), (14.0, 20.0)])
def test_little_of_an_unbalanced_plan(shift, eps, rng):
    """Of all of it, or of the rows of a part that is far: what is left out is little of these."""
    x, y = randn(rng, N, 2), randn(rng, M, 2)
    options = {"unbalanced": 2.0}
    for to_y in (y + shift, torch.cat([y[300:], y[:300] + shift])):
        c = Clouds(x.clone(), to_y, None, None).require_grad()
        with torch.no_grad():
            got = c.solve(eps, method="multiscale", tol=TOL, **options)
            means = [
                got.apply(to, axis) / got.marginals[1 - axis][:, None]
                for axis, to in ((1, c.y), (0, c.x))
            ]
            P = got.plan  # all of it
            for mean, part, to in zip(means, (P, P.T), (c.y, c.x), strict=True):
                assert float((mean - part @ to / part.sum(1)[:, None]).norm(dim=1).max()) < 0.01
        ways = []
        for method, tol in (("multiscale", TOL / 10), ("dense", 1e-9)):
            of = {**options, "method": method, "tol": tol}
            (f, g), loss = c.solve(eps, **of).potentials, c.loss(eps, debiased=False, **of)
            ways.append([*c.grads(loss), *c.grads(f.square().mean() + g.square().mean())])
        for one, other in zip(*ways, strict=True):
            assert float((one - other).norm()) <= 10 * TOL * float(other.norm())


@pytest.mark.parametrize("method", ["multiscale", "dense", "streamed"])
@pytest.mark.parametrize(
    ("spread", "rho"), [(1.0, 1.0), (1.0, 0.5), (0.3, 0.5), (0.3, 0.2), (1.0, 0.1), (1.0, 0.05)]
)
def test_points_that_hold_nearly_nothing_hide_no_others(spread, rho, method, rng):
    """Marginals span up to 50 orders, or 180, or all are below 1e-30; a gradient of potentials
    is that of the linear system in the masses that they move, which is well conditioned."""
    if rho < 0.2 and method != "multiscale":
        pytest.skip("below 1e-308 other methods have nothing")
    eps, n = 0.1, 600
    x, y = spread * randn(rng, n, 3), spread * randn(rng, n, 3)
    c = Clouds(x, y + torch.tensor([8.0, 0, 0]), None, None).require_grad()
    with torch.no_grad():
        f, g = c.solve(eps, unbalanced=rho, method="dense", tol=1e-11, max_iters=5000).potentials
        log_P = (f[:, None] + g - (c.x[:, None] - c.y).square().sum(-1)) / eps - 2 * math.log(n)
        of_row, of_column = log_P.softmax(1), log_P.softmax(0)
        damping, f_bar, g_bar = rho / (rho + eps), randn(rng, n), randn(rng, n)
        matrix = torch.eye(n).double() / damping - damping * of_row.T @ of_column
        moved_y = torch.linalg.solve(matrix, g_bar - damping * of_row.T @ f_bar)
        moved_x = damping * (f_bar - of_column @ moved_y)
        both = of_row * moved_x[:, None] + of_column * moved_y
        right = 2 * (both.sum(1)[:, None] * c.x - both @ c.y)
        right = right, 2 * (both.sum(0)[:, None] * c.y - both.T @ c.x)
    tol, allowed = (1e-5, 1e-4) if method == "multiscale" else (1e-11, 1e-7)
    options = {"unbalanced": rho, "method": method, "tol": tol, "max_iters": 5000}
    f, g = c.solve(eps, init=(f, g), **options).potentials  # tol is of all that moves
    found = torch.autograd.grad(f @ f_bar + g @ g_bar, (c.x, c.y))
    for one, other in zip(found, right, strict=True):
        assert float((one - other).norm()) <= allowed * float(other.norm())


@pytest.mark.parametrize("method", ["dense", "streamed"])
def test_a_gradient_that_is_out_of_range_is_told(method, rng):
    """Of potentials of points of which single precision holds nothing; multiscale has it."""
    x, y = randn(rng, 100, 2), randn(rng, 100, 2)
    x[:3] += 7
    c = Clouds(x, y, None, None).to(torch.float32).require_grad()
    options = {"unbalanced": 0.5, "tol": 1e-4}
    fine = c.double().require_grad()
    (right,) = torch.autograd.grad(
        fine.solve(0.1, method="dense", **options).potentials[0].sum(), fine.x
    )
    (got,) = torch.autograd.grad(
        c.solve(0.1, method="multiscale", **options).potentials[0].sum(), c.x
    )
    assert float((got - right).norm()) <= 10 * TOL * float(right.norm())
    f = c.solve(0.1, method=method, **options).potentials[0]
    with pytest.warns(otloss.ConvergenceWarning, match="linear system"):
        f.sum().backward()


@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")  # of rounded potentials
@pytest.mark.parametrize("rho", [2.0, 0.5])
def test_transport_of_little(rho, rng):
    """<P, C> is of what is transported, not of the weights."""
    x, y = 0.4 * randn(rng, N, 3), 0.4 * randn(rng, M, 3) + torch.tensor([8.0, 0, 0])
    c, options = Clouds(x, y, None, None), {"unbalanced": rho, "objective": "transport"}
    right = c.solve(0.1, method="dense", tol=1e-9, **options).value
    got = c.to(torch.float32).solve(0.1, method="multiscale", tol=1e-5, **options).value
    assert abs(float(got / right) - 1) <= 10 * TOL


def test_a_batch_is_its_problems(rng):
    c = clouds(rng, 1200, 1100, 3, batch=3, weights="random", dtype=torch.float32).require_grad()
    value = c.loss(0.05, method="multiscale")
    grads = c.grads(value)
    for k in range(3):
        one = c.item(k).require_grad()
        alone = one.loss(0.05, method="multiscale")
        assert torch.allclose(value[k], alone, rtol=1e-5)
        for together, own in zip(grads, one.grads(alone), strict=True):
            assert float((together[k] - own).norm()) <= TOL * float(own.norm())


def test_two_threads_agree_with_one(rng, threads):
    c = _shapes(rng).to(torch.float32).require_grad()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        value = c.loss(0.01, method="multiscale")
        found.append((value.detach(), *c.grads(value)))
    assert abs(float(found[0][0] - found[1][0])) <= TOL * float(found[0][0])
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert float((one - other).norm()) <= 2 * TOL * float(other.norm())


def test_cosine(rng):
    c = Clouds(randn(rng, N, 3), randn(rng, M, 3) + 0.5, None, None).to(torch.float32)
    c.require_grad()
    fine = c.double().require_grad()
    got = c.loss(0.02, cost="cosine", method="multiscale")
    right = fine.loss(0.02, cost="cosine", method="dense", tol=1e-8)
    assert (got - right).abs().item() <= 20 * TOL * right.item()
    for one, other in zip(c.grads(got), fine.grads(right), strict=True):
        assert float((one - other).norm()) <= 5 * TOL * float(other.norm())
    x = c.x.detach().clone()
    x[7] = 0  # has cost 1 to all others, which is no distance on the sphere
    with pytest.raises(NotImplementedError, match="needs points of norm > 0 under cosine"):
        otloss.solve_sample(x, c.y, 0.02, cost="cosine", method="multiscale")
    a = torch.ones(N).index_fill(0, torch.tensor([7]), 0.0)
    otloss.solve_sample(x, c.y, 0.02, a=a / a.sum(), cost="cosine", method="multiscale")


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
def test_gradients_of_some_clouds(wanted, rng):
    c, eps = made("shapes", rng, torch.float32, 0.05)
    found = []
    for chosen in (wanted, (0, 1)):
        points = [c.x.clone(), c.y.clone()]
        sought = [points[k].requires_grad_() for k in chosen]
        value = otloss.sinkhorn_loss(*points, eps, method="multiscale")
        found.append(dict(zip(chosen, torch.autograd.grad(value, sought), strict=True)))
    assert all(torch.allclose(found[0][k], found[1][k], rtol=1e-5, atol=1e-8) for k in wanted)


def test_orders_are_kept_by_points_and_which_have_weight(rng):
    c, eps = made("shapes", rng, torch.float64, 0.05)
    for dropped in (0, 5, 9, 5):
        a = torch.ones(N, dtype=torch.float64)
        a[:dropped] = 0
        weighted = Clouds(c.x, c.y, a / a.sum(), None)
        with torch.no_grad():
            got = weighted.solve(eps, method="multiscale", tol=TOL)
        assert got.converged
        assert true_error(weighted, eps, *got.potentials) <= TOL


def test_large_clouds_of_a_divergence(rng):
    """From 20 000 points on each problem is solved over all threads."""
    x, y = rand(rng, 10_200, 2).float().requires_grad_(), rand(rng, 9_900, 2).float() + 0.2
    options = {"eps": 0.02, "method": "multiscale"}
    terms = [(1.0, x, y), (-0.5, x, x), (-0.5, y, y)]
    alone = sum(c * otloss.sinkhorn_loss(u, v, **options) for c, u, v in terms)
    together = otloss.sinkhorn_divergence(x, y, **options)
    grads = [torch.autograd.grad(value, x)[0] for value in (together, alone)]
    assert abs(float((together - alone).detach())) <= 1e-5 * float(alone.detach())
    assert float((grads[0] - grads[1]).norm()) <= 1e-4 * float(grads[1].norm())


def test_small_groups_far_away(rng):
    """That no centroid of the coarsest level stands for: mass goes from one to another."""
    centres = 60 * randn(rng, 30, 3)

    def cloud(n: int) -> Tensor:
        group = torch.randint(30, (n,), generator=rng)
        group = torch.where(rand(rng, n) < 0.985, group % 3, group)
        return centres[group] + 0.1 * randn(rng, n, 3)

    x, y = cloud(N), cloud(M)
    with torch.no_grad():
        got = otloss.solve_sample(x, y, 0.1, method="multiscale", tol=TOL)
    right = float(exact(Clouds(x, y, None, None), 0.1).value)
    assert got.converged
    assert abs(float(got.value) - right) <= 20 * TOL * right


def test_warm_starts(rng):
    c, eps = made("shapes", rng, torch.float32, 0.02)
    with torch.no_grad():
        first = c.solve(eps, method="multiscale", tol=TOL)
        again = c.solve(eps, method="multiscale", tol=TOL, init=first)
        assert again.n_iters < max(3, first.n_iters)
        assert abs(float(again.value - first.value)) <= TOL * float(first.value)
        loss = otloss.SinkhornDivergence(eps, method="multiscale", warm_start=True)
        values = [float(loss(c.x, c.y)) for _ in range(3)]
    right = float(c.double().loss(eps, method="dense", tol=1e-8))
    assert all(abs(v - right) <= 20 * TOL * right for v in values)


def test_where_all_pairs_take_less_time_it_goes_on_with_them(rng, threads):
    """A full cloud in eight dimensions; by bounds alone it takes four times as long."""
    torch.set_num_threads(1)
    x, y = randn(rng, 2500, 8).float(), randn(rng, 2500, 8).float() + 0.1

    def solved(method: str) -> tuple[float, float]:
        start = time.process_time()
        with torch.no_grad():
            got = otloss.solve_sample(x, y, 0.1, method=method, tol=TOL)
        seconds = time.process_time() - start
        assert got.converged
        assert true_error(Clouds(x, y, None, None), 0.1, *got.potentials) <= 1.01 * TOL
        return seconds, float(got.value)

    times, values = zip(
        *(
            map(min, zip(*(solved(m) for _ in range(3)), strict=True))
            for m in ("multiscale", "streamed")
        ),
        strict=True,
    )
    assert times[0] < 2 * times[1]
    assert abs(values[0] - values[1]) <= TOL * values[1]


def test_transport(rng):
    c, eps = made("shapes", rng, torch.float32, 0.05)
    c.require_grad()
    fine = c.double().require_grad()
    options = {"objective": "transport", "backward": "envelope"}
    got = c.loss(eps, method="multiscale", **options)
    right = fine.loss(eps, method="dense", tol=1e-8, **options)
    assert (got - right).abs().item() <= 20 * TOL * right.item()
    for one, other in zip(c.grads(got), fine.grads(right), strict=True):
        assert float((one - other).norm()) <= 5 * TOL * float(other.norm())


REFUSED = {
    "cost": {"cost": "euclidean"},
    "function": {"cost": lambda x, y: torch.cdist(x, y)},
    "n_iters": {"n_iters": 5},
    "tol": {"tol": 1e-7},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_do_is_refused_by_name(options):
    x = torch.zeros(10, 3)
    with pytest.raises(NotImplementedError, match='method="multiscale" needs'):
        otloss.sinkhorn_divergence(x, x, 0.1, method="multiscale", **options)


def test_many_dimensions_and_matrices_are_refused_by_name():
    x = torch.zeros(10, 9)
    with pytest.raises(NotImplementedError, match="at most 8 dimensions, got 9"):
        otloss.solve_sample(x, x, 0.1, method="multiscale")
    with pytest.raises(NotImplementedError, match="needs the points"):
        otloss.solve(torch.zeros(4, 4), 0.1, method="multiscale")
    with pytest.raises(ValueError, match="method must be one of"):
        otloss.energy_distance(x, x, method="multiscale")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_it_is_ended_by_a_signal(rng):
    x, y = (randn(rng, 60_000, 3).float() for _ in range(2))
    with ended(after=0.2):
        otloss.sinkhorn_divergence(x, y, 1e-3, tol=1e-5, method="multiscale")


def test_compiled_it_is_one_graph(rng):
    c = _shapes(rng).to(torch.float32).require_grad()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return otloss.sinkhorn_divergence(x, y, 0.02, method="multiscale")

    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(c.x, c.y)
    eager = loss(c.x, c.y)
    assert torch.equal(value, eager)
    for one, other in zip(c.grads(value), c.grads(eager), strict=True):
        assert torch.equal(one, other)


def test_auto_takes_it_where_neighbours_have_few_dimensions(rng, monkeypatch):
    monkeypatch.setattr(methods, "MULTISCALE_FROM", 0)
    x, y = _shapes(rng).x.float(), _shapes(rng).y.float()

    def chosen(x: Tensor, y: Tensor, eps: float, **options) -> bool:
        return otloss.solve_sample(x, y, eps, **options).explain() == "multiscale on cpu"

    assert chosen(x, y, 1e-3)
    plane = randn(rng, 2, 7).float()
    assert chosen(randn(rng, N, 2).float() @ plane, randn(rng, M, 2).float() @ plane, 0.1)
    assert not chosen(randn(rng, N, 7).float(), randn(rng, M, 7).float(), 0.1)
    assert not chosen(x, y, 1e-3, n_iters=3)
    assert not chosen(x, y, 1e-3, cost="euclidean")
    monkeypatch.undo()
    assert not chosen(x, y, 1e-3)


def test_auto_takes_it_on_a_gpu_where_few_pairs_are_near(rng):
    """The rule alone, on tensors that are not there."""
    options, cloud = check_options(1e-3), _sphere(rng, 20_000).float()

    def chosen(x: Tensor, pairs: list[int], **changes) -> bool:
        weights = [torch.full((1, len(x)), 1 / len(x))] * 2
        return methods._pays_on_gpu([x, x], weights, pairs, options._replace(**changes))

    pair, three = [0, 1], [0, 1, 0, 0, 1, 1]
    assert chosen(cloud, pair)
    assert not chosen(cloud, pair, eps=1.0)
    assert not chosen(cloud, pair, cost="cosine")
    assert not chosen(randn(rng, N, 7).float(), pair)
    learned = cloud.clone().requires_grad_()
    assert chosen(learned, three)
    assert not chosen(learned, pair)  # whose potentials may be asked for a gradient
    assert chosen(learned, pair, backward="envelope")
    with torch.no_grad():
        assert chosen(learned, pair)
    assert not chosen(cloud, three, eps=torch.tensor(1e-3, requires_grad=True))
