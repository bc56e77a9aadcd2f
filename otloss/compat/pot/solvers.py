"""The functions that return a result."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from otloss.compat.pot.common import as_cost, potentials, refuse, tolerance, weights_of
from otloss.costs import Cost
from otloss.losses import sinkhorn_divergence
from otloss.result import OTResult as Solved
from otloss.solve import solve as solve_matrix
from otloss.solve import solve_sample as solve_points

__all__ = ["OTResult", "solve", "solve_batch", "solve_sample"]

GRADIENTS = ("autodiff", "envelope", "last_step", "detach", "implicit")
# Elsewhere in otloss, by the method of POT's solve_sample.
ELSEWHERE = {"1d": "otloss.wasserstein_1d", "sliced": "otloss.sliced_wasserstein"}


class OTResult:
    """What POT's result of that name tells: ``value``, ``value_linear``, ``plan``, ``potentials``,
    ``marginals`` and parts of these, ``status`` and ``log``. Plans are made when first asked for.

    ``result`` is the :class:`otloss.OTResult` behind it, with all that it can do.
    """

    def __init__(
        self,
        solved: Callable[[], Solved],
        reg: float,
        value: Callable[[Solved], Tensor],
        value_linear: Callable[[], Tensor] | None = None,
        *,
        weighted: bool = True,
    ) -> None:
        self._solved, self._reg, self._value, self._linear = solved, reg, value, value_linear
        self._weighted = weighted

    @functools.cached_property
    def result(self) -> Solved:
        return self._solved()

    @property
    def value(self) -> Tensor:
        return self._value(self.result)

    @property
    def value_linear(self) -> Tensor:
        return self.result.value_linear if self._linear is None else self._linear()

    @property
    def plan(self) -> Tensor:
        return self.result.plan

    @property
    def potentials(self) -> tuple[Tensor, Tensor]:
        """``(u, v)``; of an unbalanced problem, as in POT, without the weights: ``plan =
        a_i b_j exp(u_i + v_j - M_ij / reg)``."""
        return potentials(self.result, self._reg, weighted=self._weighted)

    @property
    def potential_a(self) -> Tensor:
        return self.potentials[0]

    @property
    def potential_b(self) -> Tensor:
        return self.potentials[1]

    @property
    def marginals(self) -> tuple[Tensor, Tensor]:
        return self.result.marginals

    @property
    def marginal_a(self) -> Tensor:
        return self.marginals[0]

    @property
    def marginal_b(self) -> Tensor:
        return self.marginals[1]

    @property
    def status(self) -> str:
        converged = self.result.converged
        good = bool(converged.all()) if isinstance(converged, Tensor) else converged
        return "Converged" if good else "Not converged"

    @property
    def log(self) -> dict[str, Any]:
        return {"n_iter": self.result.n_iters}

    def __getattr__(self, name: str) -> Any:
        if name in ("lazy_plan", "sparse_plan", "value_quad"):
            raise NotImplementedError(f"{name} has no counterpart in otloss")
        raise AttributeError(name)


def solve(
    M: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    reg: float | None = None,
    c: None = None,
    reg_type: str = "KL",
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    method: str | None = None,
    n_threads: int = 1,
    max_iter: int | None = None,
    plan_init: None = None,
    potentials_init: None = None,
    tol: float | None = None,
    verbose: bool = False,
    grad: str = "autodiff",
) -> OTResult:
    """``ot.solve`` with ``reg``: entropic transport on a cost matrix, balanced or unbalanced.

    Args:
        M, a, b, reg: as in :func:`otloss.solve`, with ``reg`` in place of eps.
        reg_type: ``"KL"``: the value is that of :func:`otloss.solve`, with KL(P | a b^T);
            ``"entropy"``: it has sum P log P in place of the KL, with the same plan. Balanced.
        unbalanced: a penalty or a pair; an infinite one is a constraint. ``value`` is the minimum
            itself, which POT's is not.
        tol, max_iter: as ``stopThr`` and ``numItermax`` of :func:`sinkhorn`.
        grad: ``"detach"``: no gradients. All others: those of the optimality conditions, for
            ``value``, ``plan`` and ``potentials``.
        method, n_threads, verbose: without effect.

    Raises:
        NotImplementedError: what has no counterpart: ``reg=None`` (exact transport), ``c``,
            ``reg_type="L2"``, ``unbalanced_type`` other than ``"KL"``, initial plans.

    Example:
        >>> import otloss.compat.pot as ot
        >>> result = ot.solve(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reg=0.05)
        >>> print(f"{result.value_linear:.2f}")
        0.00
    """
    options = _solve_options(reg, c, reg_type, unbalanced, unbalanced_type, grad, max_iter)
    refuse(plan_init=plan_init, potentials_init=potentials_init)
    if method is not None and method not in ("sinkhorn", "sinkhorn_log"):
        raise NotImplementedError(f"method={method!r} has no counterpart in otloss")
    M, a, b = (_given(t, grad) for t in (M, a, b))
    options["tol"] = tolerance(1e-9 if tol is None else tol, M)
    result = solve_matrix(M, a=a, b=b, **options)
    return _wrapped(result, reg_type, options)


def solve_sample(
    X_a: Tensor,
    X_b: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    metric: Cost = "sqeuclidean",
    reg: float | None = None,
    c: None = None,
    reg_type: str = "KL",
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    lazy: bool = False,
    batch_size: int | None = None,
    method: str | None = None,
    n_threads: int = 1,
    max_iter: int | None = None,
    plan_init: None = None,
    rank: int = 100,
    scaling: float = 0.95,
    potentials_init: None = None,
    X_init: None = None,
    tol: float | None = None,
    verbose: bool = False,
    grad: str = "autodiff",
    random_state: Any = None,
    debias: bool = False,
    n_projections: int = 50,
    projections: None = None,
    scaler: None = None,
) -> OTResult:
    """``ot.solve_sample`` with ``reg``: as :func:`solve`, between samples.

    Args:
        metric: ``"sqeuclidean"``, ``"euclidean"``, ``"cosine"`` or a function ``(x, y) -> C``.
        lazy: no cost matrix is stored.
        debias: ``value`` is :func:`otloss.sinkhorn_divergence` (unbalanced with its mass term,
            which POT's has not), ``value_linear`` the one with ``objective="transport"``; plan and
            potentials are those between the two samples.
        batch_size, rank, scaling, random_state, n_projections, projections, verbose: without
            effect.

    Raises:
        NotImplementedError: what has no counterpart, as in :func:`solve`; methods other than
            Sinkhorn's (:func:`otloss.wasserstein_1d` and :func:`otloss.sliced_wasserstein` have two
            of them), ``debias="split"``, ``scaler``.

    Example:
        >>> import otloss.compat.pot as ot
        >>> ot.solve_sample(torch.rand(5, 2), torch.rand(7, 2), reg=0.1).plan.shape
        torch.Size([5, 7])
    """
    options = _solve_options(reg, c, reg_type, unbalanced, unbalanced_type, grad, max_iter)
    refuse(plan_init=plan_init, potentials_init=potentials_init, X_init=X_init, scaler=scaler)
    if method is not None and method not in ("sinkhorn", "sinkhorn_log"):
        elsewhere = ELSEWHERE.get(method.lower(), "nothing")
        raise NotImplementedError(f"method={method!r} has no counterpart here, but {elsewhere}")
    if debias not in (False, True):
        raise NotImplementedError(f"debias={debias!r} has no counterpart in otloss")
    X_a, X_b, a, b = (_given(t, grad) for t in (X_a, X_b, a, b))
    options |= {"cost": as_cost(metric), "method": "streamed" if lazy else "auto"}
    options["tol"] = tolerance(1e-9 if tol is None else tol, X_a, X_b)
    if not debias:
        result = solve_points(X_a, X_b, a=a, b=b, **options)
        return _wrapped(result, reg_type, options)
    divergence = functools.partial(sinkhorn_divergence, X_a, X_b, a=a, b=b, **options)
    value = divergence()
    return OTResult(
        lambda: solve_points(X_a, X_b, a=a, b=b, **options),
        options["eps"],
        lambda _: value,
        lambda: divergence(objective="transport"),
        weighted=options["unbalanced"] is None,
    )


def solve_batch(
    M: Tensor,
    reg: float | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
) -> OTResult:
    """``ot.batch.solve_batch`` with ``reg``: as :func:`solve`, for M (B, n, m), a (B, n) and b
    (B, m). Here ``reg_type`` is ``"entropy"`` by default. ``inner_iter`` and ``inner_reg`` have no
    effect.

    Raises:
        NotImplementedError: ``reg=None`` or ``method="proximal"``.

    Example:
        >>> import otloss.compat.pot as ot
        >>> ot.solve_batch(torch.rand(3, 5, 7), reg=0.1).plan.shape
        torch.Size([3, 5, 7])
    """
    if method not in ("auto", "sinkhorn", "log_sinkhorn"):
        raise NotImplementedError(f"method={method!r} has no counterpart in otloss")
    return solve(M, a, b, reg, None, reg_type, max_iter=max_iter, tol=tol, grad=grad)


def _solve_options(
    reg: Any, c: Any, reg_type: Any, unbalanced: Any, unbalanced_type: str, grad: str, limit: Any
) -> dict[str, Any]:
    """eps, unbalanced and max_iters of a call; raises for what has no counterpart."""
    if reg is None or reg == 0:
        raise NotImplementedError(
            "reg=None, exact transport, has no counterpart in otloss: give reg, or on the line see "
            "otloss.wasserstein_1d"
        )
    if not isinstance(reg_type, str) or reg_type.lower() not in ("kl", "entropy"):
        raise NotImplementedError(f"reg_type={reg_type!r} has no counterpart in otloss")
    if unbalanced_type.lower() != "kl":
        raise NotImplementedError(f"unbalanced_type={unbalanced_type!r} has no counterpart")
    if grad not in GRADIENTS:
        raise ValueError(f"grad must be one of {', '.join(map(repr, GRADIENTS))}, got {grad!r}")
    refuse(c=c)
    pair = None if unbalanced is None else [float(r) for r in torch.as_tensor(unbalanced).flatten()]
    if pair is not None and reg_type.lower() == "entropy":
        raise NotImplementedError('reg_type="entropy" with unbalanced= has no counterpart')
    rho = None if pair is None else tuple(None if math.isinf(r) else r for r in (pair * 2)[:2])
    balanced = rho is None or rho == (None, None)
    limit = 1000 if limit is None else limit
    return {"eps": reg, "unbalanced": None if balanced else rho, "max_iters": limit}


def _wrapped(result: Solved, reg_type: str, options: dict[str, Any]) -> OTResult:
    reg = options["eps"]

    def value(result: Solved) -> Tensor:
        if reg_type.lower() == "kl":
            return result.value
        # sum P log P is KL(P | a b^T) and the sums of a log a and b log b
        sums = [torch.xlogy(w, w).sum(-1) for w in weights_of(result)]
        return result.value + reg * (sums[0] + sums[1])

    return OTResult(lambda: result, reg, value, weighted=options["unbalanced"] is None)


def _given(t: Any, grad: str) -> Any:
    return t.detach() if grad == "detach" and isinstance(t, Tensor) else t
