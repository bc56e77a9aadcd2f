"""Small mass that has to go far: clusters far apart whose masses differ by less than the tolerance.

The marginal error does not see it. A solve that has converged is proven by its duality gap.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from backends import BACKENDS, CPU
from helpers import METHODS, Clouds, randn, some_of
from torch import Tensor

import otloss
from otloss.reference.engine import DenseEngine
from otloss.reference.far_mass import UNSEEN
from otloss.reference.marginals import BALANCED
from otloss.reference.semidual import evaluate

TOL = 1e-3  # the default


def two_clusters(gap: float, apart: float = 100) -> Clouds:
    """With masses that differ by ``gap`` of a half."""
    rng = torch.Generator().manual_seed(0)
    x, y = (0.1 * torch.randn(100, 2, generator=rng).double() for _ in range(2))
    a, b = torch.full((2, 100), 0.01).double()
    x[:50, 0] += apart
    y[:50, 0] += apart
    b[:50] *= 1 + gap
    b[50:] *= 1 - gap
    return Clouds(x, y, a, b)


def many_clusters(rng: torch.Generator, k: int, distance: float) -> Clouds:
    """Of unequal size, and masses that differ by up to a few percent."""
    centres = distance * randn(rng, k, 3)
    x, y = (
        centres.repeat_interleave(torch.arange(k) + 5, dim=0) + 0.1 * randn(rng, 2, 1, 3)[i]
        for i in range(2)
    )
    x, y = (z + 0.1 * randn(rng, *z.shape) for z in (x, y))
    a, b = (torch.ones(len(z)).double() / len(z) for z in (x, y))
    b[: len(b) // 2] *= 1.03
    return Clouds(x, y, a, b / b.sum())


def solve(c: Clouds, eps: float = 1.0, **options: object) -> otloss.OTResult:
    return otloss.solve_sample(c.x, c.y, eps, a=c.a, b=c.b, **options)


def proven(c: Clouds, eps: float = 1.0, **options: object) -> float:
    """The value, to six digits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otloss.ConvergenceWarning)  # of rounding
        result = solve(c, eps, **{**options, "tol": 1e-10, "max_iters": 5000, "method": "dense"})
    assert result.duality_gap <= 1e-6 * abs(float(result.value))
    return float(result.value)


def divergence_and_gradient(c: Clouds, **options: object) -> tuple[float, Tensor]:
    x = c.x.clone().requires_grad_()
    loss = otloss.sinkhorn_divergence(x, c.y, 1.0, a=c.a, b=c.b, **options)
    return loss.item(), torch.autograd.grad(loss, x)[0]


@some_of("backend, gap", BACKENDS, [3e-3, 1e-3])
def test_two_clusters(backend, gap):
    c, value, method = two_clusters(gap), {3e-3: 15.6276, 1e-3: 5.69803}[gap], backend.method
    result = solve(c.to(backend.device), method=method)
    assert result.converged
    assert result.n_iters < (20 if backend.name in CPU else 30)  # a GPU lumps rows together
    assert result.duality_gap <= 20 * TOL * value
    assert float(result.value) == pytest.approx(value, rel=1e-4)
    assert proven(c) == pytest.approx(value, rel=1e-5)
    expected, its_gradient = divergence_and_gradient(c, tol=1e-10)
    # In the gradient the far mass, about as much as the tolerance, is off by a part.
    for tol, off in ((TOL, 0.25), (1e-5, 0.01)):
        loss, gradient = divergence_and_gradient(c, method=method, tol=tol)
        assert loss == pytest.approx(expected, rel=tol)
        assert (gradient - its_gradient).norm() <= off * its_gradient.norm()


@pytest.mark.parametrize("gap", [0.1, 0.2, 0.5])
def test_a_start_that_only_seems_near(gap):
    """Its error is small, but mass has to go ten million eps far."""
    c = two_clusters(gap, apart=1000)
    result = otloss.solve(torch.cdist(c.x, c.y).square(), 0.1, a=c.a, b=c.b)
    assert result.converged
    assert result.n_iters < 150  # 163 to 460 where no larger eps is gone through


@some_of("backend, distance, k", BACKENDS, [10.0, 300.0], [3, 8], quick=3)
def test_many_clusters(backend, distance, k, rng):
    c = many_clusters(rng, k, distance)
    result = solve(c.to(backend.device), method=backend.method)
    assert result.converged
    assert float(result.value) == pytest.approx(proven(c), rel=1e-2)


@pytest.mark.parametrize("strength", [1e6, 1e3, (None, 1e5), (1e5, None), 1.0], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_soft_marginals(method, strength, rng):
    """Mass goes far where a penalty holds it more than the way costs."""
    for c in (two_clusters(3e-3), many_clusters(rng, 5, 30.0)):
        result = solve(c, unbalanced=strength, method=method)
        assert result.converged
        assert result.n_iters < 60
        assert float(result.value) == pytest.approx(proven(c, unbalanced=strength), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_float32_and_costs_of_either_sign(method, rng):
    """A batch of a far and an ordinary problem; then costs whose value is near 0."""
    far, near = many_clusters(rng, 4, 3.0), many_clusters(rng, 4, 0.1)
    pairs = [(far.x, near.x), (far.y, near.y), (far.a, near.a), (far.b, near.b)]
    x, y, a, b = (torch.stack(pair) for pair in pairs)
    values = [proven(c, 0.5) for c in (far, near)]
    single = [t.float() for t in (x, y, a, b)]
    batch = otloss.solve_sample(*single[:2], 0.5, a=single[2], b=single[3], method=method)
    assert batch.converged.all()
    torch.testing.assert_close(batch.value.double(), x.new_tensor(values), rtol=1e-2, atol=0)
    if method == "streamed":
        return
    C = otloss.cost_matrix(near.x, near.y) - values[1]
    result = otloss.solve(C, 0.5, a=near.a, b=near.b, method=method)
    assert result.converged
    assert abs(float(result.value)) < 1e-3


def test_a_doubtful_solve_has_not_converged(rng):
    """Where sweeps do not suffice for a proof the warning says what is the matter."""
    c = two_clusters(9e-4)
    with pytest.warns(otloss.ConvergenceWarning, match="far"):
        result = solve(c, max_iters=3)
    assert not result.converged
    assert result.n_iters == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_makes_columns_lack(dtype):
    """Equal costs, so that nothing has to move: less than is left out of the bound of the value."""
    rng, unit = torch.Generator().manual_seed(0), torch.finfo(dtype).eps
    for n, m in torch.randint(1, 400, (100, 2), generator=rng).tolist():
        a, b = (10 ** (-12 * torch.rand(k, generator=rng).double()) for k in (n, m))
        a, b = (a / a.sum()).to(dtype), (b / b.sum()).to(dtype)
        b = (b.double() * (a.double().sum() / b.double().sum())).to(dtype)
        eps, zero = 10 ** float(4 * torch.rand(1, generator=rng)), torch.zeros_like(b)
        engine = DenseEngine(torch.rand(1, 1, generator=rng).to(dtype).expand(n, m), a, b, BALANCED)
        point = evaluate(engine, eps, zero)
        lacking = point.target.double() * (1 - point.ratio.double())
        assert lacking.clamp(min=0).sum() <= UNSEEN * unit * engine.mass[1]


@pytest.mark.parametrize("k", [6, 90])
def test_rows_split_between_threads(k, rng, threads):
    """And more groups than are shifted at once."""
    centres = 100 * randn(rng, k, 2)
    x, y = (centres.repeat(780 // k, 1) + 0.1 * randn(rng, 780 // k * k, 2) for _ in range(2))
    b = torch.ones(len(y)).double()
    b[::k] *= 1.1
    c = Clouds(x, y, torch.ones(len(x)).double() / len(x), b / b.sum())
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(solve(c))
    assert all(r.converged and r.duality_gap <= 20 * TOL * float(r.value) for r in results)
    torch.testing.assert_close(results[0].value, results[1].value, rtol=1e-3, atol=0)
