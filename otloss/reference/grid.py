"""Operations on densities on a regular grid whose cost is a sum of one cost along each axis."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from otloss.costs import NAMED
from otloss.reference.arguments import as_pairs
from otloss.reference.engine import Clouds, sample, spread
from otloss.reference.gradients import quotient
from otloss.reference.marginals import (
    ROUNDING,
    Marginals,
    SoftMean,
    column_weights,
    damping,
    marginals_of,
    mean_and_magnitude,
    total,
    value,
)
from otloss.reference.solver import solve_each

GRID_OPERATIONS = ("grid_means", "grid_solve")  # those with kernels
RESIDUAL, MOST_STEPS = 1e-10, 1000  # of conjugate gradients
Means = Callable[..., tuple[Tensor, Tensor]]  # ``grid_means``, or kernels of it
AT_ONCE = 1 << 22  # costs of a block


def grid_means(axes: list[Tensor], eps: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """``log sum_j exp(v_j - C_ij / eps)`` (B, N) of v (B, N), and means (B, c, N) of u (B, c, N)
    with the weights of these sums. Axis by axis: a log-sum-exp over both is one over each."""
    scaled = [(C / eps.item()).to(v) for C in axes]
    for k, C in enumerate(scaled):
        after = math.prod(len(other) for other in scaled[k + 1 :])
        v, u = _along_axis(C, v, u, after)
    return v, u


def _along_axis(C: Tensor, v: Tensor, u: Tensor, after: int) -> tuple[Tensor, Tensor]:
    n, (B, c, N) = len(C), u.shape
    lines = v.reshape(-1, n, after).mT.reshape(-1, n)
    channels = u.transpose(0, 1).reshape(c, B * N // (n * after), n, after).mT
    channels = channels.reshape(c, len(lines), n)
    sums, means, step = [], [], max(1, AT_ONCE // (n * n))
    for block, of_u in zip(lines.split(step), channels.split(step, 1), strict=True):
        terms = block.unsqueeze(-2) - C
        out = torch.logsumexp(terms, -1)
        weights = (terms - torch.where(out.isfinite(), out, 0.0).unsqueeze(-1)).exp()
        sums.append(out)
        means.append((weights @ of_u.unsqueeze(-1)).squeeze(-1))
    all_u = torch.cat(means, 1).reshape(c, len(lines) // after, after, n).mT.reshape(c, B, N)
    all_v = torch.cat(sums).reshape(-1, after, n).mT.reshape(B, N)
    return all_v, all_u.transpose(0, 1).contiguous()


def solve(
    means: Means,
    axes: list[Tensor],
    spacing: list[float],
    weights: list[Tensor],
    pairs: list[int],
    eps: Tensor,
    rho: Tensor | None,
    init: list[Tensor],
    tol: Tensor,
    max_iters: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Status (P, B, 5), f and g (B, N) of each pair."""
    rho_x, rho_y = (math.inf, math.inf) if rho is None else rho.tolist()
    number, statuses, all_f, all_g = eps.item(), [], [], []
    for p, (i, j) in enumerate(as_pairs(pairs)):
        a, b, marginals = weights[i], weights[j], marginals_of(rho_x, rho_y, i, j)
        b = column_weights(a, b) if marginals.balanced else b
        engines = [
            GridEngine(means, axes, spacing, *each, marginals) for each in zip(a, b, strict=True)
        ]
        start = init[2 * p : 2 * p + 2]
        f, g, error, *how = solve_each(engines, i == j, number, tol.item(), max_iters, start)
        largest = error.new_tensor([engine.max_cost() for engine in engines])
        terms = value(number, f, f, g, a, b, 0, marginals)
        statuses.append(torch.stack([how[0], error, how[1], largest, terms], -1))
        all_f.append(f)
        all_g.append(g)
    return torch.stack(statuses), all_f, all_g


def adjoint(
    means: Means,
    axes: list[Tensor],
    eps: Tensor,
    rho: Tensor | None,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    grad_f: Tensor,
    grad_g: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a and b (B, N) from those of the potentials f and g that solve the problem: the
    linear system of docs/gradient-methods.md, by conjugate gradients over passes. And the system's
    status (B, 2): iterations and relative residual.

    ``rho``: (2,) of the pair, or none, where every marginal of the call is a constraint.
    """
    number, balanced = eps.item(), rho is None
    on_x, on_y = (damping(r, number) for r in ((math.inf,) * 2 if rho is None else rho.tolist()))
    f_bar, g_bar = torch.where(a > 0, grad_f, 0.0), torch.where(b > 0, grad_g, 0.0)
    mass, gauge = (a + b).sum(-1, True), torch.zeros_like(a[:, :1])
    if balanced:
        gauge = (f_bar.sum(-1, True) - g_bar.sum(-1, True)) / mass
        f_bar, g_bar = f_bar - gauge * a, g_bar + gauge * b
    back = [C.mT.contiguous() for C in axes]

    def softmin_and_means(costs: list[Tensor], v: Tensor, w: Tensor, u: Tensor) -> Any:
        sums, found = means(costs, eps, v / number + w.log(), u.unsqueeze(1).contiguous())
        return -number * sums, found.squeeze(1)

    def over_columns(u: Tensor) -> Tensor:  # P u / a, also where a is 0
        T, found = softmin_and_means(axes, g, b, u)
        return ((torch.where(a > 0, f, on_x * T) - T) / number).exp() * found

    def over_rows(u: Tensor) -> Tensor:  # P^T u / b
        T, found = softmin_and_means(back, f, a, u)
        return ((torch.where(b > 0, g, on_y * T) - T) / number).exp() * found

    r = a * over_columns(torch.ones_like(b)) / on_x
    c = b * over_rows(torch.ones_like(a)) / on_y

    def schur(beta: Tensor) -> Tensor:
        return c * beta - b * over_rows(quotient(a * over_columns(beta), r))

    of_f = b * over_rows(quotient(f_bar, r))
    size = quotient(g_bar.square() + of_f.square(), c).sum(-1, True)
    beta, status = _conjugate_gradients(schur, g_bar - of_f, c, size, b if balanced else None)
    of_beta = over_columns(beta)
    alpha = quotient(f_bar - a * of_beta, r)
    a_bar, b_bar = -number * of_beta, -number * over_rows(alpha)
    if balanced:
        T, S = softmin_and_means(axes, g, b, g)[0], softmin_and_means(back, f, a, f)[0]
        a_bar = a_bar - gauge * torch.where(a > 0, f, T)
        b_bar = b_bar + gauge * torch.where(b > 0, g, S)
        t = ((b * b_bar).sum(-1, True) - (a * a_bar).sum(-1, True)) / mass
        a_bar, b_bar = a_bar + t, b_bar - t
    return a_bar, b_bar, status


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    diagonal: Tensor,
    size: Tensor,
    null: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Of (B, N), each problem on its own, and its status. ``right`` is a difference of terms of the
    squared norm ``size`` (B, 1), below whose rounding nothing is left to solve for. ``null``:
    constants are in the null space, and the mean of the solution with these weights is 0."""

    def in_range(r: Tensor) -> Tensor:
        if null is None:
            return r
        return r - r.sum(-1, True) / diagonal.sum(-1, True) * diagonal

    x, r = torch.zeros_like(right), in_range(right)
    floor = (ROUNDING * torch.finfo(right.dtype).eps) ** 2 * size
    z = quotient(r, diagonal)
    p, rz = z, (r * z).sum(-1, True)
    first, steps, runs = rz, torch.zeros_like(rz), rz > floor
    for _ in range(MOST_STEPS):
        runs = runs & (rz > RESIDUAL**2 * first) & (rz > floor)
        if not bool(runs.any()):
            break
        steps = steps + runs
        q = product(p)
        slope = (p * q).sum(-1, True)
        runs = runs & (slope > 0)  # else rounding is all that is left
        step = torch.where(runs, rz / torch.where(runs, slope, 1.0), 0.0)
        x, r = x + step * p, in_range(r - step * q)
        z = quotient(r, diagonal)
        before, rz = rz, (r * z).sum(-1, True)
        p = z + torch.where(before > 0, rz / torch.where(before > 0, before, 1.0), 0.0) * p
    if null is not None:
        x = torch.where(diagonal > 0, x - (null * x).sum(-1, True) / null.sum(-1, True), 0.0)
    residual = torch.where(rz > floor, (rz / first).sqrt(), 0.0)
    return x, torch.cat([steps, residual], -1)


def grid_solve(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return solve(grid_means, *arguments)


def grid_adjoint(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return adjoint(grid_means, *arguments)


class GridEngine:
    """Sweeps axis by axis; see ``reference.engine.Engine``."""

    def __init__(
        self,
        means: Means,
        axes: list[Tensor],
        spacing: list[float],
        a: Tensor,
        b: Tensor,
        marginals: Marginals,
    ) -> None:
        self.means, self.axes, self.spacing, self.a, self.b = means, axes, spacing, a, b
        self.marginals = marginals

    @functools.cached_property
    def mass(self) -> tuple[float, float]:
        return float(total(self.a)), float(total(self.b))

    def iterate(self, eps: float, g: Tensor) -> tuple[Tensor, SoftMean, Tensor]:
        f = damping(self.marginals.x, eps) * self.update_rows(eps, g)
        t = self._softmin([C.mT for C in self.axes], eps, f, self.a)
        return f, mean_and_magnitude(f, self.a, self.marginals.x), torch.where(self.b > 0, t, 0.0)

    def update_rows(self, eps: float, g: Tensor) -> Tensor:
        return torch.where(self.a > 0, self._softmin(self.axes, eps, g, self.b), 0.0)

    def _softmin(self, axes: list[Tensor], eps: float, g: Tensor, b: Tensor) -> Tensor:
        v = g / eps + b.log()
        none = v.new_zeros(1, 0, len(v))
        eps_ = torch.tensor(eps, dtype=torch.float64)
        return -eps * self.means([C.contiguous() for C in axes], eps_, v[None], none)[0][0]

    def over_rows(self, zero: Tensor, function: Callable[[slice, Tensor], Tensor]) -> Tensor:
        return torch.stack(self._parts(function))

    def each_row(self, zero: Tensor, function: Callable[[slice, Tensor], Tensor]) -> Tensor:
        return torch.cat(self._parts(function))

    def _parts(self, function: Callable[[slice, Tensor], Tensor]) -> list[Tensor]:
        N = len(self.a)
        step = max(1, AT_ONCE // N)
        blocks = torch.arange(N, device=self.a.device).split(step)
        return [
            function(slice(first, first + len(rows)), grid_costs(self.axes, rows))
            for first, rows in zip(range(0, N, step), blocks, strict=True)
        ]

    @functools.cached_property
    def cost_range(self) -> tuple[float, float]:
        least, most = (sum(float(end(C)) for C in self.axes) for end in (torch.amin, torch.amax))
        return min(least, 0.0), max(most, 0.0)

    def max_cost(self) -> float:
        return max(-self.cost_range[0], self.cost_range[1])

    def sigma(self) -> float:
        return spread(grid_costs(self.axes, sample(self.a), sample(self.b)))

    def propose(self, sweeps: float, eps: float) -> Tensor | None:
        if not self.spacing:
            return None
        x = grid_points([len(C) for C in self.axes], self.spacing).to(self.a)
        return Clouds(NAMED[0], x, x, self.a, self.b).propose(sweeps, eps)


def grid_costs(axes: list[Tensor], rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """C between some points of the grid and some others, by default all."""
    if columns is None:
        columns = torch.arange(math.prod(len(C) for C in axes), device=rows.device)
    result = axes[0].new_zeros(len(rows), len(columns))
    for C in reversed(axes):
        n = len(C)
        result = result + C[rows % n][:, columns % n]
        rows, columns = rows // n, columns // n
    return result


def grid_points(shape: list[int], spacing: list[float]) -> Tensor:
    """(N, d) coordinates in float64."""
    each = [h * torch.arange(n, dtype=torch.float64) for n, h in zip(shape, spacing, strict=True)]
    return torch.cartesian_prod(*each).reshape(-1, len(shape))
