"""Averages of densities in the geometry of optimal transport."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from otloss import _check
from otloss._options import check_cost, count, number
from otloss.autograd.grid import Grid, softmin
from otloss.batching import pad
from otloss.costs import Cost
from otloss.grid import axes_of, sinkhorn_divergence_grid
from otloss.losses import sinkhorn_divergence
from otloss.reference.lbfgs import MAX_GROWTH, MEMORY, InnerProduct, two_loop_recursion

__all__ = ["BarycenterInfo", "barycenter", "barycenter_grid"]

# Of the line search: the share of the slope that a step must gain, its tries and their ratio.
GAIN, TRIES, SHORTER = 1e-4, 12, 0.5
INNER = 1e-2  # the tolerance of the solves over that of the points
MOST_ABOVE = 0.5  # of the sum of a density on a grid, what may be too much without a word


class BarycenterInfo(NamedTuple):
    """How a barycenter was found."""

    values: list[
        float
    ]  # the weighted sum of divergences at the start and after every step, falling
    step: float  # how far points would move next, root mean square over that of their spread
    converged: bool


def barycenter(
    clouds: Sequence[Tensor],
    weights: Tensor | Sequence[float],
    eps: float,
    *,
    n: int | None = None,
    init: Tensor | None = None,
    b: Sequence[Tensor] | None = None,
    cost: Cost = "sqeuclidean",
    tol: float = 1e-2,
    max_iters: int = 100,
) -> tuple[Tensor, BarycenterInfo]:
    r"""The cloud of equal weights that is nearest to given ones in the Sinkhorn divergence.

    .. math:: \arg\min_{x_1, \dots, x_n} \sum_k w_k\, S_\varepsilon(x, y^{(k)})

    by L-BFGS on the points with a line search: every step lowers the sum, and a second call gives
    the numbers of the first. The sum is not convex in the points, so that the result is a local
    minimum. Computed in float64.

    Args:
        clouds: K clouds y^(k) (m_k, d), of any sizes.
        weights: w (K,), non-negative, divided by their total.
        eps: regularisation, in units of cost, absolute.
        n: number of points; default that of ``init``, or of the first cloud.
        init: the points to start from (n, d), of which equal ones stay equal; default points of the
            cloud of the largest weight, evenly spaced by their number, moved to the mean of all.
        b: weights of the points of every cloud, (m_k,) each, divided by their total; default
            uniform.
        cost: as in :func:`otloss.sinkhorn_divergence`.
        tol: ends when the next step would move the points by at most this share of their distance
            from their mean, both in the root mean square; where that is 0, as of a single point, of
            the distance of the clouds from them.
        max_iters: upper bound on the steps; reaching it, or a line search that gains no more, gives
            a :class:`ConvergenceWarning`.

    Returns:
        ``x`` (n, d) in the dtype of the clouds, a constant; and ``info`` with ``values`` (the sum
        at the start and after every step), ``step`` and ``converged``.

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected.
        NotImplementedError: clouds or weights that require a gradient.

    Example:
        >>> y = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> x, info = otloss.barycenter([y, y + 2], [0.5, 0.5], eps=0.1)  # halfway
        >>> print(x.sort(0).values.round(decimals=2).tolist(), info.converged)
        [[1.0, 1.0], [2.0, 1.0]] True

    References:
        Cuturi, Doucet, *Fast computation of Wasserstein barycenters* (2014), for free supports;
        Janati, Cuturi, Gramfort, *Debiased Sinkhorn barycenters* (2020), for the divergence.
    """
    eps, cost = number("eps", eps), check_cost(cost)
    tol, max_iters = number("tol", tol), count("max_iters", max_iters)
    y, of_y = pad(clouds)
    for k, cloud in enumerate(clouds):
        _check.finite(f"clouds[{k}]", cloud)
    K, dtype = len(y), _check.compute_dtype(y)
    w = _as_tensor(weights, y)
    _check.weights("weights", w, (K,), "clouds", y)
    given = [*clouds, w, *(b or ())]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise NotImplementedError("a barycenter has no gradient: detach clouds and weights")
    if b is not None:
        of_y = _point_weights(clouds, b)
    y, of_y, w = y.double(), of_y.double(), w.double() / w.sum()
    x = _start(y, of_y, w, n if init is None or n is not None else len(init), init, clouds)
    with torch.inference_mode(False):  # copies, since gradients are taken
        y, of_y, w, x = (t.detach().clone() for t in (y, of_y, w, x))
        objective = _Objective(y, of_y / of_y.sum(-1, True), w, eps, cost, INNER * tol)
        x, info = _minimise(objective, x, tol, max_iters)
    if not info.converged:
        warnings.warn(
            f"the barycenter would still move by {info.step:.1e} of its spread after "
            f"{len(info.values) - 1} steps, more than tol={tol:g}: raise max_iters (now "
            f"{max_iters}), eps or tol",
            _check.ConvergenceWarning,
            stacklevel=_check.depth_of_caller(),
        )
    return x.to(dtype), info


def _as_tensor(weights: Tensor | Sequence[float], like: Tensor) -> Tensor:
    numbers = None if isinstance(weights, Tensor) else torch.float64  # integers, too
    return torch.as_tensor(weights, dtype=numbers, device=like.device)


def _point_weights(clouds: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """(K, m), 0 after those of each cloud."""
    if len(b) != len(clouds):
        raise ValueError(f"b must hold the weights of {len(clouds)} clouds, got {len(b)}")
    for k, (v, y) in enumerate(zip(b, clouds, strict=True)):
        _check.weights(f"b[{k}]", v, tuple(y.shape[:1]), f"clouds[{k}]", y)
    return nn.utils.rnn.pad_sequence([v.double() for v in b], batch_first=True)


def _start(
    y: Tensor,
    of_y: Tensor,
    w: Tensor,
    n: int | None,
    init: Tensor | None,
    clouds: Sequence[Tensor],
) -> Tensor:
    n = len(clouds[0]) if n is None else count("n", n)
    if init is not None:
        _check.points("init", init)
        if tuple(init.shape) != (n, y.shape[-1]):
            raise ValueError(
                f"init must have shape {(n, y.shape[-1])}, got {_check.describe(init)}"
            )
        _check.same_device("clouds", y, "init", init)
        return init.detach().double()
    k = int(w.argmax())
    chosen = clouds[k].detach().double()
    if n > len(chosen):
        raise ValueError(
            f"n must be at most {len(chosen)}, the size of the cloud of the largest weight, where "
            f"the start is made of its points, got {n}: give init="
        )
    x = chosen[torch.arange(n, device=y.device) * len(chosen) // n]
    means = (of_y.unsqueeze(-1) * y).sum(1) / of_y.sum(-1, True)
    return x - x.mean(0) + (w.unsqueeze(-1) * means).sum(0)


class _Objective:
    """The weighted sum of divergences and the residual, minus its gradient in the metric of the
    weights: a step along it takes every point to its partners' mean, for the squared distance."""

    def __init__(
        self, y: Tensor, of_y: Tensor, w: Tensor, eps: float, cost: Cost, tol: float
    ) -> None:
        self.y, self.of_y, self.w = y, of_y, w
        self.eps, self.options = eps, {"cost": cost, "tol": tol, "max_iters": 10000}

    @torch.enable_grad()
    def __call__(self, x: Tensor) -> tuple[float, Tensor]:
        x = x.detach().requires_grad_()
        options: Any = self.options
        each = sinkhorn_divergence(
            x.expand(len(self.y), -1, -1), self.y, self.eps, b=self.of_y, **options
        )
        value = (self.w * each).sum()
        (gradient,) = torch.autograd.grad(value, x)
        return value.item(), -0.5 * len(x) * gradient

    def distance(self, x: Tensor) -> float:
        """Of the clouds' points from x (d,), in the root mean square."""
        squares = (self.y - x).square().sum(-1)
        return math.sqrt(float((self.w.unsqueeze(-1) * self.of_y * squares).sum()))


def _minimise(
    objective: _Objective, x: Tensor, tol: float, max_iters: int
) -> tuple[Tensor, BarycenterInfo]:
    inner = InnerProduct(torch.full_like(x, 1 / len(x)))
    memory: list[tuple[Tensor, Tensor]] = []
    longest = math.inf
    value, r = objective(x)
    values = [value]
    while True:
        from_mean = x - x.mean(0)
        spread = math.sqrt(inner(from_mean, from_mean)) or objective.distance(x.mean(0))
        step = math.sqrt(inner(r, r)) / spread if spread > 0 else 0.0
        if step <= tol or len(values) > max_iters:
            break
        found = None
        while found is None:
            p = two_loop_recursion(r, memory, inner)
            p = p * min(1.0, longest / math.sqrt(inner(p, p)))
            found = _line_search(objective, x, value, p, 2 * inner(r, p))
            if found is None and not memory:
                return x, BarycenterInfo(values, step, False)
            memory = memory if found else []
        there, value, after = found
        longest = MAX_GROWTH * math.sqrt(inner(there - x, there - x))
        if inner.curved(there - x, r - after):
            memory = [*memory[1 - MEMORY :], (there - x, r - after)]
        x, r = there, after
        values.append(value)
    return x, BarycenterInfo(values, step, step <= tol)


def _line_search(
    objective: _Objective, x: Tensor, value: float, p: Tensor, slope: float
) -> tuple[Tensor, float, Tensor] | None:
    """The first point along p that is lower, its value and residual."""
    t = 1.0
    for _ in range(TRIES if slope > 0 else 0):
        there = x + t * p
        lower, residual = objective(there)
        if lower <= value - GAIN * t * slope:
            return there, lower, residual
        t *= SHORTER
    return None


def barycenter_grid(
    a: Tensor,
    weights: Tensor | Sequence[float],
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
        max_iters: upper bound on them. Reaching it gives a :class:`ConvergenceWarning`, as do
            iterations that come to rest where less than half of the sum is proven to be needed:
            where eps is small beside the squared gaps between parts of a density, they may.

    Returns:
        The density, of the shape of one of a, total 1, in its dtype; computed in float64.
        Differentiable in ``weights`` and ``a`` through the iterations, which are kept for that.

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected.

    Example:
        >>> images = torch.rand(2, 16, 16)
        >>> halfway = otloss.barycenter_grid(images, [0.5, 0.5], eps=8.0)

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
    w = _as_tensor(weights, a)
    _check.weights("weights", w, (len(a),), "a", a)
    _check.weights("a", a.flatten(1), (len(a), a[0].numel()), "a", a)
    given, w = a.double().flatten(1), w.double().unsqueeze(-1)
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
        p = log_p.softmax(-1)  # far apart at a small eps its total is long below 1
        change, before = float((p - before).detach().abs().sum()), p
        if change <= tol:
            break
    if not change <= tol:
        fault = f"still changed by {change:.1e} after {max_iters} iterations, more than tol={tol:g}"
        mend = "max_iters or tol"
    else:
        options: Any = {"spacing": spacing, "periodic": periodic, "tol": INNER * tol}
        densities, last = (v.detach().unflatten(1, a.shape[1:]) for v in (given, p))
        value, above = _above_minimum(densities, last, w.detach().squeeze(-1), eps, options)
        fault = f"came to rest up to {above:.1e} above the least sum, and has {value:.1e}"
        mend = "" if above <= MOST_ABOVE * value or value <= eps * tol else "eps"
    if mend:
        warnings.warn(
            f"the barycenter {fault}: raise {mend}",
            _check.ConvergenceWarning,
            stacklevel=_check.depth_of_caller(),
        )
    tensors = (a, weights) if isinstance(weights, Tensor) else (a,)
    return p.reshape(a.shape[1:]).to(_check.compute_dtype(*tensors))


@torch.enable_grad()
def _above_minimum(
    densities: Tensor, p: Tensor, w: Tensor, eps: float, options: Any
) -> tuple[float, float]:
    """The sum at p (1, *grid), and a bound on how far it is above its minimum: it is convex, hence
    nowhere below its tangent."""
    p = p.clamp(min=1e-300).requires_grad_()  # so that the gradient is one of a little mass
    each = sinkhorn_divergence_grid(densities, p.expand_as(densities), eps, **options)
    value = (w * each).sum()
    (gradient,) = torch.autograd.grad(value, p)
    above = (p.detach() * gradient).sum() - gradient.min()
    return value.item(), above.item()
