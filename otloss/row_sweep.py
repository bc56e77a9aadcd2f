"""A sweep over some rows of a problem, by the kernels of every other solve: what engines do whose
cost matrix is not in one piece."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from otloss import ops
from otloss._options import Options
from otloss.reference.engine import Engine, range_of
from otloss.reference.marginals import Marginals, damping
from otloss.reference.solver import Solution, plain_iteration, solve_problem

__all__ = ["RowSweep"]


class RowSweep:
    """One problem whose rows are read in parts."""

    def __init__(self, a: Tensor, b: Tensor, marginals: Marginals) -> None:
        self.a, self.marginals = a, marginals
        mass_x, mass_y = (float(w.double().sum()) for w in (a, b))
        # The kernel scales b to the total of a where both are constraints, here to that of a part.
        self.scaled = math.isinf(marginals.x) and math.isinf(marginals.y)
        self.b = b * (mass_x / mass_y) if self.scaled else b
        self.mass = mass_x, mass_x if self.scaled else mass_y

    def softmins(self, C: Tensor, a: Tensor, eps: float, g: Tensor) -> tuple[Tensor, Tensor]:
        """T_x(g) of rows C of weights a, and what these, damped, make of T_y without the others."""
        own = float(a.double().sum())
        if not own > 0:
            return torch.zeros_like(a), torch.full_like(g, math.inf)
        shift = eps * math.log(own / self.mass[0]) if self.scaled else 0.0
        rho_x, rho_y, _ = self.marginals
        weights = [a[None], self.b[None]]
        problem = ops.problems(weights, [0, 1], [1.0], eps, costs=[C[None]], rho=(rho_x, rho_y))
        start, unread = [torch.zeros_like(weights[0]), g[None]], ops.number(1.0)
        _, _, (f,), (part,), *_ = ops.solve(*problem, start, unread, 1, 1, False, False)
        f = torch.where(a > 0, f[0] / damping(rho_x, eps) + shift, 0.0)
        return f, part[0] / damping(rho_y, eps) - shift

    @functools.cached_property
    def cost_range(self: Engine) -> tuple[float, float]:
        return range_of(self)

    def solve(
        self: Engine, symmetric: bool, options: Options, init: Sequence[Tensor] = ()
    ) -> Solution:
        o, eps = options, float(options.eps)
        if o.n_iters < 0:
            return solve_problem(self, symmetric, eps, o.tol, o.max_iters, init)
        g = init[1] if init else torch.zeros_like(self.b)
        for _ in range(o.n_iters):
            f, g, error = plain_iteration(self, eps, g)
        return Solution(f, g, float(error), o.n_iters, float(error) <= o.tol)
