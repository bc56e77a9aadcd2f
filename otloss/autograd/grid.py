"""Log-sum-exps over a grid, and the solution between densities, as nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otloss import _check, ops
from otloss.reference import grid as reference
from otloss.reference.gradients import quotient
from otloss.reference.marginals import Marginals, damping

__all__ = [
    "Grid",
    "GridPotentials",
    "GridValue",
    "extended",
    "means",
    "plan_product",
    "softmin",
]

RESIDUAL, MOST_STEPS = 1e-10, 1000  # of conjugate gradients


class Grid(NamedTuple):
    """The costs of a grid's axes, (n, n) each in float64, and the regularisation."""

    axes: list[Tensor]
    eps: float
    plain: bool  # plain torch in place of kernels

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
        where = reference if grid.plain else ops
        positive = b > 0
        weighted = torch.where(positive, v + torch.where(positive, b, 1.0).log(), -torch.inf)
        sums, found = where.grid_means(grid.axes, ops.number(grid.eps), weighted, u.contiguous())
        ctx.grid = grid
        ctx.save_for_backward(v, b, u, sums, found)
        return sums, found

    @staticmethod
    def backward(ctx: Any, of_sums: Tensor, of_means: Tensor) -> Any:
        v, b, u, sums, found = ctx.saved_tensors
        w = torch.cat([of_sums.unsqueeze(1), of_means, of_means * found], 1)
        columns, back = _Means.apply(ctx.grid.transposed, -sums, torch.ones_like(sums), w)
        back = (v + columns).exp().unsqueeze(1) * back
        c = u.shape[1]
        direct, of_u, of_product = back[:, 0], back[:, 1 : 1 + c], back[:, 1 + c :]
        of_b = direct + (u * of_u - of_product).sum(1)
        return None, b * of_b, of_b, b.unsqueeze(1) * of_u


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
    """``(grid, marginals, same, a, b, f, g) -> (f, g)``: the solution given, as a function of the
    densities. ``same``: of a density against itself.

    Its derivative is the linear system of docs/gradients.md, by conjugate gradients over passes.
    """

    @staticmethod
    def forward(ctx: Any, grid: Grid, marginals: Marginals, *tensors: Tensor) -> Any:
        ctx.grid, ctx.marginals = grid, marginals
        ctx.save_for_backward(*tensors)
        return tensors[2].clone(), tensors[3].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, f_bar: Tensor, g_bar: Tensor) -> Any:
        grid, (rho_x, rho_y, balanced), eps = ctx.grid, ctx.marginals, ctx.grid.eps
        a, b, f, g = ctx.saved_tensors
        f_bar, g_bar = torch.where(a > 0, f_bar, 0.0), torch.where(b > 0, g_bar, 0.0)
        mass, gauge = (a + b).sum(-1, True), torch.zeros_like(a[:, :1])
        if balanced:
            gauge = (f_bar.sum(-1, True) - g_bar.sum(-1, True)) / mass
            f_bar, g_bar = f_bar - gauge * a, g_bar + gauge * b
        back = grid.transposed

        def over_columns(u: Tensor) -> Tensor:  # P u / a, also where a is 0
            T, found = means(grid, g, b, u.unsqueeze(1))
            here = torch.where(a > 0, f, damping(rho_x, eps) * T)
            return ((here - T) / eps).exp() * found.squeeze(1)

        def over_rows(u: Tensor) -> Tensor:  # P^T u / b
            T, found = means(back, f, a, u.unsqueeze(1))
            here = torch.where(b > 0, g, damping(rho_y, eps) * T)
            return ((here - T) / eps).exp() * found.squeeze(1)

        r = a * over_columns(torch.ones_like(b)) / damping(rho_x, eps)
        c = b * over_rows(torch.ones_like(a)) / damping(rho_y, eps)

        def schur(beta: Tensor) -> Tensor:
            return c * beta - b * over_rows(quotient(a * over_columns(beta), r))

        beta = _conjugate_gradients(
            schur, g_bar - b * over_rows(quotient(f_bar, r)), c, b if balanced else None
        )
        of_beta = over_columns(beta)
        alpha = quotient(f_bar - a * of_beta, r)
        a_bar, b_bar = -eps * of_beta, -eps * over_rows(alpha)
        if balanced:
            T, S = softmin(grid, g, b), softmin(back, f, a)
            a_bar = a_bar - gauge * torch.where(a > 0, f, T)
            b_bar = b_bar + gauge * torch.where(b > 0, g, S)
            t = ((b * b_bar).sum(-1, True) - (a * a_bar).sum(-1, True)) / mass
            a_bar, b_bar = a_bar + t, b_bar - t
        return None, None, a_bar, b_bar, None, None


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor, null: Tensor | None
) -> Tensor:
    """Of (B, N), each problem on its own; ``null``: constants are in the null space, and the mean
    of the solution with these weights is 0."""
    x, r = torch.zeros_like(right), right
    z = quotient(r, diagonal)
    p, rz = z, (r * z).sum(-1, True)
    first = rz
    for _ in range(MOST_STEPS):
        if not bool((rz > RESIDUAL**2 * first).any()):
            break
        q = product(p)
        slope = (p * q).sum(-1, True)
        step = torch.where(slope > 0, rz / torch.where(slope > 0, slope, 1.0), 0.0)
        x, r = x + step * p, r - step * q
        z = quotient(r, diagonal)
        after = (r * z).sum(-1, True)
        p = z + torch.where(rz > 0, after / torch.where(rz > 0, rz, 1.0), 0.0) * p
        rz = torch.where(slope > 0, after, 0.0)
    if null is not None:
        x = torch.where(diagonal > 0, x - (null * x).sum(-1, True) / null.sum(-1, True), 0.0)
    return x


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
