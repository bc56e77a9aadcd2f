"""Averages of densities in the geometry of optimal transport."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from otloss import _check
from otloss._options import count, number
from otloss.autograd.grid import Grid, softmin
from otloss.grid import axes_of

__all__ = ["barycenter_grid"]


def barycenter_grid(
    a: Tensor,
    weights: Tensor,
    eps: float,
    spacing: float | Sequence[float] = 1.0,
    *,
    periodic: bool | Sequence[bool] = False,
    tol: float = 1e-4,
    max_iters: int = 1000,
) -> Tensor:
    r"""The barycenter of densities on a regular grid in the Sinkhorn divergence.

    .. math:: \arg\min_{p} \sum_k w_k\, S_\varepsilon(a_k, p)

    by the debiased fixed point of Janati et al., with softmins along each axis: no blur is added
    that the densities do not have.

    Args:
        a: densities (K, N), (K, H, W) or (K, D, H, W), non-negative, each divided by its total.
        weights: (K,), non-negative, divided by their total.
        eps: regularisation, in units of the squared distance, absolute.
        spacing, periodic: as in :func:`otloss.solve_grid`.
        tol: iterations end when one changes the density by at most this, in L1.
        max_iters: upper bound on them, with a :class:`ConvergenceWarning`.

    Returns:
        The density, of the shape of one of a, total 1, in its dtype; computed in float64.
        Differentiable in ``weights`` and ``a`` through the iterations, which are kept for that.

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected.

    Example:
        >>> images = torch.rand(2, 16, 16)
        >>> halfway = otloss.barycenter_grid(images, torch.tensor([0.5, 0.5]), eps=8.0)

    References:
        Janati, Cuturi, Gramfort, *Debiased Sinkhorn barycenters* (2020).
    """
    eps, tol, max_iters = number("eps", eps), number("tol", tol), count("max_iters", max_iters)
    _check.no_transforms()
    a = _check.floating("a", a)
    if a.dim() not in (2, 3, 4) or 0 in a.shape:
        raise ValueError(
            f"a must have shape (K, N), (K, H, W) or (K, D, H, W), got {_check.describe(a)}"
        )
    _check.weights("weights", weights, (len(a),), "a", a)
    _check.weights("a", a.flatten(1), (len(a), a[0].numel()), "a", a)
    given, w = a.double().flatten(1), weights.double().unsqueeze(-1)
    given, w = given / given.sum(-1, True), w / w.sum()
    axes, *_ = axes_of(tuple(a.shape[1:]), spacing, periodic, "sqeuclidean", a.device)
    grid = Grid(axes, eps, False)
    one, zero = torch.ones_like(given), torch.zeros_like(given)

    def smoothed(log_u: Tensor, b: Tensor) -> Tensor:
        """log K (b u)"""
        return -softmin(grid, eps * log_u, b) / eps

    log_u, log_d, before, change = zero, zero[:1], zero[:1], math.inf
    for _ in range(max_iters):
        of_v = smoothed(-smoothed(log_u, one), given)
        log_p = log_d + (w * of_v).sum(0, True)
        log_u = log_p - of_v
        log_d = 0.5 * (log_d + log_p - smoothed(log_d, one[:1]))
        p = log_p.exp()
        change, before = float((p - before).detach().abs().sum()), p
        if change <= tol:
            break
    if not change <= tol:
        warnings.warn(
            f"the barycenter still changed by {change:.1e} after {max_iters} iterations, more than "
            f"tol={tol:g}: raise max_iters or tol",
            _check.ConvergenceWarning,
            stacklevel=_check.depth_of_caller(),
        )
    return (p / p.sum()).reshape(a.shape[1:]).to(_check.compute_dtype(a, weights))
