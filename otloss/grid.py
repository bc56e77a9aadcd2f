"""Optimal transport between densities on a regular grid, axis by axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otloss import _check, ops
from otloss._options import Options, Unbalanced, check_options, number
from otloss.autograd.grid import Grid, GridPotentials, GridValue, extended, softmin
from otloss.grid_result import GridResult
from otloss.losses import DEBIASED, LOSS
from otloss.problem import Problem
from otloss.reference import grid as reference
from otloss.reference.arguments import as_pairs
from otloss.reference.gradients import weight_gradients
from otloss.reference.marginals import centred, clamped, damping, marginals_of, value
from otloss.reference.semidual import column_ratio, marginal_error
from otloss.result import OTResult
from otloss.run import Solved, report
from otloss.totals import Combination, at_given_totals, at_unit_totals

__all__ = ["axes_of", "sinkhorn_divergence_grid", "solve_grid"]

Cost = str | Sequence[Tensor]


def solve_grid(
    a: Tensor,
    b: Tensor,
    eps: float,
    *,
    spacing: float | Sequence[float] = 1.0,
    periodic: bool | Sequence[bool] = False,
    cost: Cost = "sqeuclidean",
    unbalanced: Unbalanced = None,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    method: str = "auto",
    init: OTResult | tuple[Tensor, Tensor] | None = None,
) -> OTResult:
    r"""Entropic optimal transport between densities on a regular grid, images for example.

    .. math:: OT_\varepsilon(a, b) = \min_{P 1 = a,\; P^T 1 = b}
              \langle P, C\rangle + \varepsilon\, KL(P \,|\, a \otimes b), \qquad
              C_{ij} = \sum_k C^{(k)}_{i_k j_k}

    The cost is a sum over the axes, so that a softmin over all N points is one log-sum-exp along
    each axis in turn: time N (H + W) per sweep and memory N, without a matrix of N x N. All is
    computed in float64, on a CPU by the library's kernels, on a GPU in plain torch.

    Args:
        a, b: densities (B, N), (B, H, W) or (B, D, H, W), the batch first; non-negative, of equal
            total unless ``unbalanced``. They may be 0.
        eps: regularisation, in units of cost, absolute: ``2 * s**2`` blurs by about s, in units of
            ``spacing``.
        spacing: distance of neighbouring points, one or one per axis.
        periodic: whether the last point of an axis is a neighbour of the first, one or one per
            axis.
        cost: ``"sqeuclidean"`` |x - y|^2 (no 1/2), or a list of matrices, (H, H), (W, W), one per
            axis, which are constants; then ``spacing`` and ``periodic`` are not used.
        unbalanced, tol, max_iters, n_iters, init: as in :func:`otloss.solve`. With ``n_iters`` the
            gradient is that of the iterations, else that of the solution.
        method: ``"auto"`` or ``"reference"`` (plain torch).

    Returns:
        :class:`OTResult` whose potentials and marginals have the shape of a and b. ``apply`` takes
        ``(B, *grid)`` or ``(B, *grid, c)``; ``barycentric_map()`` is ``(B, *grid, axes)``, where a
        point goes to on average, in units of ``spacing`` from the first point. Where a density is 0
        the potential is that of the first mass to come. Differentiable in a and b, ``value`` twice.
        ``plan`` and what reads single pairs make the matrix of N x N. Under ``torch.compile`` it
        runs with graph breaks; ``fullgraph=True`` is not available.

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected.
        NotImplementedError: cost matrices that require a gradient.

    Example:
        >>> a, b = torch.rand(2, 1, 64, 64)
        >>> flow = otloss.solve_grid(a / a.sum(), b / b.sum(), eps=8.0).barycentric_map()

    References:
        Solomon et al., *Convolutional Wasserstein distances* (2015), for the separable kernel.
    """
    options = check_options(
        eps, unbalanced=unbalanced, tol=tol, max_iters=max_iters, n_iters=n_iters,
        method=_method(method),
    )  # fmt: skip
    problem, shape, dtype = _densities(a, b, options)
    axes, spaces, displacements = axes_of(shape, spacing, periodic, cost, a.device)
    start: list[Tensor] = []
    if init is not None:
        f, g = init.potentials if isinstance(init, OTResult) else init
        for name, v in (("f", f), ("g", g)):
            if not isinstance(v, Tensor) or v.shape != a.shape:
                raise ValueError(
                    f"init {name} must have shape {tuple(a.shape)}, got {_check.describe(v)}"
                )
        start = [v.detach().double().flatten(1) for v in (f, g)]
    grid = Grid(axes, options.eps, options.method == "reference")
    solved = _solve(problem, grid, spaces, LOSS, options, start)
    _check.finite_value("a grid", solved.loss.to(dtype))
    return GridResult(problem, grid, shape, displacements, options, solved, dtype)


def sinkhorn_divergence_grid(
    a: Tensor,
    b: Tensor,
    eps: float,
    *,
    spacing: float | Sequence[float] = 1.0,
    periodic: bool | Sequence[bool] = False,
    cost: Cost = "sqeuclidean",
    unbalanced: Unbalanced = None,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    method: str = "auto",
) -> Tensor:
    r"""The Sinkhorn divergence between densities on a regular grid.

    .. math:: S_\varepsilon(a, b) = OT_\varepsilon(a, b) - \tfrac12 OT_\varepsilon(a, a)
              - \tfrac12 OT_\varepsilon(b, b)

    Args and raises: as :func:`solve_grid`.

    Returns:
        (B,), twice differentiable in a and b.

    Example:
        >>> a, b = torch.rand(2, 8, 64, 64).div(64**2 / 2).requires_grad_()
        >>> loss = otloss.sinkhorn_divergence_grid(a, b, eps=8.0, unbalanced=100.0).sum()

    References:
        Feydy et al., *Interpolating between optimal transport and MMD* (2019).
    """
    options = check_options(
        eps, unbalanced=unbalanced, tol=tol, max_iters=max_iters, n_iters=n_iters,
        method=_method(method),
    )  # fmt: skip
    problem, shape, dtype = _densities(a, b, options)
    axes, spaces, _ = axes_of(shape, spacing, periodic, cost, a.device)
    grid = Grid(axes, options.eps, options.method == "reference")
    loss = _solve(problem, grid, spaces, DEBIASED, options, []).loss.to(dtype)
    _check.finite_value("a grid", loss)
    return loss


def _method(method: Any) -> Any:
    if method not in ("auto", "reference"):
        raise ValueError(f"method must be 'auto' or 'reference', got {method!r}")
    return method


def _densities(
    a: Tensor, b: Tensor, options: Options
) -> tuple[Problem, tuple[int, ...], torch.dtype]:
    """Checked, as weights (B, N) in float64; their shape and the dtype of results."""
    _check.no_transforms()
    a = _check.floating("a", a)
    if a.dim() not in (2, 3, 4) or 0 in a.shape:
        raise ValueError(
            f"a must have shape (B, N), (B, H, W) or (B, D, H, W), got {_check.describe(a)}"
        )
    shape = tuple(a.shape)
    _check.weights("a", a, shape, "the grid", a, part=True)
    _check.weights("b", b, shape, "a", a, part=True)
    dtype = _check.compute_dtype(a, b)
    weights = tuple(w.double().expand(shape).flatten(1) for w in (a, b))
    for name, w in zip("ab", weights, strict=True):
        if _check.readable(w) and not bool((w.detach().sum(-1) > 0).all()):
            raise ValueError(f"{name} must have a positive total, but a density is 0 everywhere")
    if options.balanced():
        _check.same_mass(weights[0], weights[1], (a, b))
    present = tuple(torch.ones_like(w, dtype=torch.bool) for w in weights)  # all are bins
    return Problem((), (), weights, True, True, present), shape[1:], dtype


def axes_of(
    shape: tuple[int, ...],
    spacing: float | Sequence[float],
    periodic: bool | Sequence[bool],
    cost: Cost,
    device: torch.device,
) -> tuple[list[Tensor], list[float], list[Tensor]]:
    """The costs of the axes; their spacing, where starts have a closed form; from i to j the
    displacements along each."""
    d = len(shape)
    each = list(spacing) if isinstance(spacing, Sequence) else [spacing] * d
    around = list(periodic) if isinstance(periodic, Sequence) else [periodic] * d
    for name, given in (("spacing", each), ("periodic", around)):
        if len(given) != d:
            raise ValueError(f"{name} must be one value or {d}, one per axis, got {len(given)}")
    each = [number("spacing", h) for h in each]
    moves = []
    for n, h, wraps in zip(shape, each, around, strict=True):
        i = torch.arange(n, dtype=torch.float64, device=device)
        D = i - i.unsqueeze(-1)
        moves.append(h * ((D + n // 2) % n - n // 2 if wraps else D))
    if isinstance(cost, str):
        if cost != "sqeuclidean":
            raise ValueError(f"cost must be 'sqeuclidean' or a list of matrices, got {cost!r}")
        return [D.square() for D in moves], [] if any(around) else each, moves
    matrices = [_check.floating(f"cost[{k}]", C) for k, C in enumerate(cost)]
    if [tuple(C.shape) for C in matrices] != [(n, n) for n in shape]:
        raise ValueError(
            f"cost must be matrices of shapes {[(n, n) for n in shape]}, one per axis, got "
            f"{[tuple(C.shape) for C in matrices]}"
        )
    for k, C in enumerate(matrices):
        if C.requires_grad:
            raise NotImplementedError("cost matrices of a grid have no gradient: detach them")
        if _check.readable(C):
            _check.finite(f"cost[{k}]", C)
    return [C.detach().to(device, torch.float64).contiguous() for C in matrices], [], moves


def _solve(
    problem: Problem,
    grid: Grid,
    spacing: list[float],
    combination: Combination,
    options: Options,
    init: list[Tensor],
) -> Solved:
    unit, totals = at_unit_totals(problem, options)
    init = totals.start(init, combination.pairs) if totals and init else init
    run = _iterations if options.n_iters >= 0 else _solution
    solved = run(unit, grid, spacing, combination, options, init)
    if totals is None:
        solved.loss = solved.loss.sum(0)
    solved = at_given_totals(solved, problem, totals, combination, options)
    report(problem, (), options, solved)
    return solved


def _solution(
    problem: Problem,
    grid: Grid,
    spacing: list[float],
    combination: Combination,
    o: Options,
    init: list[Tensor],
) -> Solved:
    """The terms (P, B) of a loss, differentiable by the conditions of optimality."""
    pairs, weights = combination.pairs, problem.weights
    where: Any = reference if grid.plain else ops
    numbers = ops.number(o.eps), ops.penalties(o.rho_x, o.rho_y)

    def solve(chosen: list[int], start: list[Tensor]) -> Any:
        return where.grid_solve(
            grid.axes, spacing, [w.detach().contiguous() for w in weights], chosen, *numbers,
            [v.contiguous() for v in start], ops.number(o.tol), o.max_iters,
        )  # fmt: skip

    status, all_f, all_g = solve(pairs, init)
    coefficients = status.new_tensor(combination.coefficients).unsqueeze(-1)
    if combination.debiased and _check.readable(status):
        terms = coefficients * status[..., ops.TERM]
        # The potentials of both densities with themselves are better ones where S is negative.
        if bool((clamped(terms.sum(0), terms.abs().sum(0), terms.dtype) < 0).any()):
            again, f, g = solve(pairs[:2], [all_f[1], all_g[2]])
            again[..., ops.ITERATIONS] += status[:1, :, ops.ITERATIONS]
            status[0], all_f[0], all_g[0] = again[0], f[0], g[0]
    values = []
    for p, (i, j) in enumerate(as_pairs(pairs)):
        a, b, marginals = weights[i], weights[j], marginals_of(o.rho_x, o.rho_y, i, j)
        f, g, term = all_f[p], all_g[p], status[p, :, ops.TERM]
        if marginals.balanced:
            f, g = centred(f, g, a.detach(), b.detach())
        if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
            f, g = GridPotentials.apply(grid, marginals, a, b, f, g)
            full = extended(grid, f, g, a, b, marginals)
            term = GridValue.apply(term, *weight_gradients(o.eps, *full, a, b, marginals), a, b)
        all_f[p], all_g[p] = f, g
        values.append(term)
    terms = coefficients * torch.stack(values)
    status[..., ops.TERM] = terms.detach()
    return Solved(terms, status, tuple(all_f), tuple(all_g))


def _iterations(
    problem: Problem,
    grid: Grid,
    spacing: list[float],
    combination: Combination,
    o: Options,
    init: list[Tensor],
) -> Solved:
    """The same after a number of iterations, differentiable by each of them."""
    rows, terms, all_f, all_g = [], [], [], []
    most = sum(float(C.abs().amax()) for C in grid.axes)
    for p, (i, j) in enumerate(as_pairs(combination.pairs)):
        a, b = problem.weights[i], problem.weights[j]
        marginals = marginals_of(o.rho_x, o.rho_y, i, j)
        g = init[2 * p + 1] if init else torch.zeros_like(b)
        for _ in range(o.n_iters):
            before = g
            f = damping(marginals.x, o.eps) * softmin(grid, g, b)
            t = softmin(grid.transposed, f, a)
            g = damping(marginals.y, o.eps) * t
        term = combination.coefficients[p] * value(o.eps, f, f, g, a, b, 0, marginals)
        ratio = column_ratio(before.detach(), t.detach(), o.eps, marginals.y)
        error = marginal_error(b.detach(), ratio)
        fixed = [torch.full_like(error, v) for v in (o.n_iters, most)]
        reached = (error <= o.tol).to(error)
        rows.append(torch.stack([fixed[0], error, reached, fixed[1], term.detach()], -1))
        terms.append(term)
        all_f.append(f)
        all_g.append(g)
    return Solved(torch.stack(terms), torch.stack(rows), tuple(all_f), tuple(all_g))
