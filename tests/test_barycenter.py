"""Barycenters against closed forms for Gaussians and POT's."""

import itertools
import math

import pytest
import torch
from helpers import rand

import otloss


def gaussian(mean, deviation, n=61):
    x = torch.arange(n, dtype=torch.float64)
    return torch.exp(-((x - mean) ** 2) / (2 * deviation**2))


@pytest.mark.parametrize("w", [0.5, 0.8])
def test_of_gaussians_is_a_gaussian_between_them(w):
    a = torch.stack([gaussian(20, 3.0), gaussian(38, 3.0)])
    p = otloss.barycenter_grid(a, torch.tensor([w, 1 - w], dtype=torch.float64), 4.0, tol=1e-8)
    expected = gaussian(20 * w + 38 * (1 - w), 3.0)
    torch.testing.assert_close(p, expected / expected.sum(), rtol=0, atol=1e-4)


def test_agrees_with_pot():
    ot = pytest.importorskip("ot")
    centres = ((5, 10), (8, 6), (11, 9))
    a = torch.stack([torch.outer(gaussian(i, 2, 16), gaussian(j, 2.5, 16)) for i, j in centres])
    a /= a.sum((1, 2), keepdim=True)
    w = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p = otloss.barycenter_grid(a, w, 0.02, spacing=1 / 15, tol=1e-5)
    expected = ot.bregman.convolutional_barycenter2d_debiased(
        a.numpy(), reg=0.02, weights=w.numpy(), stopThr=1e-6, numItermax=2000
    )
    expected = torch.from_numpy(expected / expected.sum())
    # Neither has converged to more digits.
    assert float((p - expected).abs().max()) < 0.01 * float(expected.max())


def test_weights_are_any_numbers(rng):
    y = rand(rng, 5, 2)
    found, _ = otloss.barycenter([y, y + 1], [1, 3], 0.5)
    assert torch.equal(found, otloss.barycenter([y, y + 1], torch.tensor([0.25, 0.75]), 0.5)[0])


@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")
def test_of_points_far_apart_at_a_small_eps():
    """Every entry of its plans underflows; half way there is still the one point."""
    a = torch.zeros(2, 9, dtype=torch.float64)
    a[0, 0] = a[1, 8] = 1
    found = otloss.barycenter_grid(a, torch.tensor([0.5, 0.5]), 1e-2)
    assert int(found.argmax()) == 4
    assert float(found.sum()) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")
def test_iterations_that_rest_above_the_minimum_say_by_how_much():
    """Parts many eps apart hardly exchange mass: an iteration changes next to nothing."""
    eps = 0.1
    a = torch.rand(3, 40, dtype=torch.float64, generator=torch.manual_seed(5))
    a = a * (a > 0.6)
    w = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def total(p):
        sides = a / a.sum(1, keepdim=True), p.expand_as(a)
        return float(w @ otloss.sinkhorn_divergence_grid(*sides, eps, tol=1e-6))

    better = otloss.barycenter_grid(a, w, 10 * eps)
    with pytest.warns(otloss.ConvergenceWarning, match="came to rest") as warned:
        p = otloss.barycenter_grid(a, w, eps)
    bound = float(str(warned[0].message).split("up to ")[1].split()[0])
    assert eps < total(p) - total(better) <= bound


@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")
def test_gradients():
    a = torch.rand(2, 4, 3, dtype=torch.float64, generator=torch.manual_seed(0)) + 0.1
    w = torch.tensor([0.4, 0.6], dtype=torch.float64, requires_grad=True)

    def of(a, w):
        return otloss.barycenter_grid(a, w, 2.0, tol=1e-12, max_iters=20)

    assert torch.autograd.gradcheck(of, (a.requires_grad_(), w), atol=1e-4)


def test_wrong_calls_say_what_is_wrong():
    a = torch.rand(2, 4, 3)
    with pytest.raises(ValueError, match="weights must have shape"):
        otloss.barycenter_grid(a, torch.ones(3), 1.0)
    with pytest.warns(otloss.ConvergenceWarning, match="still changed"):
        assert otloss.barycenter_grid(a, [1, 1], 0.01, max_iters=2).dtype == torch.float32


def normal(n):
    """Quantiles, so that a cloud of them is as good as a normal distribution."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


@pytest.mark.parametrize("eps", [0.05, 0.5, 2.0])
def test_points_of_gaussians_are_a_gaussian_between_them(eps):
    """Where the gradient of the closed form (Janati et al. 2020) is 0 in the variance v of x:
    sum_k w_k sqrt(4 v v_k + s^2) = sqrt(4 v^2 + s^2), s = eps / 2."""
    means, deviations, w, s = (-1.0, 2.0), (0.5, 1.5), (0.4, 0.6), eps / 2
    clouds = [m + d * normal(150).unsqueeze(-1) for m, d in zip(means, deviations, strict=True)]
    x, info = otloss.barycenter(clouds, w, eps, n=100, tol=1e-3)
    variances = [float(y.var(correction=0)) for y in clouds]
    low, high = variances
    for _ in range(60):
        v = (low + high) / 2
        sum_k = sum(p * math.sqrt(4 * v * q + s * s) for p, q in zip(w, variances, strict=True))
        low, high = (v, high) if sum_k > math.sqrt(4 * v * v + s * s) else (low, v)
    assert info.converged
    assert float(x.mean()) == pytest.approx(0.8, abs=1e-3)
    assert float(x.var(correction=0)) == pytest.approx(v, rel=0.01)


def test_points_of_gaussians_in_the_plane():
    """With eps to 0, covariances that commute: the square of the mean of their roots."""
    z = torch.cartesian_prod(normal(12), normal(12))
    clouds = [z * torch.tensor([1.0, 0.3]), z * torch.tensor([0.4, 0.9]) + 2]
    x, _ = otloss.barycenter(clouds, torch.tensor([0.5, 0.5]), 0.05, tol=1e-3)
    expected = sum(y.std(0, correction=0) / 2 for y in clouds).square().diag()
    torch.testing.assert_close(x.mean(0), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-3)
    # The plan between grids is not quite that of Gaussians.
    torch.testing.assert_close(x.T.cov(correction=0), expected, rtol=0, atol=0.02)


def test_of_one_cloud_is_that_cloud(rng):
    y = rand(rng, 40, 2)
    x, info = otloss.barycenter([y], [1.0], 1e-3, init=rand(rng, 40, 2), tol=1e-3, max_iters=300)
    assert info.values[-1] < 0.02 * info.values[0]
    assert float(torch.cdist(y, x).amin(1).median()) < 0.02


def test_of_one_point(rng):
    """Which has no spread, and moves all the same."""
    y, far = rand(rng, 41, 2), torch.full((1, 2), 50.0)
    x, info = otloss.barycenter([y, y + 1], [0.25, 0.75], 0.1, init=far)
    assert info.converged
    torch.testing.assert_close(x, (y + 0.75).mean(0, True), rtol=0, atol=1e-6)
    x, _ = otloss.barycenter([y[:1]], [1.0], 0.1, init=far)
    torch.testing.assert_close(x, y[:1])

    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    x, info = otloss.barycenter([corners], [1.0], 0.1, n=1, cost="euclidean", tol=1e-3)
    pull = torch.nn.functional.normalize(corners - x)  # 0 in the mean at Fermat's point
    assert info.converged
    assert len(info.values) > 2
    assert float(pull.mean(0).norm()) < 0.01


@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")
def test_of_one_point_on_a_line():
    """Where the sum is of straight pieces: steps that its slopes suggest go anywhere."""
    y = torch.tensor([[0.0], [0.0], [1.0], [10.0], [0.1]])
    x, _ = otloss.barycenter([y, y + 1], [0.5, 0.5], 0.01, n=1, cost="euclidean")
    assert float(x) == pytest.approx(1.0, abs=0.01)


def test_inference_mode_changes_nothing(rng):
    y = rand(rng, 20, 2)
    x, _ = otloss.barycenter([y, y + 1], [0.5, 0.5], 0.1)
    with torch.inference_mode():
        found, _ = otloss.barycenter([y.clone(), y + 1], torch.tensor([0.5, 0.5]), 0.1)
    assert torch.equal(found, x)


def test_steps_fall_and_repeat(rng):
    clouds, b = [rand(rng, m, 3) for m in (30, 50, 41)], [rand(rng, m) for m in (30, 50, 41)]
    w = torch.tensor([1.0, 2.0, 0.5])
    x, info = otloss.barycenter(clouds, w, 0.05, n=25, b=b, tol=1e-2)
    again, _ = otloss.barycenter(clouds, w, 0.05, n=25, b=b, tol=1e-2)
    assert torch.equal(x, again)
    assert x.shape == (25, 3)
    assert all(after < before for before, after in itertools.pairwise(info.values))
    each = [otloss.sinkhorn_divergence(x, y, 0.05, b=v / v.sum(), a=torch.full((25,), 1 / 25,
            dtype=x.dtype), tol=1e-7) for y, v in zip(clouds, b, strict=True)]  # fmt: skip
    assert float((w / w.sum()) @ torch.stack(each).float()) == pytest.approx(info.values[-1], 1e-3)


@pytest.mark.parametrize(
    "cost", ["euclidean", lambda x, y: (x.unsqueeze(-2) - y.unsqueeze(-3)).abs().sum(-1)]
)
def test_other_costs(rng, cost):
    clouds = [rand(rng, 30, 2), rand(rng, 30, 2) + 1]
    x, info = otloss.barycenter(clouds, [0.5, 0.5], 0.2, cost=cost, tol=0.05)
    assert info.converged
    assert info.values[-1] <= info.values[0]
    assert x.shape == (30, 2)


def test_wrong_calls_of_points_say_what_is_wrong(rng):
    y = rand(rng, 5, 2)
    for options, error, message in (
        ({"weights": [1.0, 2.0]}, ValueError, r"weights must have shape \(1,\)"),
        ({"n": 9}, ValueError, "n must be at most 5"),
        ({"init": rand(rng, 4, 3)}, ValueError, r"init must have shape \(4, 2\)"),
        ({"b": [rand(rng, 4)]}, ValueError, r"b\[0\] must have shape"),
        ({"b": []}, ValueError, "weights of 1 clouds"),
        ({"clouds": []}, ValueError, "at least one cloud"),
        ({"clouds": [y / 0]}, ValueError, r"clouds\[0\] must be finite"),
        ({"eps": -1.0}, ValueError, "eps must be"),
        ({"clouds": [y.clone().requires_grad_()]}, NotImplementedError, "detach"),
    ):
        given = {"clouds": [y], "weights": [1.0], "eps": 0.1} | options
        with pytest.raises(error, match=message):
            otloss.barycenter(**given)
    with pytest.warns(otloss.ConvergenceWarning, match="would still move"):
        otloss.barycenter([y], [1.0], 0.1, init=rand(rng, 5, 2), max_iters=1, tol=1e-6)
