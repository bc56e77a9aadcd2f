"""The result of one solve, that tells everything."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from otloss import _check, method, ops, reference
from otloss._options import Options
from otloss.problem import Problem, as_weights, build_costs, compute_dtype

__all__ = ["OTResult", "Solved"]


@dataclass
class Solved:
    loss: Tensor  # () or (B,)
    status: Tensor  # (P, B, 4)
    f: tuple[Tensor, ...]  # (B, n) per pair
    g: tuple[Tensor, ...]  # (B, m) per pair


class OTResult:
    """One solved OT problem: its value, potentials, plan and how well it converged.

    Shapes are those of the problem: with a batch every quantity has a leading ``B``. The tensors
    are differentiable where the gradient is defined; see ``backward`` in :func:`otloss.solve`.

    Attributes:
        value: ``OT_eps`` or, with ``objective="transport"``, ``<P, C>``; () or (B,).
        potentials: ``(f, g)``, (n,) and (m,), the plan being
            ``P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)``, unbalanced or not. Points of weight 0
            have potential 0.
    """

    def __init__(
        self,
        problem: Problem,
        cost: Tensor | None,
        options: Options,
        solved: Solved,
        system: list[Tensor],
        *,
        dense: bool,
    ) -> None:
        self._problem, self._given_cost, self._options = problem, cost, options
        self._dense = dense
        self._status, self._system = solved.status[0], system
        self._a, self._b = problem.weights[0], problem.weights[1]
        self._f, self._g = solved.f[0], solved.g[0]
        self.value = solved.loss
        self.potentials = (self._out(self._f), self._out(self._g))

    def _out(self, t: Tensor) -> Tensor:
        return t if self._problem.batched else t[0]

    @functools.cached_property
    def _cost(self) -> Tensor:
        """The cost matrix (B, n, m); from points it is made when first needed."""
        if self._given_cost is not None:
            return self._given_cost
        return build_costs(self._problem, [0, 1], self._options.cost, self._options.method)[0]

    @functools.cached_property
    def _plan(self) -> Tensor:
        return reference.plan(self._options.eps, self._cost, self._f, self._g, self._a, self._b)

    @property
    def plan(self) -> Tensor:
        """The transport plan P, (n, m), made when first asked for."""
        return self._out(self._plan)

    def _over_rows(self, function: Callable[..., tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """``function(rows, P, C)`` of the plan's rows: all at once where matrices are kept,
        otherwise a block at a time, made from the points, and again for the gradient."""
        if self._dense or "_plan" in self.__dict__:
            return [function(slice(None), self._plan, self._cost)]
        x, y = self._problem.points

        def of_block(rows: slice) -> tuple[Tensor, ...]:
            a, f = self._a[:, rows].contiguous(), self._f[:, rows]
            clouds = replace(self._problem, points=(x[..., rows, :], y), weights=(a, self._b))
            (C,) = build_costs(clouds, [0, 1], self._options.cost, self._options.method)
            P = reference.plan(self._options.eps, C, f, self._g, a, self._b)
            return function(rows, P, C)

        return _in_blocks(of_block, self._a.shape[1], self._b)

    @property
    def value_linear(self) -> Tensor:
        """``<P, C>``, the transport cost without the entropy; () or (B,)."""

        def block(_: slice, P: Tensor, C: Tensor) -> tuple[Tensor, ...]:
            return ((P * torch.where(P.detach() > 0, C, 0.0)).sum((-2, -1)),)

        return self._out(_total(part for (part,) in self._over_rows(block)))

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Row and column sums of the plan, (B, n) and (B, m)."""
        parts = self._over_rows(lambda _, P, __: (P.sum(-1), P.sum(-2)))
        return torch.cat([rows for rows, _ in parts], -1), _total(columns for _, columns in parts)

    @property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """Row and column sums of the plan, (n,) and (m,)."""
        rows, columns = self._sums()
        return self._out(rows), self._out(columns)

    def _status_field(self, field: int) -> Any:
        column = self._status[:, field]
        return column if self._problem.batched else column[0].item()

    @property
    def n_iters(self) -> Any:
        """Iterations that ran: an int, or (B,) for a batch. With ``tol``, readings of all pairs:
        sweeps, and on a CPU searches for the plan's large entries."""
        count = self._status_field(ops.ITERATIONS)
        return count.long() if self._problem.batched else int(count)

    @property
    def marginal_error(self) -> Any:
        """L1 distance of the plan's marginals to a and b, the larger, over the total mass.

        With ``unbalanced`` to those that the optimality conditions ask for, ``a exp(-f / rho_x)``
        and ``b exp(-g / rho_y)``, each over its own mass. Computed from the plan that is returned;
        a float, or (B,) for a batch.
        """
        rows, columns = self._sums()  # a plan that is kept is kept with its graph
        with torch.no_grad():
            a = self._a * reference.share(self._f, self._options.rho_x)
            b = self._b * reference.share(self._g, self._options.rho_y)
            row = (rows - a).abs().sum(-1)
            column = (columns - b).abs().sum(-1)
            # A plan that underflows has the marginals that are asked of it: 0.
            limits = torch.finfo(a.dtype)
            least = limits.tiny / limits.eps
            error = torch.maximum(
                row / a.sum(-1).clamp(min=least), column / b.sum(-1).clamp(min=least)
            )
        return error if self._problem.batched else error[0].item()

    @property
    def converged(self) -> Any:
        """Whether the marginal error came below ``tol``: a bool, or (B,) for a batch."""
        flag = self._status_field(ops.CONVERGED)
        return flag.bool() if self._problem.batched else bool(flag)

    @property
    def linear_system(self) -> tuple[Any, Any] | None:
        """Iterations and relative residual of the last implicit backward pass, as (int, float) or
        (B,) each; None before one that had to solve a linear system. A residual above 1e-6
        (float64) or 1e-4 (float32) also warns."""
        if not self._system:
            return None
        iterations, residual = self._system[0][0].unbind(-1)
        if self._problem.batched:
            return iterations.long(), residual
        return int(iterations.item()), residual.item()

    def explain(self) -> str:
        """How the problem was solved, in words: the method and, on a GPU, what the cost model of
        docs/performance-notes.md chose for it."""
        where = self._a.device
        how = self._options.method
        if how != "reference":
            how = "dense" if self._dense else "streamed"
        if where.type != "cuda" or how == "reference" or not ops.CUDA_KERNELS:
            return f"{how} on {where}"
        (problems, n), m = self._a.shape, self._b.shape[1]
        d = 0 if self._dense else self._problem.points[0].shape[-1]
        return f"{how} on {where}: {ops.describe_plan(self._a, problems, n, m, d)}"

    def apply(self, v: Tensor, axis: int = 1) -> Tensor:
        """``P @ v`` for ``axis=1`` (v has m rows), ``P.T @ v`` for ``axis=0`` (v has n rows).

        After a streamed solve the plan is made a few rows at a time and never stored.
        """
        if axis not in (0, 1):
            raise ValueError(f"axis must be 0 or 1, got {axis!r}")
        v = _check.floating("v", v)
        batched, count = self._problem.batched, (self._b if axis == 1 else self._a).shape[-1]
        vector = v.dim() == batched + 1
        if v.dim() not in (batched + 1, batched + 2) or v.shape[batched] != count:
            raise ValueError(f"v must have {count} rows for axis={axis}, got {_check.describe(v)}")
        right = (v if batched else v.unsqueeze(0)).to(self._a.dtype)
        right = right.unsqueeze(-1) if vector else right

        def block(rows: slice, P: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            with reference.full_precision(P):
                return (P @ right if axis == 1 else P.mT @ right[:, rows],)

        parts = [part for (part,) in self._over_rows(block)]
        out = self._out(torch.cat(parts, -2) if axis == 1 else _total(parts))
        return out.squeeze(-1) if vector else out

    def barycentric_map(self) -> Tensor:
        """Where each x_i goes on average: rows of ``P y / a``, (n, d); 0 for points of weight 0.

        With ``unbalanced``, where the part of x_i goes that is transported: ``P y / P 1``.
        """
        y = self._need_points("barycentric_map")[1]
        image = self.apply(y)
        mass = self._a if self._options.balanced() else self._sums()[0]
        mass = self._out(mass).unsqueeze(-1)
        return torch.where(mass > 0, image / torch.where(mass > 0, mass, 1.0), 0.0)

    def extend(self, x_new: Tensor) -> Tensor:
        """f on new points, (k,): ``-eps log sum_j b_j exp((g_j - c(x_new, y_j)) / eps)``.

        With ``unbalanced`` times ``rho_x / (rho_x + eps)``, as f is.
        """
        y = self._need_points("extend")[1]
        x_new = _check.points("x_new", x_new)
        _check.same_space("y", y, "x_new", x_new)
        dtype, eps = compute_dtype(y), self._options.eps
        factor = reference.damping(self._options.rho_x, eps)

        def of_block(rows: slice) -> tuple[Tensor, ...]:
            new = x_new[..., rows, :]
            weights = (as_weights(None, new, new.shape[-2]), self._b)
            clouds = Problem(("x_new", "y"), (new, y), weights, True, False)
            (C,) = build_costs(clouds, [0, 1], self._options.cost, self._options.method)
            return (factor * reference.softmin(eps, C.to(dtype), self._g, self._b),)

        count = x_new.shape[-2]
        parts = [of_block(slice(None))] if self._dense else _in_blocks(of_block, count, self._b)
        return self._out(torch.cat([part for (part,) in parts], -1))

    def _need_points(self, name: str) -> tuple[Tensor, ...]:
        if not self._problem.points:
            raise ValueError(f"{name} needs the points: use solve_sample(x, y, ...), not solve(C)")
        return self._problem.points

    def __repr__(self) -> str:
        batch = tuple(self._a.shape[:-1]) if self._problem.batched else ()
        shape = (*batch, self._a.shape[-1], self._b.shape[-1])
        return f"OTResult({shape}, eps={self._options.eps:g}, cost={self._options.cost!r})"


def _in_blocks(
    of_block: Callable[[slice], tuple[Tensor, ...]], count: int, across: Tensor
) -> list[tuple[Tensor, ...]]:
    """``of_block(rows)`` for ``count`` rows over ``across`` (B, m), some at a time. What is made on
    the way is not kept for the gradient but made again.
    """
    step = -(-method.BLOCK_BYTES // (across.numel() * across.element_size()))
    blocks = [slice(i, min(i + step, count)) for i in range(0, count, step)]
    if not torch.is_grad_enabled():
        return [of_block(rows) for rows in blocks]
    return [checkpoint(of_block, rows, use_reentrant=False) for rows in blocks]


def _total(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)
