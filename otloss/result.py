"""The solution of one OT problem and everything that follows from it; ``plan.py`` has how the plan
is kept or made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from otloss import _check, ops
from otloss._options import Options
from otloss.cost_matrices import build_costs
from otloss.costs import product
from otloss.duality_gap import Dual, duality_gap
from otloss.method import in_blocks
from otloss.plan import total_of
from otloss.problem import Problem, as_weights
from otloss.reference.marginals import column_weights, damping, share, softmin
from otloss.run import Solved
from otloss.sampling import PlanPairs
from otloss.status import rows_of, warn_not_converged

__all__ = ["OTResult"]


class OTResult(PlanPairs):
    """The solution of one OT problem: value, potentials, plan, convergence.

    With a batch every quantity has a leading dimension ``B``; numbers of a single problem are
    Python numbers, inside a compiled function 0-d tensors. All tensors are differentiable;
    ``backward`` in :func:`otloss.solve` says how. What is computed on demand reads the tensors that
    the solve was given, and raises a RuntimeError if one has been changed in place since.

    Attributes:
        value: ``OT_eps`` or, with ``objective="transport"``, ``<P, C>``; () or (B,).
        potentials: ``(f, g)``, (n,) and (m,). They give the plan
            ``P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)``, balanced or not. Points of weight 0
            have potential 0.

    Example:
        >>> x, y = torch.rand(2, 50, 3, generator=torch.manual_seed(0))
        >>> result = otloss.solve_sample(x, y, eps=0.05, tol=1e-6)
        >>> f, g = result.potentials
        >>> abs(result.value - (f + g).mean()).item() < 1e-5  # <a, f> + <b, g>
        True
        >>> i, j = result.sample()  # a partner j of every i
        >>> abs(result.value_linear - (result.plan * otloss.cost_matrix(x, y)).sum()).item() < 1e-6
        True
    """

    def __init__(
        self,
        problem: Problem,
        cost: Tensor | None,
        options: Options,
        solved: Solved,
        *,
        dense: bool,
    ) -> None:
        super().__init__(problem, cost, options, solved, dense=dense)
        self._status = solved.status[0]
        self._reported = _check.readable(self._status)
        self.value = solved.loss
        self.potentials = (self._out(self._f), self._out(self._g))

    @property
    def plan(self) -> Tensor:
        """The transport plan P, (n, m), computed at first use."""
        return self._out(self._plan)

    @property
    def value_linear(self) -> Tensor:
        """``<P, C>``, the transport cost without the entropy; () or (B,)."""
        parts = self._over_rows(lambda _, P, C: ((P * C).sum((-2, -1)),))
        return self._out(total_of(part for (part,) in parts))

    @property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """Row and column sums of the plan, (n,) and (m,)."""
        rows, columns = self._sums()
        return self._out(rows), self._out(columns)

    def _number(self, t: Tensor) -> Any:
        """(B,) of a batch, else a Python number or, in a traced graph, a 0-d tensor."""
        if self._problem.batched:
            return t
        return t[0] if _check.traced(t) else t[0].item()

    def _status_field(self, field: int) -> Tensor:
        if not self._reported and not _check.traced(self._status):
            self._reported = True  # the first reading of what the solve left on its device
            warn_not_converged(self._options, rows_of(self._status[None]), self._a.dtype)
        return self._status[:, field]

    @property
    def n_iters(self) -> Any:
        """Iterations that ran, an int or (B,). With ``tol``: sweeps over all pairs, where a search
        for large entries of the plan (CPU) counts as one."""
        return self._number(self._status_field(ops.ITERATIONS).long())

    @property
    def marginal_error(self) -> Any:
        """L1 distance between the plan's marginals and the target marginals, divided by their mass;
        the larger of the two sides, a float or (B,).

        Targets are a and b, or with ``unbalanced`` ``a exp(-f / rho_x)`` and ``b exp(-g / rho_y)``.
        Computed from the potentials returned.
        """
        if self._options.method == "multiscale":  # with a bound of what it leaves out
            return self._number(self._status_field(ops.ERROR))
        rows, columns = self._sums()  # a plan that is kept is kept with its graph
        with torch.no_grad():
            a = self._a * share(self._f, self._options.rho_x)
            b = self._b * share(self._g, self._options.rho_y)
            row = (rows - a).abs().sum(-1)
            column = (columns - b).abs().sum(-1)
            # If the plan underflows, both it and its target marginals are 0: no error.
            limits = torch.finfo(a.dtype)
            least = limits.tiny / limits.eps
            error = torch.maximum(
                row / a.sum(-1).clamp(min=least), column / b.sum(-1).clamp(min=least)
            )
        return self._number(error)

    @property
    def duality_gap(self) -> Any:
        """A bound on the error of ``value``: ``|value - OT_eps|`` is at most this, a float or (B,).

        It is the primal value of a feasible plan P' minus the dual value of ``potentials``::

            eps KL(P'|P) + rho_x KL(P' 1 | a exp(-f/rho_x)) + rho_y KL(P'^T 1 | b exp(-g/rho_y))

        where a constraint has no term and ``KL(p|q) = sum p log(p/q) - p + q``. P' is the plan P
        with the rows and columns scaled down that have too much, and a plan of rank 1 for what they
        lack. If rounding moved ``value`` out of the interval between dual and primal, the bound is
        wider by that. With ``objective="transport"`` it is for the regularized value.

        Computed on demand by two readings of the costs in float64, in blocks of rows, and without a
        gradient; after a multiscale solve of the pairs that hold something, and what others may
        hold is added. See docs/totals.md.
        """
        self._check_unchanged()
        o = self._options
        a, b, f, g = (t.detach().double() for t in self._dual_point())
        if o.balanced():
            b = column_weights(a, b)
        given = self._problem
        clouds, weights = (
            tuple(t.detach().double() for t in ts) for ts in (given.points, given.weights)
        )
        problem = replace(given, points=clouds, weights=weights)

        def blocks(function: Callable[[slice, Tensor], tuple[Tensor, ...]]) -> Any:
            def of_block(rows: slice) -> tuple[Tensor, ...]:
                return function(rows, self._dual_costs(problem, rows))

            return in_blocks(of_block, a.shape[1], b)

        with torch.no_grad():
            value = self.value.reshape(-1) if o.objective == "regularized" else None
            eps = o.eps.detach().to(a) if isinstance(o.eps, Tensor) else o.eps
            dual = Dual(a, b, f, g, eps, o.rho_x, o.rho_y)
            if self._prunes():
                gap = self._pruned_gap(dual, value, clouds)
            else:
                gap = duality_gap(dual, value, blocks)
        return self._number(gap)

    def _dual_point(self) -> tuple[Tensor, ...]:
        """Weights and potentials that the certificate is of."""
        return self._a, self._b, self._f, self._g

    def _dual_costs(self, problem: Problem, rows: slice) -> Tensor:
        given = self._given_cost
        return self._cost_rows(problem, rows) if given is None else given[:, rows].double()

    @property
    def converged(self) -> Any:
        """Whether the marginal error of the plan, the rounding of its potentials included, is at
        most ``tol``: a bool, or (B,).

        On CUDA the first reading of this or ``n_iters`` gives the :class:`ConvergenceWarning`.
        """
        return self._number(self._status_field(ops.CONVERGED).bool())

    @property
    def linear_system(self) -> tuple[Any, Any] | None:
        """Iterations and relative residual of the last implicit backward pass, as (int, float) or
        (B,) each; None until a backward pass has solved a linear system. A residual above 1e-6
        (float64) or 1e-4 (float32) also warns."""
        system = self._system()
        if not system:
            return None
        iterations, residual = system[0][0].unbind(-1)
        return self._number(iterations.long()), self._number(residual)

    def _system(self) -> list[Tensor] | None:
        return None if self._settings is None else self._settings.system

    def explain(self) -> str:
        """How the problem was solved: the method and, on a GPU, the launch layout that the cost
        model chose (docs/cuda-performance.md)."""
        where, how = self._a.device, self._options.method
        if how not in ("reference", "multiscale"):
            how = "dense" if self._dense else "streamed"
        if where.type != "cuda" or how in ("reference", "multiscale") or not ops.CUDA_KERNELS:
            return f"{how} on {where}"
        (problems, n), m = self._a.shape, self._b.shape[1]
        d = 0 if self._dense else self._problem.points[0].shape[-1]
        return f"{how} on {where}: {ops.describe_plan(self._a, problems, n, m, d)}"

    def apply(self, v: Tensor, axis: int = 1) -> Tensor:
        """``P @ v`` for ``axis=1`` (v has m rows), ``P.T @ v`` for ``axis=0`` (v has n rows).

        After a streamed solve rows of the plan are computed in blocks and not stored.
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
        if self._prunes(right):
            out = self._out(self._product(right, axis).to(right.dtype))
            return out.squeeze(-1) if vector else out

        def block(rows: slice, P: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            return (product(P, right) if axis == 1 else product(P.mT, right[:, rows]),)

        parts = [part for (part,) in self._over_rows(block)]
        out = self._out(torch.cat(parts, -2) if axis == 1 else total_of(parts))
        return out.squeeze(-1) if vector else out

    def barycentric_map(self) -> Tensor:
        """Mean of the points that x_i is transported to, rows of ``P y / a``, (n, d); 0 for points
        of weight 0.

        With ``unbalanced`` or ``mass`` the mean over the mass transported, ``P y / P 1``. P 1
        differs from a by the marginal error, and the map by that share of the distance from y to
        0: of clouds far from 0 solve to a small ``tol``, or take their mean off.
        """
        y = self._need_points("barycentric_map")[1]
        y = (y if self._problem.batched else y.unsqueeze(0)).to(self._a.dtype)
        y = torch.where((self._b > 0).unsqueeze(-1) | y.isfinite().all(-1, keepdim=True), y, 0.0)
        right = torch.cat([y, torch.ones_like(y[..., :1])], -1)
        if self._prunes(right):
            products, held = self._product(right, 1), self._a
        else:
            parts = self._over_rows(lambda _, P, __: (product(P, right),), relative=True)
            products, held = torch.cat([part for (part,) in parts], -2), self._a > 0
        mass = held.unsqueeze(-1) if self._moves_all() else products[..., -1:]
        image = products[..., :-1] / torch.where(mass > 0, mass, 1.0)
        return self._out(torch.where(mass > 0, image, 0.0).to(self._a.dtype))

    def extend(self, x_new: Tensor) -> Tensor:
        """f on new points, (k,): ``-eps log sum_j b_j exp((g_j - c(x_new, y_j)) / eps)``.

        With ``unbalanced`` multiplied by ``rho_x / (rho_x + eps)``, like f. After a multiscale
        solve, where no gradient is wanted, from the y that hold something of each sum, to within
        1e-6 eps.
        """
        self._check_unchanged()
        y = self._need_points("extend")[1]
        x_new = _check.points("x_new", x_new)
        _check.same_space("y", y, "x_new", x_new)
        dtype, eps = self._a.dtype, self._eps
        factor = damping(self._options.rho_x, eps)
        if self._prunes(x_new) and self._finds(x_new):
            return self._out((factor * self._extended_to(x_new)).to(dtype))

        def of_block(rows: slice) -> tuple[Tensor, ...]:
            new = x_new[..., rows, :]
            weights = (as_weights(None, new, new.shape[-2], dtype), self._b)
            clouds = Problem(("x_new", "y"), (new.to(dtype), y), weights, True, False)
            (C,) = build_costs(clouds, [0, 1], self._options.cost, self._options.method)
            return (factor * softmin(eps, C, self._g, self._b),)

        count = x_new.shape[-2]
        parts = (
            [of_block(slice(None))]
            if self._dense
            else in_blocks(of_block, count, self._b, (x_new, y))
        )
        return self._out(torch.cat([part for (part,) in parts], -1))

    def _need_points(self, name: str) -> tuple[Tensor, ...]:
        if not self._problem.points:
            raise ValueError(f"{name} needs the points: use solve_sample(x, y, ...), not solve(C)")
        return self._problem.points

    def __repr__(self) -> str:
        batch = tuple(self._a.shape[:-1]) if self._problem.batched else ()
        shape = (*batch, self._a.shape[-1], self._b.shape[-1])
        eps = self._options.eps
        shown = f"a tensor {tuple(eps.shape)}" if isinstance(eps, Tensor) else f"{eps:g}"
        return f"OTResult({shape}, eps={shown}, cost={self._options.cost!r})"
