"""The multiscale engine's CUDA kernels, on a GPU or run on the host: by property against float64,
at sizes where all pairs can be looked at. Clouds and properties are those of the CPU's engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import test_multiscale as on_cpu
import torch
from backends import HAS_COMPILER, HAS_GPU, emulated, serving
from helpers import Clouds, clouds, make_weights, rand, randn
from test_multiscale import KINDS, TOL, exact, made, rounding, true_error
from torch import Tensor

import otloss
from otloss import ops

pytestmark = pytest.mark.skipif(not ops.NATIVE, reason="needs the native library")

N, M = 700, 600  # a level above the finest, and leaves that are not full
HARD = ["shapes", "clusters", "wide", "padded", "duplicates", "eight"]

Gpu = Callable[..., Iterator[str]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu, "N", N)
    monkeypatch.setattr(on_cpu, "M", M)


@contextmanager
def on_host(**device: int) -> Iterator[str]:
    with serving(emulated(), **device):
        yield "cpu"


@contextmanager
def on_device() -> Iterator[str]:
    yield "cuda"


GPUS = [
    pytest.param(
        on_host,
        id="emulated",
        marks=[pytest.mark.skipif(not HAS_COMPILER, reason="needs g++"), pytest.mark.slow],
    ),
    pytest.param(on_device, id="cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")),
]
on_gpu = pytest.mark.parametrize("gpu", GPUS)


def solved(c: Clouds, eps: float, gpu: Gpu, **options) -> otloss.OTResult:
    """Without a gradient, and with what it knows on the host."""
    with gpu() as device, torch.no_grad():
        got = c.to(device).solve(eps, method="multiscale", **{"tol": TOL, **options})
        assert got.n_iters is not None  # read here
    return got


def on_cpu_again(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.detach().cpu() for t in tensors]


def differentiated(c: Clouds, eps: float, gpu: Gpu, **options) -> tuple[Tensor, list[Tensor]]:
    with gpu() as device:
        loss = c.to(device).loss(eps, method="multiscale", **options)
        return loss.detach().cpu(), on_cpu_again(c.grads(loss))


@on_gpu
@pytest.mark.parametrize("hardness", [1.0, 0.02])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_marginals(kind, hardness, gpu, rng):
    dtype = torch.float64 if hardness < 1 and kind in HARD else torch.float32
    c, eps = made(kind, rng, dtype, hardness)
    got, right = solved(c, eps, gpu), exact(c, eps)
    f, g = on_cpu_again(got.potentials)
    assert got.converged
    assert true_error(c, eps, f, g) <= got.marginal_error + rounding(c, eps, f, g)
    assert got.marginal_error <= TOL
    below = float(right.value) - float(got.value)
    noise = 64 * torch.finfo(dtype).eps * abs(float(right.value)) + 2 * right.duality_gap
    noise += TOL * eps  # what is left out makes potentials larger
    assert -noise <= below <= 5 * TOL * abs(float(right.value)) + noise


@on_gpu
@pytest.mark.parametrize("kind", HARD)
def test_gradients_are_those_at_the_potentials(kind, gpu, rng):
    """Of all pairs in float64, but for what may be left out, over the largest distance."""
    c, eps = made(kind, rng, torch.float32, 0.05)
    with gpu() as device:
        given = c.to(device)
        result = Clouds(given.x.requires_grad_(), given.y.requires_grad_(), given.a, given.b).solve(
            eps, method="multiscale", tol=TOL
        )
        got = on_cpu_again(torch.autograd.grad(result.value, (given.x, given.y)))
        f, g = on_cpu_again(result.potentials)
    fine = c.double()
    a, b = fine.weights()
    cost = (fine.x[:, None] - fine.y).square().sum(-1)
    density = ((f.double()[:, None] + g.double() - cost) / eps).exp()
    P = torch.where(a[:, None] * b > 0, a[:, None] * b * density, 0)
    cost = torch.where(P > 0, cost, 0)  # padding lies anywhere
    allowed = 2 * float(cost.amax().sqrt()) * (TOL / 20 + rounding(fine, eps, f, g))
    for z, other, plan, grad in ((fine.x, fine.y, P, got[0]), (fine.y, fine.x, P.T, got[1])):
        expected = 2 * (plan.sum(1)[:, None] * z - plan @ other)
        assert float((grad.double() - expected).norm(dim=1).sum()) <= allowed


@on_gpu
def test_gradients_are_within_a_thousandth(gpu, rng):
    c, eps = made("shapes", rng, torch.float32, 0.05)
    _, got = differentiated(c.require_grad(), eps, gpu, debiased=False, tol=TOL)
    fine = c.double().require_grad()
    right = fine.grads(fine.loss(eps, debiased=False, tol=1e-8, max_iters=5000))
    for one, other in zip(got, right, strict=True):
        assert float((one.double() - other).norm()) <= 1e-3 * float(other.norm())


@on_gpu
@pytest.mark.parametrize(("shift", "eps"), [(4.0, 0.1), (14.0, 20.0)])
def test_gradients_of_a_little_that_is_transported(shift, eps, gpu, rng):
    """What is left out is little of an unbalanced plan, too, not only of the weights."""
    c = clouds(rng, 600, 520, 2)
    c = Clouds(c.x, c.y + shift, None, None).require_grad()
    options = {"unbalanced": 2.0, "debiased": False}
    _, got = differentiated(c, eps, gpu, tol=TOL / 10, **options)
    fine = c.double().require_grad()
    right = fine.grads(fine.loss(eps, method="dense", tol=1e-9, max_iters=5000, **options))
    for one, other in zip(got, right, strict=True):
        assert float((one.double() - other).norm()) <= 10 * TOL * float(other.norm())


@on_gpu
@pytest.mark.parametrize("options", [{}, {"cost": "cosine"}, {"unbalanced": 1.0}], ids=str)
@pytest.mark.parametrize("eps", [0.5, 0.02])
def test_divergence(eps, options, gpu, rng):
    """With clouds against themselves, which begin at different levels."""
    c = clouds(rng, 600, 520, 3, weights="random").require_grad()
    loss, got = differentiated(c, eps, gpu, tol=TOL / 10, **options)
    fine = c.double().require_grad()
    right = fine.loss(eps, method="dense", tol=1e-8, max_iters=5000, **options)
    assert float(loss) == pytest.approx(float(right.detach()), rel=5 * TOL)
    for one, other in list(zip(got, fine.grads(right), strict=True))[:2]:
        assert float((one - other).norm()) <= 2 * TOL * float(other.norm())


@on_gpu
def test_order_of_the_rows_does_not_matter(gpu, rng):
    c, eps = made("clusters", rng, torch.float64, 0.05)
    c = Clouds(c.x, c.y, make_weights(rng, (N,), "random"), make_weights(rng, (M,), "random"))
    order = torch.randperm(N, generator=rng)
    one = solved(c, eps, gpu)
    other = solved(Clouds(c.x[order], c.y.flip(0), c.a[order], c.b.flip(0)), eps, gpu)
    assert float(one.value) == pytest.approx(float(other.value), rel=1e-13)  # of sums of weights
    f, g = one.potentials
    for v, w in ((f.cpu()[order], other.potentials[0]), (g.cpu().flip(0), other.potentials[1])):
        assert torch.allclose(v, w.cpu(), rtol=1e-10, atol=1e-10)


@on_gpu
def test_problems_of_a_batch_are_solved_alone(gpu, rng):
    """And results repeat bit for bit."""
    c = Clouds(randn(rng, 2, 520, 2), 0.5 + randn(rng, 2, 100, 2), None, None)
    both, again, alone = (solved(z, 0.2, gpu).potentials for z in (c, c, c.item(1)))
    for v, w, of_one in zip(both, again, alone, strict=True):
        assert torch.equal(v, w)
        assert torch.equal(v[1], of_one)


@on_gpu
def test_warm_start(gpu, rng):
    c, eps = made("uniform", rng, torch.float64, 0.05)
    cold = solved(c, eps, gpu)
    warm = solved(c, eps, gpu, init=cold.potentials)
    assert true_error(c, eps, *on_cpu_again(warm.potentials)) <= warm.marginal_error + 1e-6
    assert warm.n_iters <= 4 < cold.n_iters  # with a proof, where it is in doubt


@on_gpu
@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")
def test_wide_leaves_cost_no_digits(gpu, rng):
    """Terms of exponents that single precision does not hold."""
    x, y = randn(rng, 600, 3), randn(rng, 500, 3)
    y[0] *= 1e4
    c = Clouds(x, y, None, None)
    got = solved(c, 0.1, gpu, tol=1e-4, max_iters=50)
    assert true_error(c, 0.1, *on_cpu_again(got.potentials)) <= got.marginal_error + 1e-6
    assert got.marginal_error < 1


@on_gpu
@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")
def test_small_mass_that_goes_far_is_not_missed(gpu, rng):
    """Mass within the tolerance that has to go from one cluster to another, far away. A solve that
    says it has converged has proven that it moved."""
    proven = 0
    for apart in (3.0, 30.0):
        x, y = randn(rng, 540, 2), randn(rng, 520, 2)
        x[:270, 0] += apart
        y[:260, 0] += apart
        a, b = torch.full((540,), 1 / 540.0), torch.full((520,), 1 / 520.0)
        a[:270] *= 1 + 8e-4
        c = Clouds(x, y, (a / a.sum()).double(), (b / b.sum()).double())
        got, right = solved(c, 0.5, gpu, max_iters=200), exact(c, 0.5)
        off = abs(float(got.value) - float(right.value)) / abs(float(right.value))
        assert off <= 20 * TOL or not got.converged
        proven += got.converged
    assert proven > 0


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs g++")
@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")
def test_passes_of_all_stages_of_the_finest_level_count(rng):
    """An eps that takes stages there takes hardly more launches than one that does not."""
    c = Clouds(rand(rng, N, 2), rand(rng, M, 2), None, None)
    launches = []
    for eps in (1e-2, 1e-4):
        before = emulated().launches()
        assert solved(c, eps, on_host, max_iters=6).n_iters == 6
        launches.append(emulated().launches() - before)
    assert launches[1] <= 1.4 * launches[0]


@on_gpu
def test_what_is_not_available_is_refused(gpu, rng):
    c = clouds(rng, 300, 280, 2)
    c.x.requires_grad_()
    refused = pytest.raises((RuntimeError, NotImplementedError), match="on a GPU")
    with gpu() as device:
        given = c.to(device)
        f, _ = given.solve(0.1, method="multiscale").potentials
        with refused:
            f.sum().backward()
        with refused:
            given.loss(0.1, method="multiscale", objective="transport")


@on_gpu
def test_what_is_not_a_number_is_reported(gpu, rng):
    c = clouds(rng, 600, 500, 3)
    c.x[17, 1] = float("nan")
    with gpu() as device:
        given = c.to(device)
        if device == "cuda":  # where data is not read
            assert given.loss(0.1, method="multiscale").isnan()
        else:
            with pytest.raises(ValueError, match="finite"):
                given.loss(0.1, method="multiscale")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs g++")
@pytest.mark.parametrize("order", [1, 2, 3, 4], ids=["backward", "shuffled", "first", "last"])
def test_results_do_not_depend_on_the_order_of_threads(order, rng):
    c = Clouds(rand(rng, 560, 3), rand(rng, 540, 3), None, None).require_grad()
    found = []
    for number in (0, order):
        with on_host(order=number):
            loss = c.loss(0.05, method="multiscale", tol=1e-2)
            found.append((loss, *c.grads(loss)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
