"""Log-sum-exps over a grid, and the solution between densities, as nodes of a graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from otloss import _check, ops
from otloss.autograd.first_order import report_system
from otloss.autograd.second_order import refuse_higher_order
from otloss.reference import grid as reference
from otloss.reference.marginals import Marginals, damping

__all__ = [
    "Grid",
    "GridPotentials",
    "GridValue",
    "axis_means",
    "extended",
    "means",
    "plan_product",
    "softmin",
    "transport",
]


_SECOND = (
    "the second derivative of a grid is available for the regularized value and with n_iters; "
    "otloss.solve_sample has those of all, from a matrix"
)


class Grid(NamedTuple):
    """The costs of a grid's axes, (n, n) each in float64, and the regularisation."""

    axes: list[Tensor]
    eps: float
    plain: bool  # plain torch in place of kernels
    system: list[Tensor] | None = None  # receives the status of the implicit gradient's system

    @property
    def transposed(self) -> Grid:
        return self._replace(axes=[C.mT.contiguous() for C in self.axes])


class _Means(torch.autograd.Function):
    """``(grid, v (B, N), b (B, N), u (B, c, N)) -> (sums, means)``: log sum_j b_j exp(v_j - C_ij /
    eps), and the means of u with the weights R_ij of these sums.

    sum_i R_ij w_i is b_j times a density times a mean with the transposed costs, so that the
    gradient is made of means, and has a gradient itself, where b_j = 0 too.
    """

    @staticmethod
    def forward(ctx: Any, grid: Grid, v: Tensor, b: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        sums, found = _sums_and_means(grid, v, b, u)
        ctx.set_materialize_grads(False)  # what has no derivative has none to refuse
        ctx.grid = grid
        ctx.save_for_backward(v, b, u, sums, found)
        return sums, found

    @staticmethod
    def backward(ctx: Any, of_sums: Tensor | None, of_means: Tensor | None) -> Any:
        if of_sums is None and of_means is None:
            return None, None, None, None
        v, b, u, sums, found = ctx.saved_tensors
        of_sums = torch.zeros_like(sums) if of_sums is None else of_sums
        of_means = torch.zeros_like(found) if of_means is None else of_means
        w = torch.cat([of_sums.unsqueeze(1), of_means, of_means * found], 1)
        function = _Means.apply if torch.is_grad_enabled() else _sums_and_means
        columns, back = function(ctx.grid.transposed, -sums, torch.ones_like(sums), w)
        back = (v + columns).exp().unsqueeze(1) * back
        c = u.shape[1]
        direct, of_u, of_product = back[:, 0], back[:, 1 : 1 + c], back[:, 1 + c :]
        of_b = direct + (u * of_u - of_product).sum(1)
        return None, b * of_b, of_b, b.unsqueeze(1) * of_u


def _sums_and_means(grid: Grid, v: Tensor, b: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    where = reference if grid.plain else ops
    positive = b > 0
    weighted = torch.where(positive, v + torch.where(positive, b, 1.0).log(), -torch.inf)
    return where.grid_means(grid.axes, ops.number(grid.eps), weighted, u.contiguous())


def means(grid: Grid, g: Tensor, b: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """T(g) (B, N), and the means (B, c, N) of u (B, c, N) with weights
    b_j exp((T(g)_i + g_j - C_ij) / eps)."""
    sums, found = _Means.apply(grid, g / grid.eps, b, u)
    return -grid.eps * sums, found


def softmin(grid: Grid, g: Tensor, b: Tensor) -> Tensor:
    """T(g)_i = -eps log sum_j b_j exp((g_j - C_ij) / eps), also where the other weight is 0."""
    return means(grid, g, b, g.new_zeros(len(g), 0, g.shape[1]))[0]


def plan_product(grid: Grid, f: Tensor, g: Tensor, a: Tensor, b: Tensor, u: Tensor) -> Tensor:
    """sum_j P_ij u_j, (B, c, N), of u (B, c, N)."""
    T, found = means(grid, g, b, u)
    return (a * ((f - T) / grid.eps).exp()).unsqueeze(1) * found


def axis_means(
    grid: Grid, matrices: list[Tensor], g: Tensor, b: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """T(g), and of matrices M (n, n), one per axis, the means of M_ij with the weights of row i,
    (B, N) each.

    By M = U S V^T every M takes as many channels as its rank, 3 for a squared distance.
    """
    sizes, sums = [len(C) for C in grid.axes], []
    channels, factors = ([g.new_zeros(0, g.shape[1])] for _ in "uv")  # of one point there are none
    for k, M in enumerate(matrices):
        U, S, Vh = torch.linalg.svd(M)
        rank = len(S) if _check.traced(S) else int((1e-14 * S[0] < S).sum())
        along = [1] * len(sizes)
        along[k] = -1
        for r in range(rank):
            channels.append(Vh[r].reshape(along).expand(sizes).reshape(1, -1))
            factors.append((S[r] * U[:, r]).reshape(along).expand(sizes).reshape(1, -1))
        sums.append(rank)
    u = torch.cat(channels).expand(len(g), -1, -1)
    T, found = means(grid, g, b, u)
    products = (torch.cat(factors) * found).split(sums, 1)
    return T, [each.sum(1) for each in products]


def transport(grid: Grid, f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """<P, C>, (B,)."""
    T, costs = axis_means(grid, grid.axes, g, b)
    rows = a * ((f - T) / grid.eps).exp()
    return (rows * torch.stack(costs).sum(0)).sum(-1)


def extended(
    grid: Grid, f: Tensor, g: Tensor, a: Tensor, b: Tensor, marginals: Marginals
) -> tuple[Tensor, Tensor]:
    """The potentials, where a density is 0 those of the first mass to come."""
    sides = ((grid, f, a, g, b, marginals.x), (grid.transposed, g, b, f, a, marginals.y))
    full = []
    for costs, own, weight, other, mass, rho in sides:
        if _check.readable(weight) and bool((weight > 0).all()):
            full.append(own)
        else:
            there = damping(rho, grid.eps) * softmin(costs, other, mass)
            full.append(torch.where(weight > 0, own, there))
    return full[0], full[1]


class GridPotentials(torch.autograd.Function):
    """``(grid, marginals, a, b, f, g) -> (f, g)``: the solution given, as a function of the
    densities."""

    @staticmethod
    def forward(ctx: Any, grid: Grid, marginals: Marginals, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.grid, ctx.marginals = grid, marginals
        ctx.save_for_backward(*tensors)
        return tensors[2].clone(), tensors[3].clone()

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        if all(t is None for t in given):
            return None, None, None, None, None, None
        grid, m = ctx.grid, ctx.marginals
        rho = None if m.balanced else torch.tensor([m.x, m.y], dtype=torch.float64)
        where = reference if grid.plain else ops
        sides = zip(given, ctx.saved_tensors[2:], strict=True)
        seeds = [torch.zeros_like(v) if t is None else t for t, v in sides]
        with torch.no_grad():
            a_bar, b_bar, status = where.grid_adjoint(
                grid.axes, ops.number(grid.eps), rho, *ctx.saved_tensors, *seeds
            )
        report_system(grid.system, status.unsqueeze(0), a_bar.dtype)
        found = refuse_higher_order([a_bar, b_bar], [*ctx.saved_tensors, *seeds], _SECOND)
        return None, None, *found, None, None


class GridValue(torch.autograd.Function):
    """``(value (B,), of_a, of_b, a, b) -> value``: a value with its gradients, themselves functions
    of the densities."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, of_a: Tensor, of_b: Tensor, a: Tensor, b: Tensor
    ) -> Tensor:
        ctx.save_for_backward(of_a, of_b)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        of_a, of_b = ctx.saved_tensors
        return None, None, None, grad.unsqueeze(-1) * of_a, grad.unsqueeze(-1) * of_b
