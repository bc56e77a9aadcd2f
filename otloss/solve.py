"""Solving one OT problem: the calls that return a result."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from otloss import _check
from otloss._options import (
    Backward,
    Method,
    Objective,
    Options,
    Precision,
    Unbalanced,
    check_options,
)
from otloss.combination import LOSS, prepare, solve_pairs
from otloss.cost_matrices import hide_padding, see_empty_bins
from otloss.costs import Cost
from otloss.eps import check_shape, detached
from otloss.partial import Mass, PartialResult, check_options_of, with_dummies
from otloss.problem import Problem, as_one_batch, as_weights, check_clouds
from otloss.result import OTResult
from otloss.transforms import ResultInside, inside

__all__ = ["solve", "solve_sample"]


def solve(
    C: Tensor,
    eps: float | Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    objective: Objective = "regularized",
    unbalanced: Unbalanced = None,
    mass: Mass = None,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    backward: Backward = "auto",
    method: Method = "auto",
    init: OTResult | tuple[Tensor, Tensor] | None = None,
) -> OTResult:
    r"""Entropic optimal transport on a given cost matrix.

    .. math:: OT_\varepsilon(a, b) = \min_{P 1 = a,\; P^T 1 = b}
              \langle P, C\rangle + \varepsilon\, KL(P \,|\, a \otimes b)
              = \langle a, f\rangle + \langle b, g\rangle

    With ``unbalanced`` penalties replace the constraints: :math:`\rho_x KL(P 1 \,|\, a)` and
    :math:`\rho_y KL(P^T 1 \,|\, b)` with :math:`KL(p \,|\, q) = \sum p \log (p / q) - p + q`, and
    the totals of a and b may differ. At the solution the marginals are
    :math:`a\, e^{-f / \rho_x}` and :math:`b\, e^{-g / \rho_y}`.

    With ``mass``, partial transport, the plan has that total and :math:`P 1 \le a,\; P^T 1 \le b`;
    the totals of a and b may differ. What stays has an entropy too, so that only the limit of small
    eps is exact (docs/unbalanced.md).

    Args:
        C: cost matrix (n, m), or (B, n, m) for a batch of independent problems. One matrix serves
            many weights, (n, m) with a (B, n) and b (B, m), or (1, n, m). Infinity forbids a pair:
            the plan is exactly 0 there, and so is the gradient.
        eps: regularisation, in units of ``C``, absolute. A tensor () or (B,) gives each problem
            its own, and has a gradient.
        a, b: weights (n,) and (m,), or (B, n) and (B, m); default uniform. A row of weight 0
            changes nothing and receives gradient 0. Its weight has a one-sided derivative if its
            costs are finite, an empty bin, and else is padding, with gradient 0.
        objective: ``"regularized"``: :math:`OT_\varepsilon`; ``"transport"``:
            :math:`\langle P_\varepsilon, C\rangle`.
        unbalanced: penalty rho on the KL divergence of the plan's marginals from a and b, in units
            of ``C``, absolute. A number, or a pair ``(rho_x, rho_y)`` in which None makes a side a
            constraint. Default None: balanced.
        mass: how much is transported, at most the totals of a and b; a number, or a tensor () or
            (B,), which has a gradient.
        tol: stop when the marginal error, L1 over the total mass or over ``mass``, is at most this.
        max_iters: upper bound on the sweeps; reaching it gives a :class:`ConvergenceWarning`, on
            CUDA when ``converged`` or ``n_iters`` of the result is first read.
        n_iters: run this number of iterations (f, then g, from zero potentials or ``init``) with no
            stopping test.
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
        :class:`OTResult`, differentiable in C, a and b, twice. Balanced potentials are determined
        up to (f + t, g - t): the result has the pair with ``<a, f> = <b, g>``, or with ``n_iters``
        that of the last iteration. Unbalanced potentials are unique.

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected; no plan that avoids
            the forbidden pairs. On CUDA and in compiled code the value is NaN instead.
        NotImplementedError: a derivative that is not available, with what to use instead.

    Example:
        >>> C = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> result = otloss.solve(C, eps=0.05)
        >>> result.plan.round(decimals=2)  # everything stays
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
        >>> print(result.converged, f"{result.value_linear.item():.3f}")
        True 0.000

    References:
        Cuturi, *Sinkhorn distances* (2013); Feydy et al., *Interpolating between optimal transport
        and MMD using Sinkhorn divergences* (2019); for ``mass`` Chapel, Alaya, Gasso, *Partial
        optimal transport with applications on positive-unlabeled learning* (2020).
    """
    options = check_options(
        eps, objective=objective, unbalanced=unbalanced, tol=tol, max_iters=max_iters,
        n_iters=n_iters, backward=backward, method=method,
    )  # fmt: skip
    check_options_of(mass, options)
    if options.method == "multiscale":
        raise NotImplementedError(
            'method="multiscale" needs the points: use solve_sample(x, y, ...), not solve(C)'
        )
    matrix = functools.partial(_solve_matrix, mass=mass)
    return _inside_or_now(matrix, {"C": C}, {"a": a, "b": b}, options, init)


def solve_sample(
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: Cost = "sqeuclidean",
    objective: Objective = "regularized",
    unbalanced: Unbalanced = None,
    mass: Mass = None,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    backward: Backward = "auto",
    method: Method = "auto",
    precision: Precision = "float32",
    init: OTResult | tuple[Tensor, Tensor] | None = None,
) -> OTResult:
    r"""Entropic optimal transport between two clouds.

    .. math:: OT_\varepsilon(a, b) = \min_{P 1 = a,\; P^T 1 = b}
              \langle P, C\rangle + \varepsilon\, KL(P \,|\, a \otimes b), \qquad
              C_{ij} = c(x_i, y_j)

    :func:`otloss.solve` says what ``unbalanced`` and ``mass`` make of it.

    Args:
        x, y: clouds (n, d) and (m, d), or (B, n, d) and (B, m, d); float16 and bfloat16 are
            computed in float32.
        eps: regularisation, in units of cost, absolute.
        cost: ``"sqeuclidean"`` |x - y|^2 (no 1/2), ``"euclidean"`` |x - y|, ``"cosine"``
            1 - <x, y> / (|x| |y|), or a function ``(x, y) -> C``.
        method, precision: as in :func:`otloss.sinkhorn_divergence`.
        a, b, objective, unbalanced, mass, tol, max_iters, n_iters, backward, init: as in
            :func:`otloss.solve`.

    Returns:
        :class:`OTResult`, differentiable in x, y, a and b, twice; see :func:`otloss.solve`.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`otloss.solve`.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> result = otloss.solve_sample(x, x.flip(0) + 0.1, eps=0.01)
        >>> result.argmax()
        tensor([1, 0])
        >>> result.barycentric_map().round(decimals=2)
        tensor([[0.1000, 0.1000],
                [1.1000, 0.1000]])

        Half of the mass, whatever is near:

        >>> y = torch.tensor([[0.0, 0.1], [9.0, 9.0]])  # an outlier
        >>> half = otloss.solve_sample(x, y, eps=0.05, mass=0.5)
        >>> half.plan.round(decimals=2)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.0000]])

    References:
        As :func:`otloss.solve`.
    """
    options = check_options(
        eps, cost=cost, objective=objective, unbalanced=unbalanced, tol=tol, max_iters=max_iters,
        n_iters=n_iters, backward=backward, method=method, precision=precision,
    )  # fmt: skip
    check_options_of(mass, options)
    points = functools.partial(_solve_points, mass=mass)
    return _inside_or_now(points, {"x": x, "y": y}, {"a": a, "b": b}, options, init)


Init = OTResult | tuple[Tensor, Tensor] | None


def _inside_or_now(
    function: functools.partial[OTResult],
    given: dict[str, Tensor],
    weights: dict[str, Tensor | None],
    options: Options,
    init: Init,
) -> OTResult:
    """``function(*given, a, b, options, init)``, or its result inside torch.func."""
    if not _check.transformed():
        return function(*given.values(), *weights.values(), options, init)
    if function.keywords["mass"] is not None:
        raise NotImplementedError("mass= is not available inside torch.func: call it for a batch")
    if "C" in given and any(w is not None and w.dim() == 2 for w in weights.values()):
        given = {"C": _one_for_all(given["C"])}
    f, g = init.potentials if isinstance(init, OTResult) else init or (None, None)

    def call(
        given: dict[str, Tensor], rest: dict[str, Tensor | None], options: Options
    ) -> tuple[Tensor, ...]:
        *weights, f, g = rest.values()
        start = None if f is None or g is None else (f, g)
        return ResultInside.tensors_of(function(*given.values(), *weights, options, start))

    return ResultInside(inside(call, given, {**weights, "f": f, "g": g}, options, [0, 1]))


def _solve_matrix(
    C: Tensor, a: Tensor | None, b: Tensor | None, options: Options, init: Init, *, mass: Mass
) -> OTResult:
    C = _check.matrix(C)
    n, m = C.shape[-2:]
    given = [w for w in (a, b) if isinstance(w, Tensor)]
    if given and all(w.dim() == 2 for w in given):
        C = _one_for_all(C)
    (like,) = as_one_batch([C], given)
    for name, w, size in (("a", a, n), ("b", b, m)):
        if w is not None:
            _check.weights(name, w, (*like.shape[:-2], size), "C", C)
    dtype = _check.compute_dtype(C, *given)
    weights = (as_weights(a, like, n, dtype), as_weights(b, like, m, dtype))
    padded = a is not None or b is not None
    if padded and options.balanced() and mass is None:
        _check.same_mass(*weights, (a, b))
    problem = Problem((), (), weights, padded, C.dim() == 3)
    C = C.to(dtype).reshape(-1, n, m)
    start = _initial_potentials(init, problem)
    if mass is not None:
        return _solve_partial(problem, C, options, start, mass)
    problem = see_empty_bins(problem, [0, 1], options.cost, options.method, C)
    costs = (hide_padding(problem, C, *problem.weights),)
    return _solve_one(problem, costs, options, start)


def _one_for_all(C: Tensor) -> Tensor:
    """(n, m) as a batch of one."""
    return C.unsqueeze(0) if C.dim() == 2 else C


def _solve_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    options: Options,
    init: Init,
    *,
    mass: Mass,
) -> OTResult:
    balanced = options.balanced() and mass is None
    problem = check_clouds({"x": x, "y": y}, {"a": a, "b": b}, balanced=balanced)
    start = _initial_potentials(init, problem)
    if mass is not None:
        return _solve_partial(problem, None, options, start, mass)
    problem, costs, options, dense = prepare(problem, [0, 1], options)
    return _solve_one(problem, costs, options, start, dense=dense)


def _solve_partial(
    problem: Problem,
    C: Tensor | None,
    options: Options,
    start: tuple[Tensor, ...],
    mass: float | Tensor,
) -> OTResult:
    check_shape(options.eps, problem)
    (whole, costs, options, dense, share), start = with_dummies(problem, mass, C, options, start)
    return _solve_one(whole, costs, options, start, dense=dense, part=problem, share=share)


def _solve_one(
    problem: Problem,
    costs: Sequence[Tensor] | None,
    options: Options,
    start: Sequence[Tensor],
    *,
    dense: bool = True,
    part: Problem | None = None,
    share: Tensor | None = None,
) -> OTResult:
    """``part``: the problem whose dummies ``problem`` has; ``share``: of the mass, that moves."""
    check_shape(options.eps, problem)
    if not torch.is_grad_enabled():  # what the result makes later must not start a graph either
        options, problem, part = detached(options), problem.detached(), part and part.detached()
    # A traced graph cannot change a list from its backward pass.
    system: list[Tensor] | None = None if torch.compiler.is_compiling() else []
    costs, solved = solve_pairs(
        problem, costs, LOSS, options, start, potentials=True, dense=dense, system=system,
        share=share,
    )  # fmt: skip
    cost = costs[0] if costs else None
    if part:
        return PartialResult(part, problem, cost, options, solved, dense=dense)
    return OTResult(problem, cost, options, solved, dense=dense)


def _initial_potentials(init: Init, problem: Problem) -> tuple[Tensor, ...]:
    if init is None:
        return ()
    start: list[Tensor] = []
    f, g = init.potentials if isinstance(init, OTResult) else init
    for name, v, w in (("f", f, problem.weights[0]), ("g", g, problem.weights[1])):
        v = _check.floating(f"init {name}", v)
        expected = tuple(w.shape) if problem.batched else tuple(w.shape[1:])
        if tuple(v.shape) != expected:
            raise ValueError(f"init {name} must have shape {expected}, got {_check.describe(v)}")
        if _check.readable(v):
            _check.finite(f"init {name}", v)
            v = v.clone() if v.is_inference() else v  # which autograd could not save
        start.append(v.detach().to(w.dtype).reshape(w.shape))
    return tuple(start)
