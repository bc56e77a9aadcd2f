"""Solving OT problems: what every loss stands on, and the result that tells everything."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from otloss import _check, ops, reference, schedule
from otloss._check import Options
from otloss.autograd import CostMatrices, Settings, Solve
from otloss.costs import COSTS, Cost

__all__ = ["OTResult", "Problem", "build_costs", "run", "solve", "solve_sample"]


# ------------------------------------------------------------------------------- inner interface


@dataclass
class Problem:
    """Checked clouds or cost matrices with their weights, batched, in the dtype computed in."""

    names: tuple[str, ...]
    points: tuple[Tensor, ...]  # (n, d) or (B, n, d) as given, or empty: costs are given
    weights: tuple[Tensor, ...]  # (B, n) each
    padded: bool  # some weight may be 0
    batched: bool


def compute_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _as_weights(w: Tensor | None, like: Tensor, n: int) -> Tensor:
    """(B, n) weights, uniform if none were given."""
    dtype = compute_dtype(like)
    if w is None:
        batch = like.shape[0] if like.dim() == 3 else 1
        return torch.full((batch, n), 1.0 / n, dtype=dtype, device=like.device)
    return w.to(dtype).reshape(-1, n).contiguous()


def check_clouds(
    clouds: dict[str, Any], weights: dict[str, Any] | None = None, *, balanced: bool = True
) -> Problem:
    """Checks clouds by name against the first, and the weights of the first two."""
    names, points = tuple(clouds), tuple(_check.points(k, v) for k, v in clouds.items())
    for name, x in zip(names[1:], points[1:], strict=True):
        _check.same_space(names[0], points[0], name, x)
    given = [] if weights is None else list(weights.items())
    for (name, w), cloud, x in zip(given, names, points, strict=False):
        if w is not None:
            _check.weights(name, w, tuple(x.shape[:-1]), cloud, x)
    values = [w for _, w in given] + [None] * (len(points) - len(given))
    ready = tuple(_as_weights(w, x, x.shape[-2]) for w, x in zip(values, points, strict=True))
    padded = any(w is not None for w in values)
    if padded and balanced:
        _check.same_mass(ready[0], ready[1], points[0].dtype)
    return Problem(names, points, ready, padded, points[0].dim() == 3)


def build_costs(problem: Problem, pairs: list[int], cost: Cost, method: str) -> tuple[Tensor, ...]:
    """C (B, n, m) of each pair; differentiable in the points."""
    points = problem.points
    if isinstance(cost, str):
        weights = problem.weights if problem.padded else ()
        return CostMatrices.apply(pairs, COSTS[cost], method, len(points), *points, *weights)
    weights = problem.weights
    return tuple(
        _hide_padding(problem, _call_cost(cost, points[i], points[j]), weights[i], weights[j])
        for i, j in reference.as_pairs(pairs)
    )


def _hide_padding(problem: Problem, C: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """C (B, n, m) with 0 for points of weight 0, where anything may stand."""
    if not problem.padded or (_check.readable(a) and bool((a > 0).all()) and bool((b > 0).all())):
        return C
    return torch.where((a.unsqueeze(-1) > 0) & (b.unsqueeze(-2) > 0), C, 0.0)


def _call_cost(cost: Any, x: Tensor, y: Tensor) -> Tensor:
    dtype = compute_dtype(x)
    C = cost(x.to(dtype), y.to(dtype))
    expected = (*x.shape[:-1], y.shape[-2])
    if not isinstance(C, Tensor) or tuple(C.shape) != expected:
        raise ValueError(
            f"cost must return a tensor of shape {expected} for clouds of shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}, got {_check.describe(C)}"
        )
    return C.to(dtype).reshape(-1, *C.shape[-2:])


@dataclass
class Solved:
    loss: Tensor  # () or (B,)
    status: Tensor  # (P, B, 4)
    f: tuple[Tensor, ...]  # (B, n) per pair
    g: tuple[Tensor, ...]  # (B, m) per pair


def _choose_backward(options: Options) -> str:
    """`auto` made concrete: the mode that is exact for the objective and the iterations asked for.

    For the regularized value "implicit" and "envelope" are the same gradient.
    """
    if options.backward != "auto":
        return options.backward
    return "unrolled" if options.n_iters >= 0 else "implicit"


def streams(problem: Problem, pairs: list[int], options: Options) -> bool:
    """Whether to solve without cost matrices."""
    on_cpu = problem.points[0].device.type == "cpu"
    possible = isinstance(options.cost, str) and (on_cpu or ops.CUDA_KERNELS)
    if options.method == "streamed" and not possible:
        raise NotImplementedError(
            'method="streamed" needs a cost given by name and, on a GPU, a build with CUDA '
            f"kernels, got cost={options.cost!r} on {problem.points[0].device}"
        )
    if options.method != "auto" or not possible:
        return options.method == "streamed"
    sizes = [
        (problem.weights[i].shape[1], problem.weights[j].shape[1])
        for i, j in reference.as_pairs(pairs)
    ]
    backward = _choose_backward(options)
    regularized = options.objective == "regularized"
    chosen = schedule.choose_method(
        problem.points,
        sizes,
        problem.weights[0].element_size(),
        many_passes_back=backward == "unrolled" or (backward == "implicit" and not regularized),
    )
    return chosen == "streamed"


def run(
    problem: Problem,
    costs: Sequence[Tensor] | None,
    pairs: list[int],
    coefficients: list[float],
    options: Options,
    init: Sequence[Tensor] = (),
    *,
    potentials: bool = False,
    dense: bool = True,
    system: list[Tensor] | None = None,
) -> Solved:
    """Solves all pairs and adds their values up.

    ``costs``: None to work on the points, with or without (``dense``) storing cost matrices.
    ``potentials``: whether f and g are wanted as differentiable outputs.
    ``system``: receives the status of the linear system when an implicit gradient is taken.
    """
    inputs = problem.points if costs is None else tuple(costs)
    needs_grad = torch.is_grad_enabled() and any(
        t.requires_grad for t in (*inputs, *problem.weights)
    )
    backward = _choose_backward(options)
    settings = Settings(
        pairs=pairs,
        coefficients=coefficients,
        options=options,
        backward=backward,
        potentials=potentials,
        trace=needs_grad and backward == "unrolled",
        dense=dense,
        batched=problem.batched,
        system=system,
    )
    costs, points = ((), problem.points) if costs is None else (tuple(costs), ())
    sizes = [len(costs), len(points), len(problem.weights), len(init)]
    loss, status, *rest = Solve.apply(settings, sizes, *costs, *points, *problem.weights, *init)
    if _check.readable(status):
        _report(problem, costs, options, status)
    half = len(rest) // 2
    return Solved(loss, status, tuple(rest[:half]), tuple(rest[half:]))


def _report(problem: Problem, costs: Sequence[Tensor], options: Options, status: Tensor) -> None:
    """Raises on data that could not be solved, warns where the solver did not converge."""
    rows = [row for batch in status.tolist() for row in batch]
    worst = max(rows, key=lambda row: row[ops.ERROR] if row[ops.ERROR] >= 0 else math.inf)
    max_cost = max((row[ops.MAX_COST] for row in rows), key=lambda c: c if c >= 0 else math.inf)
    if not math.isfinite(max_cost):
        for name, x in zip(problem.names, problem.points, strict=False):
            _check.finite(name, x)
        for C in costs:
            _check.finite("C" if not problem.points else "the cost matrix", C)
        raise ValueError(f"costs overflow {problem.weights[0].dtype}: scale the data down")
    _check.resolution(options.eps, max_cost, problem.weights[0].dtype)
    if options.n_iters < 0 and not worst[ops.CONVERGED]:
        _check.not_converged(options, int(worst[ops.ITERATIONS]), worst[ops.ERROR], max_cost)


# ------------------------------------------------------------------------------------- results


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
        method = self._options.method
        if method != "reference":
            method = "dense" if self._dense else "streamed"
        if where.type != "cuda" or method == "reference" or not ops.CUDA_KERNELS:
            return f"{method} on {where}"
        (problems, n), m = self._a.shape, self._b.shape[1]
        d = 0 if self._dense else self._problem.points[0].shape[-1]
        return f"{method} on {where}: {ops.describe_plan(self._a, problems, n, m, d)}"

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
        mass = self._a if self._options.balanced else self._sums()[0]
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
            weights = (_as_weights(None, new, new.shape[-2]), self._b)
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
    step = -(-schedule.BLOCK_BYTES // (across.numel() * across.element_size()))
    blocks = [slice(i, min(i + step, count)) for i in range(0, count, step)]
    if not torch.is_grad_enabled():
        return [of_block(rows) for rows in blocks]
    return [checkpoint(of_block, rows, use_reentrant=False) for rows in blocks]


def _total(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


# ---------------------------------------------------------------------------------- public calls


def solve(
    C: Tensor,
    eps: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    objective: str = "regularized",
    unbalanced: float | tuple[float | None, float | None] | None = None,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    backward: str = "auto",
    method: str = "auto",
    init: OTResult | tuple[Tensor, Tensor] | None = None,
) -> OTResult:
    r"""Entropic optimal transport on a given cost matrix.

    .. math:: OT_\varepsilon(a, b) = \min_{P 1 = a,\; P^T 1 = b}
              \langle P, C\rangle + \varepsilon\, KL(P \,|\, a \otimes b)
              = \langle a, f\rangle + \langle b, g\rangle

    With ``unbalanced`` the constraints are penalties, :math:`\rho_x KL(P 1 \,|\, a)` and
    :math:`\rho_y KL(P^T 1 \,|\, b)` with :math:`KL(p \,|\, q) = \sum p \log (p / q) - p + q`, and
    the totals of a and b may differ. At the solution the marginals are
    :math:`a\, e^{-f / \rho_x}` and :math:`b\, e^{-g / \rho_y}`.

    Args:
        C: cost matrix (n, m), or (B, n, m) for a batch of independent problems.
        eps: regularisation, in units of ``C``, absolute.
        a, b: weights (n,) and (m,), or (B, n) and (B, m); default uniform. A point of weight 0 is
            padding: it changes nothing and receives gradient 0.
        objective: ``"regularized"``: :math:`OT_\varepsilon`; ``"transport"``:
            :math:`\langle P_\varepsilon, C\rangle`.
        unbalanced: strength rho of the penalties, in units of ``C``, absolute: one number, or a
            pair ``(rho_x, rho_y)`` with None for a constraint; default None, balanced.
        tol: stop when the marginal error, L1 over the total mass, is at most this.
        max_iters: stop after so many iterations with a :class:`ConvergenceWarning`.
        n_iters: run exactly so many iterations (f, then g, from zero potentials) instead.
        backward: ``"envelope"``: the gradient of ``value`` at fixed potentials (``dOT/dC = P``,
            ``dOT/da = f`` up to a constant, taken so that ``<a, f> = <b, g>``), exact at
            convergence for the regularized objective; for ``"transport"`` it holds the plan
            constant. ``"implicit"``: differentiates the optimality conditions, for every tensor of
            the result. ``"unrolled"``: the exact derivative of the ``n_iters`` iterations.
            ``"auto"``: unrolled with ``n_iters``, else implicit, which is the envelope for the
            regularized ``value``. See docs/gradients.md.
        method: ``"dense"``, ``"reference"`` (plain torch) or ``"auto"``.
        init: potentials to start from: an :class:`OTResult` or ``(f, g)``.

    Returns:
        :class:`OTResult`, differentiable in C, a and b, twice. Of the balanced potentials
        (f + t, g - t) it has those with ``<a, f> = <b, g>``, or, with ``n_iters``, those of the
        last iteration; unbalanced ones are unique.

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected.
        NotImplementedError: a derivative that is not available, with what to use instead.

    References:
        Cuturi, *Sinkhorn distances* (2013); Feydy et al., *Interpolating between optimal transport
        and MMD using Sinkhorn divergences* (2019).
    """
    options = _check.options(
        eps,
        objective=objective,
        unbalanced=unbalanced,
        tol=tol,
        max_iters=max_iters,
        n_iters=n_iters,
        backward=backward,
        method=method,
    )
    C = _check.matrix(C)
    n, m = C.shape[-2:]
    for name, w, size in (("a", a, n), ("b", b, m)):
        if w is not None:
            _check.weights(name, w, (*C.shape[:-2], size), "C", C)
    weights = (_as_weights(a, C, n), _as_weights(b, C, m))
    padded = a is not None or b is not None
    if padded and options.balanced:
        _check.same_mass(*weights, C.dtype)
    problem = Problem((), (), weights, padded, C.dim() == 3)
    costs = (_hide_padding(problem, C.to(compute_dtype(C)).reshape(-1, n, m), *weights),)
    return _solve_one(problem, costs, options, init)


def solve_sample(
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: Cost = "sqeuclidean",
    objective: str = "regularized",
    unbalanced: float | tuple[float | None, float | None] | None = None,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    backward: str = "auto",
    method: str = "auto",
    precision: str = "float32",
    init: OTResult | tuple[Tensor, Tensor] | None = None,
) -> OTResult:
    """Entropic optimal transport between two clouds.

    Args:
        x, y: clouds (n, d) and (m, d), or (B, n, d) and (B, m, d); float16 and bfloat16 are
            computed in float32.
        eps: regularisation, in units of cost, absolute.
        cost: ``"sqeuclidean"`` |x - y|^2 (no 1/2), ``"euclidean"`` |x - y|, ``"cosine"``
            1 - <x, y> / (|x| |y|), or a function ``(x, y) -> C``.
        method, precision: as in :func:`otloss.sinkhorn_divergence`.
        a, b, objective, unbalanced, tol, max_iters, n_iters, backward, init: as in
            :func:`otloss.solve`.

    Returns:
        :class:`OTResult`, differentiable in x, y, a and b, twice; see :func:`otloss.solve`.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`otloss.solve`.
    """
    options = _check.options(
        eps,
        cost=cost,
        objective=objective,
        unbalanced=unbalanced,
        tol=tol,
        max_iters=max_iters,
        n_iters=n_iters,
        backward=backward,
        method=method,
        precision=precision,
    )
    problem = check_clouds({"x": x, "y": y}, {"a": a, "b": b}, balanced=options.balanced)
    dense, named = not streams(problem, [0, 1], options), isinstance(options.cost, str)
    costs = None if named else build_costs(problem, [0, 1], options.cost, options.method)
    return _solve_one(problem, costs, options, init, dense=dense)


def _solve_one(
    problem: Problem,
    costs: tuple[Tensor, ...] | None,
    options: Options,
    init: OTResult | tuple[Tensor, Tensor] | None,
    *,
    dense: bool = True,
) -> OTResult:
    if not torch.is_grad_enabled():  # what the result makes later must not start a graph either
        problem = replace(
            problem,
            points=tuple(x.detach() for x in problem.points),
            weights=tuple(w.detach() for w in problem.weights),
        )
    start = _initial_potentials(init, problem)
    system: list[Tensor] = []
    solved = run(
        problem, costs, [0, 1], [1.0], options, start, potentials=True, dense=dense, system=system
    )
    return OTResult(problem, costs[0] if costs else None, options, solved, system, dense=dense)


def _initial_potentials(
    init: OTResult | tuple[Tensor, Tensor] | None, problem: Problem
) -> tuple[Tensor, ...]:
    if init is None:
        return ()
    f, g = init.potentials if isinstance(init, OTResult) else init
    for name, v, w in (("f", f, problem.weights[0]), ("g", g, problem.weights[1])):
        v = _check.floating(f"init {name}", v)
        expected = tuple(w.shape) if problem.batched else tuple(w.shape[1:])
        if tuple(v.shape) != expected:
            raise ValueError(f"init {name} must have shape {expected}, got {_check.describe(v)}")
        if _check.readable(v):
            _check.finite(f"init {name}", v)
    a, b = problem.weights
    return f.detach().to(a.dtype).reshape(a.shape), g.detach().to(b.dtype).reshape(b.shape)
