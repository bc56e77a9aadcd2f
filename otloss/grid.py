"""Optimal transport between densities on a regular grid, axis by axis."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otloss import _check
from otloss._options import Objective, Options, Unbalanced, check_options, number
from otloss.autograd.grid import Grid
from otloss.combination import DEBIASED, LOSS
from otloss.grid_result import GridResult
from otloss.grid_solve import solve_densities
from otloss.problem import Problem
from otloss.result import OTResult

__all__ = ["axes_of", "sinkhorn_divergence_grid", "solve_grid"]

Cost = str | Sequence[Tensor]


def solve_grid(
    a: Tensor,
    b: Tensor,
    eps: float | Tensor,
    *,
    spacing: float | Sequence[float] = 1.0,
    periodic: bool | Sequence[bool] = False,
    cost: Cost = "sqeuclidean",
    objective: Objective = "regularized",
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
    computed in float64, on a CPU by the library's kernels, on a GPU by a kernel for the softmins
    under the solver of plain torch.

    Args:
        a, b: densities (B, N), (B, H, W) or (B, D, H, W), the batch first; non-negative, of equal
            total unless ``unbalanced``. They may be 0.
        eps: regularisation, in units of cost, absolute: ``2 * s**2`` blurs by about s, in units of
            ``spacing``. A tensor () gives the regularized value a gradient in it.
        spacing: distance of neighbouring points, one or one per axis.
        periodic: whether the last point of an axis is a neighbour of the first, one or one per
            axis.
        cost: ``"sqeuclidean"`` |x - y|^2 (no 1/2), or a list of matrices, (H, H), (W, W), one per
            axis, which are constants; then ``spacing`` and ``periodic`` matter to
            ``barycentric_map`` alone.
        objective, unbalanced, tol, max_iters, n_iters, init: as in :func:`otloss.solve`. With
            ``n_iters`` the gradient is that of the iterations, else that of the solution.
        method: ``"auto"`` or ``"reference"`` (plain torch).

    Returns:
        :class:`OTResult` whose potentials and marginals have the shape of a and b. ``apply`` takes
        ``(B, *grid)`` or ``(B, *grid, c)``; ``barycentric_map()`` is ``(B, *grid, axes)``, where a
        point goes to on average, in units of ``spacing`` from the first point. Where a density is 0
        the potential is that of the first mass to come. Differentiable in a and b; twice are the
        regularized ``value``, and with ``n_iters`` all. ``plan`` and what reads single pairs make
        the matrix of N x N.

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected.
        NotImplementedError: cost matrices that require a gradient; derivatives in eps of more than
            the regularized value; second derivatives of more than that without ``n_iters``.

    Example:
        >>> a, b = torch.rand(2, 1, 64, 64)
        >>> flow = otloss.solve_grid(a / a.sum(), b / b.sum(), eps=8.0).barycentric_map()

    References:
        Solomon et al., *Convolutional Wasserstein distances* (2015), for the separable kernel.
    """
    options = check_options(
        eps, objective=objective, unbalanced=unbalanced, tol=tol, max_iters=max_iters,
        n_iters=n_iters, method=_method(method),
    )  # fmt: skip
    problem, shape, dtype = _densities(a, b, options)
    axes, spaces, displacements = axes_of(shape, spacing, periodic, cost, a.device)
    start: list[Tensor] = []
    if init is not None:
        f, g = init.potentials if isinstance(init, OTResult) else init
        for name, v in (("f", f), ("g", g)):
            if _check.floating(f"init {name}", v).shape != a.shape:
                raise ValueError(
                    f"init {name} must have shape {tuple(a.shape)}, got {_check.describe(v)}"
                )
            if _check.readable(v):
                _check.finite(f"init {name}", v)
        start = [v.detach().double().flatten(1) for v in (f, g)]
    grid = _grid(axes, options)
    solved = solve_densities(problem, grid, spaces, LOSS, options, start)
    _check.finite_value("a grid", solved.loss.to(dtype))
    return GridResult(problem, grid, shape, displacements, options, solved, dtype)


def sinkhorn_divergence_grid(
    a: Tensor,
    b: Tensor,
    eps: float | Tensor,
    *,
    spacing: float | Sequence[float] = 1.0,
    periodic: bool | Sequence[bool] = False,
    cost: Cost = "sqeuclidean",
    objective: Objective = "regularized",
    unbalanced: Unbalanced = None,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    method: str = "auto",
) -> Tensor:
    r"""The Sinkhorn divergence between densities on a regular grid.

    .. math:: S_\varepsilon(a, b) = OT_\varepsilon(a, b) - \tfrac12 OT_\varepsilon(a, a)
              - \tfrac12 OT_\varepsilon(b, b)

    Args and raises: as :func:`solve_grid`; given cost matrices must be symmetric.

    Returns:
        (B,), differentiable in a and b, twice where :func:`solve_grid` is.

    Example:
        >>> a, b = torch.rand(2, 8, 64, 64).div(64**2 / 2).requires_grad_()
        >>> loss = otloss.sinkhorn_divergence_grid(a, b, eps=8.0, unbalanced=100.0).sum()

    References:
        Feydy et al., *Interpolating between optimal transport and MMD* (2019).
    """
    options = check_options(
        eps, objective=objective, unbalanced=unbalanced, tol=tol, max_iters=max_iters,
        n_iters=n_iters, method=_method(method),
    )  # fmt: skip
    problem, shape, dtype = _densities(a, b, options)
    axes, spaces, _ = axes_of(shape, spacing, periodic, cost, a.device)
    if not isinstance(cost, str):
        _check_symmetric(axes)
    loss = solve_densities(problem, _grid(axes, options), spaces, DEBIASED, options, []).loss
    loss = loss.to(dtype)
    _check.finite_value("a grid", loss)
    return loss


def _check_symmetric(axes: list[Tensor]) -> None:
    """Of a density against itself one potential is solved for."""
    for k, C in enumerate(axes):
        apart = (C - C.mT).abs().amax()
        good = apart <= 64 * torch.finfo(torch.float32).eps * C.abs().amax()
        demand = f"cost[{k}] must be symmetric in a divergence"
        if _check.unread(C):
            torch._assert_async(good, demand)
        elif not _check.traced(C) and not bool(good):
            raise ValueError(f"{demand}, but it and its transpose are {float(apart):.3g} apart")


def _method(method: Any) -> Any:
    if method not in ("auto", "reference"):
        raise ValueError(f"method must be 'auto' or 'reference', got {method!r}")
    return method


def _grid(axes: list[Tensor], o: Options) -> Grid:
    eps = o.eps
    if isinstance(eps, Tensor):
        if eps.dim():
            raise ValueError(f"eps must be a number or have shape (), got {_check.describe(eps)}")
        if _check.traced(eps):
            raise NotImplementedError("eps of a grid in compiled code must be a number")
        eps = eps.item()
    system: list[Tensor] | None = None if torch.compiler.is_compiling() else []
    return Grid(axes, eps, o.method == "reference", system)


def _densities(
    a: Tensor, b: Tensor, options: Options
) -> tuple[Problem, tuple[int, ...], torch.dtype]:
    """Checked, as weights (B, N) in float64; their shape and the dtype of results."""
    _check.no_transforms()
    a = _check.floating("a", a)
    if a.dim() not in (2, 3, 4) or 0 in a.shape:
        raise ValueError(
            "a must have shape (B, N), (B, H, W) or (B, D, H, W), the batch first, got "
            f"{_check.describe(a)}"
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
        note = f". {shape} is a batch of lines: one image is (1, H, W)" if a.dim() == 2 else ""
        _check.same_mass(weights[0], weights[1], (a, b), note)
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
    if any(h * h < sys.float_info.min for h in each):
        raise ValueError(f"squares of spacing={min(each):g} underflow: choose another unit")
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
