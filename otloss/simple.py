"""Distances without a solver: optimal transport on the line and its slices, and kernel MMDs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from otloss import _check, _options
from otloss.cost_matrices import cost_matrix
from otloss.costs import product
from otloss.energy import energy
from otloss.problem import Problem, check_clouds

__all__ = ["mmd", "sliced_wasserstein", "wasserstein_1d"]

KERNELS = ("gaussian", "laplacian", "energy")


def wasserstein_1d(
    x: Tensor, y: Tensor, p: float = 2.0, *, a: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    r"""Exact optimal transport of points on the line, by sorting.

    .. math:: W_p^p(a, b) = \min_{P 1 = a,\; P^T 1 = b} \sum_{ij} P_{ij} |x_i - y_j|^p
              = \int_0^1 |F^{-1}(t) - G^{-1}(t)|^p\, dt

    with the quantile functions of both sides, for totals of 1. It is the power, not the distance:
    in units of ``x`` to the p.

    Args:
        x, y: numbers (n,) and (m,), or batches (B, n) and (B, m).
        p: exponent, at least 1.
        a, b: weights of the shapes of ``x`` and ``y``, of equal total; default uniform. Points of
            weight 0 count as in :func:`otloss.sinkhorn_divergence`.

    Returns:
        () or (B,); differentiable in x, y, a and b. The gradients da and db of the weights have
        ``<a, da> = <b, db>``, half of the value each. Where quantiles coincide, as those of equal
        numbers of equal weights all do, the gradient of weights is one of many subgradients. Time
        O((n + m) log(n + m)).

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected.

    Example:
        >>> x, y = torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0])
        >>> otloss.wasserstein_1d(x, y)
        tensor(4.)

    References:
        Peyré and Cuturi, *Computational optimal transport* (2019), remark 2.30.
    """
    p = _exponent(p)
    for name, t in (("x", x), ("y", y)):
        if _check.floating(name, t).dim() not in (1, 2):
            raise ValueError(f"{name} must have shape (n,) or (B, n), got {_check.describe(t)}")
    if x.dim() != y.dim():
        raise ValueError(
            "x and y must both be (n,) and (m,), or both (B, n) and (B, m), got "
            f"{_check.describe(x)} and {_check.describe(y)}"
        )
    problem = check_clouds({"x": x.unsqueeze(-1), "y": y.unsqueeze(-1)}, {"a": a, "b": b})
    return _mean_over_lines(problem, p, None)


def sliced_wasserstein(
    x: Tensor,
    y: Tensor,
    n_projections: int = 128,
    p: float = 2.0,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The mean over random directions of the optimal transport between projections.

    .. math:: SW_p^p(a, b) = \frac1L \sum_{l=1}^L
              W_p^p(\langle x, \theta_l\rangle, \langle y, \theta_l\rangle)

    with L directions, uniform on the unit sphere, which all problems of a batch share. The power,
    not the distance; :func:`wasserstein_1d` has the terms.

    Args:
        x, y: clouds (n, d) and (m, d), or batches (B, n, d) and (B, m, d).
        n_projections: the number of directions L. The value's standard deviation over their choice
            falls with its square root.
        p: exponent, at least 1.
        a, b: weights, of equal total; default uniform.
        generator: of the directions; default torch's own.

    Returns:
        () or (B,), differentiable in x, y, a and b for the directions drawn. Memory O(L (n + m)).

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected.

    Example:
        >>> x = torch.rand(100, 3, generator=torch.manual_seed(0))
        >>> far = otloss.sliced_wasserstein(x, x + 2.0)  # mean of <2, theta>^2: |2|^2 / d = 4
        >>> abs(far.item() - 4) < 1
        True

    References:
        Bonneel, Rabin, Peyré, Pfister, *Sliced and Radon Wasserstein barycenters of measures*
        (2015).
    """
    p, count = _exponent(p), _options.count("n_projections", n_projections)
    problem = check_clouds({"x": x, "y": y}, {"a": a, "b": b})
    like = problem.weights[0]
    where = like.device if generator is None else generator.device
    shape = (problem.points[0].shape[-1], count)
    drawn = torch.randn(shape, generator=generator, dtype=like.dtype, device=where)
    directions = drawn / drawn.norm(dim=0)
    return _mean_over_lines(problem, p, directions.to(like.device))


def mmd(
    x: Tensor,
    y: Tensor,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    r"""The squared maximum mean discrepancy of a kernel, as a V-statistic.

    .. math:: MMD^2(a, b) = \langle a, K_{xx} a\rangle + \langle b, K_{yy} b\rangle
              - 2 \langle a, K_{xy} b\rangle

    Args:
        x, y, a, b: as in :func:`otloss.sinkhorn_divergence`. The totals of a and b may differ,
            except with ``"energy"``.
        kernel: ``"gaussian"`` exp(-|x - y|^2 / (2 s^2)), ``"laplacian"`` exp(-|x - y| / s), with
            the bandwidth s; ``"energy"`` -|x - y|, which makes it twice
            :func:`otloss.energy_distance`.
        bandwidth: s, in units of the points; for ``"energy"`` None.

    Returns:
        () or (B,), non-negative but for rounding; differentiable, also twice. All pairs count, a
        point with itself too: it is 0 for equal clouds, and positive in the mean over samples of
        one distribution. In float32 it is off by some 1e-8. Memory O(n^2 + m^2).

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected.

    Example:
        >>> x, y = torch.zeros(5, 2), torch.zeros(4, 2) + 10.0
        >>> print(f"{otloss.mmd(x, y, bandwidth=1.0):.2f}")  # nothing in common: 1 + 1 - 0
        2.00

    References:
        Gretton et al., *A kernel two-sample test* (2012); Székely and Rizzo, *Energy statistics*
        (2013).
    """
    cost = distance_of(_options.choice("kernel", kernel, KERNELS), bandwidth)
    balanced = kernel == "energy"
    problem = check_clouds({"x": x, "y": y}, {"a": a, "b": b}, balanced=balanced)
    value = 2 * energy(problem, cost, "auto")
    if balanced:
        return value
    # With K = 1 - cost, <a - b, K (a - b)> is (sum a - sum b)^2 minus <a - b, cost (a - b)>, which
    # keeps its digits where the bandwidth is large and K is nearly 1.
    apart = torch.sub(*(w.sum(-1) for w in problem.counted_weights())).square()
    return value + (apart if problem.batched else apart[0])


def distance_of(kernel: str, bandwidth: Any) -> Any:
    """The cost 1 - kernel; of ``"energy"`` minus the kernel."""
    if kernel == "energy":
        if bandwidth is not None:
            raise ValueError(f'bandwidth must be None for kernel="energy", got {bandwidth!r}')
        return "euclidean"
    if bandwidth is None:
        raise ValueError(f'bandwidth must be given for kernel="{kernel}", in units of the points')
    s = _options.number("bandwidth", bandwidth)
    if kernel == "laplacian":
        return lambda x, y: -torch.expm1(-cost_matrix(x, y, "euclidean") / s)
    return lambda x, y: -torch.expm1(-cost_matrix(x, y) / (2 * s * s))


def _exponent(p: Any) -> float:
    if _options.number("p", p) < 1:
        raise ValueError(f"p must be at least 1, got {p!r}")
    return float(p)


def _mean_over_lines(problem: Problem, p: float, directions: Tensor | None) -> Tensor:
    """The mean of the transport costs along ``directions`` (d, L); none: points are numbers."""
    sides = []
    for x, w in zip(problem.points, problem.weights, strict=True):
        z = x.to(w.dtype).reshape(*w.shape, -1)
        if problem.padded:  # padding has no coordinates, and its weight no gradient
            there = z.isfinite().all(-1) | (w > 0)
            z, w = torch.where(there.unsqueeze(-1), z, 0.0), torch.where(there, w, 0.0)
        sides.append((z, w.unsqueeze(-1)))
    if directions is not None:
        (x, a), _ = (tuple(t.detach() for t in side) for side in sides)
        # Products have the rounding of the coordinates: of those from a centre among them.
        centre = (a * x).sum(-2, True) / a.sum(-2, True)
        sides = [(product(z - centre, directions), w) for z, w in sides]
    sides = [(z.mT, w.mT) for z, w in sides]
    value = _transport_on_lines(*sides[0], *sides[1], p).mean(-1)
    named = zip(problem.names, problem.points, strict=True)
    _check.finite_value("a mean of transport costs", value, named)
    _check.powers(problem, p, value)
    return value if problem.batched else value[0]


def _transport_on_lines(x: Tensor, a: Tensor, y: Tensor, b: Tensor, p: float) -> Tensor:
    """W_p^p from x (B, L, n) of weights a (B, 1, n) to y (B, L, m) of weights b (B, 1, m): (B, L).

    Mass moves in the order of the points: each interval between two cumulated weights of either
    side goes from one x to one y.
    """
    # They are equal: so each gets half of its gradient. Their product may underflow.
    total = a.sum(-1).sqrt() * b.sum(-1).sqrt()
    (x, upto_x), (y, upto_y) = _in_order(x, a), _in_order(y, b)
    ends, order = torch.cat([upto_x, upto_y], -1).sort(dim=-1, stable=True)
    widths = ends.diff(dim=-1, prepend=torch.zeros_like(ends[..., :1])).to(a.dtype)
    of_x = (order < x.shape[-1]).long()
    # The interval at place k comes after k ends, some of x and the others of y.
    i = of_x.cumsum(-1) - of_x
    j = torch.arange(ends.shape[-1], device=i.device) - i
    moved = x.gather(-1, i.clamp(max=x.shape[-1] - 1)) - y.gather(-1, j.clamp(max=y.shape[-1] - 1))
    return total * (widths * moved.abs().pow(p)).sum(-1)


def _in_order(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The points in order, and the share of the weight up to each: in double, at the end 1."""
    x, order = x.sort(-1)
    upto = w.double().expand(x.shape).gather(-1, order).cumsum(-1)
    return x, upto / upto[..., -1:]
