"""Cost functions on large clouds: their matrices are made a block of rows at a time, in every sweep
and again for the gradient.

The solver is that of ``otloss/reference``, over an engine that calls the cost function. The
gradient is that of the value at fixed potentials: the plan, a block of rows at a time, goes back
into what made the costs, the points or the parameters of the function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from otloss import _check
from otloss._options import OBJECTIVES, Options
from otloss.autograd.second_order import refuse_higher_order
from otloss.cost_matrices import build_costs, see_empty_bins
from otloss.eps import Scale
from otloss.method import block_rows, in_blocks
from otloss.problem import Problem
from otloss.reference.arguments import as_pairs
from otloss.reference.engine import is_symmetric, sample, spread
from otloss.reference.gradients import weight_gradients
from otloss.reference.marginals import (
    Marginals,
    SoftMean,
    centred,
    clamped,
    column_weights,
    counted,
    damping,
    marginals_of,
    mean_and_magnitude,
    plan,
    value,
)
from otloss.row_sweep import RowSweep

__all__ = ["solve_by_rows"]

_NO_IMPLICIT = (
    "a cost function whose matrix is not stored has gradients of the value alone, by "
    'backward="envelope" and once: use method="dense" for others'
)
Rows = slice | Tensor


class RowEngine(RowSweep):
    """One problem, as the solver reads it; ``costs(rows)`` is C[rows]."""

    def __init__(
        self, costs: Callable[[Rows], Tensor], a: Tensor, b: Tensor, marginals: Marginals
    ) -> None:
        super().__init__(a, b, marginals)
        self.costs = costs
        step, n = block_rows(b), len(a)
        self.blocks = [slice(i, min(i + step, n)) for i in range(0, n, step)]

    def _sweep(self, eps: float, g: Tensor) -> tuple[Tensor, Tensor]:
        """T_x(g), and T_y of that, damped."""
        f, t = torch.zeros_like(self.a), torch.full_like(g, math.inf, dtype=torch.float64)
        for rows in self.blocks:
            f[rows], part = self.softmins(self.costs(rows), self.a[rows], eps, g)
            t = -eps * torch.logaddexp(-t / eps, -part.double() / eps)
        return f, torch.where(self.b > 0, t, 0.0).to(g)

    def iterate(self, eps: float, g: Tensor) -> tuple[Tensor, SoftMean, Tensor]:
        f, t = self._sweep(eps, g)
        f = damping(self.marginals.x, eps) * f
        return f, mean_and_magnitude(f, self.a, self.marginals.x), t

    def update_rows(self, eps: float, g: Tensor) -> Tensor:
        return self._sweep(eps, g)[0]

    def over_rows(self, zero: Tensor, function: Callable[[slice, Tensor], Tensor]) -> Tensor:
        return torch.stack(self._parts(function)).to(zero)

    def each_row(self, zero: Tensor, function: Callable[[slice, Tensor], Tensor]) -> Tensor:
        return torch.cat(self._parts(function)).to(zero)

    def _parts(self, function: Callable[[slice, Tensor], Tensor]) -> list[Tensor]:
        return [
            function(rows, counted(self.costs(rows), self.a[rows], self.b)) for rows in self.blocks
        ]

    def sigma(self) -> float:
        return spread(self.costs(sample(self.a))[:, sample(self.b)])

    def propose(self, sweeps: float, eps: float) -> Tensor | None:
        return None


def solve_by_rows(
    problem: Problem,
    pairs: list[int],
    coefficients: list[float],
    options: Options,
    init: Sequence[Tensor],
    scale: Scale | None,
    *,
    combined: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What ``otloss.run.run`` returns: loss, status, f and g of each pair."""
    _refuse(problem, options)
    terms, statuses, all_f, all_g = [], [], [], []
    for p, (i, j) in enumerate(as_pairs(pairs)):
        pair = _Pair(
            problem.of_pair(i, j), options, marginals_of(options.rho_x, options.rho_y, i, j)
        )
        f, g, status = pair.solve(i == j, init[2 * p : 2 * p + 2])
        found = coefficients[p] * pair.value(f, g, scale)
        statuses.append(torch.cat([status, found.detach().unsqueeze(-1)], -1))
        terms.append(found)
        if options.balanced() and options.n_iters < 0:
            f, g = centred(f, g, *(w.detach() for w in pair.weights))
        if found.requires_grad:
            f, g = refuse_higher_order([f, g], [found], _NO_IMPLICIT)
        all_f.append(f)
        all_g.append(g)
    every, status = torch.stack(terms), torch.stack(statuses)
    loss = every
    if combined:
        dtype = problem.weights[0].dtype
        loss = clamped(every.sum(0), every.detach().abs().sum(0), dtype).to(dtype)
        loss = loss if problem.batched else loss[0]
    return loss, status, tuple(all_f), tuple(all_g)


def _refuse(problem: Problem, options: Options) -> None:
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            'a cost function whose matrix is not stored cannot be compiled: use method="dense"'
        )
    if options.follows_iterations() and torch.is_grad_enabled():
        raise NotImplementedError(f'backward="unrolled": {_NO_IMPLICIT}')
    if see_empty_bins(problem, [], "sqeuclidean", "dense").present:
        raise NotImplementedError(
            "weights of 0 at finite points have no gradient where the matrix of a cost function is "
            'not stored: detach the weights, or use method="dense"'
        )


class _Pair:
    """A pair of clouds, of all problems of the batch."""

    def __init__(self, problem: Problem, options: Options, marginals: Marginals) -> None:
        self.problem, self.options, self.marginals = problem, options, marginals
        self.weights = problem.weights

    def costs(self, rows: Rows, k: int | None = None) -> Tensor:
        """C[rows] (B, r, m), or of problem k alone (1, r, m)."""
        problem = self.problem
        if k is not None and problem.batched:
            one = slice(k, k + 1)
            points, weights = (tuple(t[one] for t in ts) for ts in (problem.points, self.weights))
            problem = replace(problem, points=points, weights=weights)
        (C,) = build_costs(problem.of_rows(rows), [0, 1], self.options.cost, "dense")
        return C

    def solve(self, same: bool, init: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """f, g and the status (B, 4) without the term, of every problem."""
        found, a = [], self.weights[0]
        eps = self.options.eps  # a number or (B, 1)
        with torch.no_grad():
            for k in range(len(a)):
                options = self.options
                if isinstance(eps, Tensor):
                    options = options._replace(eps=eps[k].item())
                found.append(self._solve_one(k, same, options, [v[k] for v in init]))
        f, g, status = zip(*found, strict=True)
        return torch.stack(f), torch.stack(g), torch.stack(status)

    def _solve_one(
        self, k: int, same: bool, options: Options, init: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        def costs(rows: Rows) -> Tensor:
            return self.costs(rows, k)[0].contiguous()

        a, b = (w[k].detach() for w in self.weights)
        engine = RowEngine(costs, a, b, self.marginals)
        largest = max(map(abs, engine.cost_range))
        if not math.isfinite(largest):
            for name, x in zip(self.problem.names, self.problem.points, strict=True):
                _check.finite(name, x)
            raise ValueError(
                "cost must return finite values, got NaN or infinite ones; forbidden pairs, of "
                'infinite cost, need method="dense"'
            )
        if same:
            same = options.symmetric is not False and self.marginals.x == self.marginals.y
        if same and options.symmetric is None:
            same = is_symmetric((rows, costs(rows)) for rows in engine.blocks)
        solved = engine.solve(same, options, init)
        numbers = [solved.iterations, solved.error, solved.converged, largest]
        status = torch.tensor(numbers, dtype=torch.float64, device=solved.f.device)
        return solved.f, solved.g, status

    def value(self, f: Tensor, g: Tensor, scale: Scale | None) -> Tensor:
        """(B,) in float64, with the gradient at fixed potentials."""
        o, (a, b) = self.options, self.weights
        eps, transport = o.eps, o.objective == "transport"
        at_a, at_b = a.detach(), b.detach()
        if self.marginals.balanced:
            at_b = column_weights(at_a, at_b)
        if transport or torch.is_grad_enabled():
            refused = o.solves_system()

            def of_block(rows: slice) -> tuple[Tensor, ...]:
                C = self.costs(rows)
                P = plan(eps, C.detach(), f[:, rows], g, at_a[:, rows], at_b)
                return (_Product.apply(scale.over(C) if scale else C, P, refused),)

            parts = in_blocks(of_block, a.shape[1], b, self.problem.reads(o.cost))
            product = torch.stack([part for (part,) in parts]).sum(0)
        if transport:
            return product
        regularized = OBJECTIVES.index(o.objective)
        found = value(eps, a, f, g, at_a, at_b, regularized, self.marginals)
        if not torch.is_grad_enabled():
            return found
        moving = product
        of_weights = weight_gradients(eps, f, g, at_a, at_b, self.marginals)
        for w, of_w in zip((a, b), of_weights, strict=True):
            moving = moving + torch.where(w > 0, w * of_w, 0.0).sum(-1)
        return found + (moving - moving.detach())


class _Product(torch.autograd.Function):
    """``(C, P, refused) -> <C, P>`` (B,) in float64 at a plan that is held constant."""

    @staticmethod
    def forward(ctx: Any, C: Tensor, P: Tensor, refused: bool) -> Tensor:
        ctx.refused = refused
        ctx.save_for_backward(C, P)
        return (C * P).sum((-2, -1), dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.refused:
            raise NotImplementedError(f'objective="transport", "implicit": {_NO_IMPLICIT}')
        C, P = ctx.saved_tensors
        found = P * grad.to(P.dtype)[:, None, None]
        return *refuse_higher_order([found], [C, grad], _NO_IMPLICIT), None, None
