"""The solution of a problem between densities on a grid."""

from __future__ import annotations

import torch
from torch import Tensor

from otloss import _check
from otloss._options import Options
from otloss.autograd.grid import Grid, axis_means, extended, plan_product, transport
from otloss.problem import Problem
from otloss.reference import grid as reference
from otloss.reference.marginals import marginals_of
from otloss.result import OTResult
from otloss.run import Solved

__all__ = ["GridResult"]


class GridResult(OTResult):
    """The solution between densities: as :class:`OTResult`, without a matrix where none is asked
    for. Computes in float64 and returns the dtype of the densities."""

    def __init__(
        self,
        problem: Problem,
        grid: Grid,
        shape: tuple[int, ...],
        displacements: list[Tensor],
        options: Options,
        solved: Solved,
        dtype: torch.dtype,
    ) -> None:
        self._grid, self._shape, self._moves, self._dtype = grid, shape, displacements, dtype
        super().__init__(problem, None, options, solved, dense=True)
        if options.n_iters < 0:  # iterations have potentials everywhere
            marginals = marginals_of(options.rho_x, options.rho_y, 0, 1)
            self._f, self._g = extended(grid, self._f, self._g, self._a, self._b, marginals)
        self.value = solved.loss.to(dtype)
        self.potentials = self._on_grid(self._f), self._on_grid(self._g)

    def _on_grid(self, v: Tensor) -> Tensor:
        return v.unflatten(1, self._shape).to(self._dtype)

    @property
    def _cost(self) -> Tensor:
        self._check_unchanged()
        return self._cost_rows(self._problem, slice(None)).expand(len(self._a), -1, -1)

    def _cost_rows(self, problem: Problem, rows: slice) -> Tensor:
        N = self._a.shape[1]
        return reference.grid_costs(
            self._grid.axes, torch.arange(N, device=self._a.device)[rows]
        ).unsqueeze(0)

    def _plan_rows(self, rows: slice, C: Tensor) -> tuple[Tensor, Tensor]:
        """With the derivatives where a density is 0: potentials are known there, too."""
        f, g, a, b = self._f[:, rows], self._g, self._a[:, rows], self._b
        a, b = a.unsqueeze(-1), b.unsqueeze(-2)
        exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - C) / self._eps
        return a * b * torch.where((a > 0) | (b > 0), exponent, -torch.inf).exp(), C

    def _product(self, u: Tensor, axis: int) -> Tensor:
        """P u or P^T u, (B, c, N)."""
        self._check_unchanged()
        grid, f, g, a, b = self._grid, self._f, self._g, self._a, self._b
        if axis == 0:
            grid, f, g, a, b = grid.transposed, g, f, b, a
        return plan_product(grid, f, g, a, b, u)

    def _sums(self) -> tuple[Tensor, Tensor]:
        rows, columns = (
            self._product(torch.ones_like(self._a).unsqueeze(1), axis).squeeze(1) for axis in (1, 0)
        )
        return rows, columns

    @property
    def marginals(self) -> tuple[Tensor, Tensor]:
        rows, columns = self._sums()
        return self._on_grid(rows), self._on_grid(columns)

    def _system(self) -> list[Tensor] | None:
        return self._grid.system

    @property
    def value_linear(self) -> Tensor:
        self._check_unchanged()
        return transport(self._grid, self._f, self._g, self._a, self._b).to(self._dtype)

    def apply(self, v: Tensor, axis: int = 1) -> Tensor:
        if axis not in (0, 1):
            raise ValueError(f"axis must be 0 or 1, got {axis!r}")
        v = _check.floating("v", v)
        d, expected = len(self._shape), (len(self._a), *self._shape)
        if tuple(v.shape[: d + 1]) != expected or v.dim() > d + 2:
            raise ValueError(
                f"v must have shape {expected} or {(*expected, 'c')}, got {_check.describe(v)}"
            )
        u = v.double().flatten(1, d)
        u = u.mT if v.dim() == d + 2 else u.unsqueeze(1)
        out = self._product(u, axis).mT.unflatten(1, self._shape).to(self._dtype)
        return out if v.dim() == d + 2 else out.squeeze(-1)

    def barycentric_map(self) -> Tensor:
        """Where the points of a go to on average, (B, *grid, axes)."""
        moved = torch.stack(axis_means(self._grid, self._moves, self._g, self._b)[1], -1)
        starts = torch.cartesian_prod(*(D[0] - D[0, :1] for D in self._starts()))
        return (
            (starts.reshape(-1, len(self._shape)) + moved).unflatten(1, self._shape).to(self._dtype)
        )

    def _starts(self) -> list[Tensor]:
        steps = [D[0, 1] if len(D) > 1 else D[0, 0] for D in self._moves]
        return [
            (h.abs() * torch.arange(n, device=h.device, dtype=h.dtype)).unsqueeze(0)
            for n, h in zip(self._shape, steps, strict=True)
        ]

    @property
    def plan(self) -> Tensor:
        return self._plan.to(self._dtype)

    def explain(self) -> str:
        how = "plain torch" if self._grid.plain or not self._a.is_cpu else "along the axes"
        return f"grid {self._shape} on {self._a.device}: {how}"
