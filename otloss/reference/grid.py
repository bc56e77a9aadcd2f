"""Operations on densities on a regular grid whose cost is a sum of one cost along each axis."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from otloss.costs import NAMED
from otloss.reference.arguments import as_pairs
from otloss.reference.engine import Clouds, sample, spread
from otloss.reference.marginals import (
    Marginals,
    SoftMean,
    damping,
    marginals_of,
    mean_and_magnitude,
    total,
    value,
)
from otloss.reference.solver import solve_problem

GRID_OPERATIONS = ("grid_means", "grid_solve")
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


def grid_solve(
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
    number, rows, all_f, all_g = eps.item(), [], [], []
    for p, (i, j) in enumerate(as_pairs(pairs)):
        marginals = marginals_of(rho_x, rho_y, i, j)
        for k in range(len(weights[0])):
            a, b = weights[i][k], weights[j][k]
            b = b * (a.sum() / b.sum()) if marginals.balanced else b
            engine = GridEngine(axes, spacing, a, b, marginals)
            start = [v[k] for v in init[2 * p : 2 * p + 2]]
            f, g, *how = solve_problem(engine, i == j, number, tol.item(), max_iters, start)
            term = value(number, f, f[None], g[None], a[None], b[None], 0, marginals)
            error, sweeps, converged = how
            rows.append([sweeps, error, converged, engine.max_cost(), float(term)])
            all_f.append(f)
            all_g.append(g)
    B = len(weights[0])
    status = weights[0].new_tensor(rows, dtype=torch.float64).reshape(-1, B, 5)
    starts = range(0, len(all_f), B)
    return (
        status,
        [torch.stack(all_f[first : first + B]) for first in starts],
        [torch.stack(all_g[first : first + B]) for first in starts],
    )


class GridEngine:
    """Sweeps axis by axis; see ``reference.engine.Engine``."""

    def __init__(
        self,
        axes: list[Tensor],
        spacing: list[float],
        a: Tensor,
        b: Tensor,
        marginals: Marginals,
    ) -> None:
        self.axes, self.spacing, self.a, self.b = axes, spacing, a, b
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
        return -eps * grid_means(axes, torch.tensor(eps), v[None], none)[0][0]

    def over_rows(self, zero: Tensor, function: Callable[[slice, Tensor], Tensor]) -> Tensor:
        N = len(self.a)
        step = max(1, AT_ONCE // N)
        blocks = torch.arange(N, device=zero.device).split(step)
        starts = range(0, N, step)
        return torch.stack(
            [
                function(slice(first, first + len(rows)), grid_costs(self.axes, rows))
                for first, rows in zip(starts, blocks, strict=True)
            ]
        )

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
