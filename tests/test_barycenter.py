"""Barycenters against closed forms for Gaussians and POT's."""

import pytest
import torch

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
        otloss.barycenter_grid(a, torch.ones(2), 0.01, max_iters=2)
