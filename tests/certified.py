"""Entropic transport in float64 with a proof, `low <= OT <= high`. Nothing here is from otloss.

Any pair of potentials gives a lower bound of OT, the dual; any plan with the marginals asked for
gives an upper bound. Whatever the solver below does, the interval holds, but for the rounding of
numpy's long double; where it is narrow the problem is solved, and `Proof.width` says so.

The solver is a damped Newton method on the semidual of the smaller side, in which the other side's
potential is the best one, at a sequence of falling eps. Marginals are soft (rho) or constraints
(rho = inf). Points of weight 0 are left out.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.floating]
LONG = np.longdouble
LOG_LARGEST = 700.0


@dataclass
class Problem:
    C: Array  # (n, m)
    a: Array  # (n,), positive
    b: Array  # (m,), positive; of the total of a where both marginals are constraints
    eps: float
    rho_x: float
    rho_y: float

    @property
    def balanced(self) -> bool:
        return math.isinf(self.rho_x) and math.isinf(self.rho_y)

    def transposed(self) -> Problem:
        return Problem(self.C.T.copy(), self.b, self.a, self.eps, self.rho_y, self.rho_x)


@dataclass
class Proof:
    """low <= OT <= high; P has the marginals of a feasible plan whose primal value is high."""

    problem: Problem
    f: Array
    g: Array
    P: Array
    low: np.longdouble
    high: np.longdouble
    mass: float  # of the plan

    @property
    def width(self) -> float:
        return float(self.high - self.low)

    def transport(self) -> float:
        return float((self.P * self.problem.C).sum())


# ------------------------------------------------------------------------------------- quantities


def softmin(C: Array, g: Array, b: Array, eps: float) -> Array:
    """-eps log sum_j b_j exp((g_j - C_ij) / eps), exact also where eps is far above the costs."""
    total = b.sum()
    z = (g - C) / eps
    if np.abs(z).max() < 0.5:
        return -eps * (np.log1p(np.expm1(z) @ (b / total)) + math.log(total))
    top = z.max(1, keepdims=True)
    return -eps * (np.log(np.exp(z - top) @ b) + top[:, 0])


def damping(rho: float, eps: float) -> float:
    return 1 / (1 + eps / rho)


def wanted(w: Array, v: Array, rho: float) -> Array:
    """The marginal that potentials ask of the plan."""
    return w if math.isinf(rho) else w * np.exp(np.minimum(-v / rho, LOG_LARGEST))


def term(w: Array, v: Array, rho: float) -> float:
    with np.errstate(over="ignore"):
        return (w * v).sum() if math.isinf(rho) else -rho * (w * np.expm1(-v / rho)).sum()


def plan(p: Problem, f: Array, g: Array) -> Array:
    with np.errstate(over="ignore"):
        return p.a[:, None] * p.b * np.exp((f[:, None] + g - p.C) / p.eps)


def dual(p: Problem, f: Array, g: Array) -> np.longdouble:
    """The dual value of any potentials, in long double: no more than OT.

    Where both marginals are constraints potentials are taken up to a constant, with the best one.
    """
    C, f, g = (t.astype(LONG) for t in (p.C, f, g))
    (a, total_a), (b, total_b) = (with_total(w) for w in (p.a, p.b))
    with np.errstate(over="ignore"):
        # sum ab (e - 1), which keeps its digits where eps is far above the costs
        excess = a @ np.expm1((f[:, None] + g - C) / p.eps) @ b
    if p.balanced:
        both = (a * f).sum() + (b * g).sum()
        growth = np.log1p(excess / (total_a * total_b)) + np.log(total_b)
        return both - p.eps * total_a * growth
    return term(a, f, p.rho_x) + term(b, g, p.rho_y) - p.eps * excess


def with_total(w: Array) -> tuple[Array, Array]:
    """Weights and their total, which is 1 where it differs from that by their rounding."""
    total = w.astype(LONG).sum()
    exact = LONG(1) if abs(total - 1) < 8 * 2.0**-52 else total
    return w.astype(LONG) * (exact / total), exact


def kl(p: Array, q: Array) -> float:
    """sum p log(p/q) - p + q, exact where p is near q."""
    with np.errstate(all="ignore"):
        d = (p - q) / q
        near = np.abs(d) < 0.5
        small = np.where(near, d, 0.0)
        by_ratio = q * ((1 + small) * np.log1p(small) - small)
        by_logs = np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0) / q), 0.0) - p + q
    return float(np.where(q > 0, np.where(near, by_ratio, by_logs), 0.0).sum())


def feasible(p: Problem, f: Array, g: Array) -> tuple[Array, float]:
    """A plan near that of (f, g) with the marginals A and B asked for, and its distance to the
    dual value, both soft terms included."""
    A, B = wanted(p.a, f, p.rho_x), wanted(p.b, g, p.rho_y)
    A0, B0 = A, B
    if not math.isinf(p.rho_x) and not math.isinf(p.rho_y):
        total = math.sqrt(A.sum()) * math.sqrt(B.sum())
        A0, B0 = A * (total / A.sum()), B * (total / B.sum())
    elif math.isinf(p.rho_x):
        B0 = B * (A.sum() / B.sum())
    else:
        A0 = A * (B.sum() / A.sum())
    P = plan(p, f, g)
    Q = P * np.minimum(1, A0 / np.maximum(P.sum(1), 1e-300))[:, None]
    Q = Q * np.minimum(1, B0 / np.maximum(Q.sum(0), 1e-300))
    lost, missing = np.maximum(A0 - Q.sum(1), 0), np.maximum(B0 - Q.sum(0), 0)
    Q = Q + lost[:, None] * (missing / max(missing.sum(), 1e-300))
    return Q, gap_of(p, Q, f, g)


def gap_of(p: Problem, Q: Array, f: Array, g: Array) -> float:
    """primal(Q) - dual(f, g) of a feasible plan: a sum of terms that are not negative."""
    with np.errstate(all="ignore"):
        log_plan = (f[:, None] + g - p.C) / p.eps + np.log(p.a)[:, None] + np.log(p.b)
        P = np.exp(log_plan)
        far = (Q > 0) & ~((P > Q / 2) & (P < Q * 2))
        by_logs = np.where(far, Q * (np.log(np.where(far, Q, 1.0)) - log_plan) - Q + P, 0.0)
    near = np.where(far, 0.0, P)
    gap = p.eps * (float(by_logs.sum()) + kl(np.where(far, 0.0, Q), near))
    for marginal, w, v, rho in ((Q.sum(1), p.a, f, p.rho_x), (Q.sum(0), p.b, g, p.rho_y)):
        gap += 0.0 if math.isinf(rho) else rho * kl(marginal, wanted(w, v, rho))
    return gap


# ----------------------------------------------------------------------------------------- solver


def _semidual(p: Problem, g: Array) -> tuple[float, Array]:
    """The dual at g and the best f, which is returned."""
    f = damping(p.rho_x, p.eps) * softmin(p.C, g, p.b, p.eps)
    value = term(p.a, f, p.rho_x) + term(p.b, g, p.rho_y)
    if not p.balanced:
        value -= p.eps * wanted(p.a, f, p.rho_x).sum()
    return value, f


def _newton(p: Problem, g: Array, tol: float, most: int) -> Array:
    """g that maximises the semidual; the best point seen, by its marginal error."""
    value, f = _semidual(p, g)
    best, best_error, since = g, math.inf, 0
    for _ in range(most):
        P = plan(p, f, g)
        c, w = P.sum(0), wanted(p.b, g, p.rho_y)
        d = w - c
        error = float(np.abs(d).sum() / w.sum()) if w.sum() > 0 else 0.0
        if error < 0.9 * best_error:
            best, best_error, since = g, error, 0
        since += 1
        if not error > tol or since > (4 if best_error < 1e-9 else 40):
            break
        residual = damping(p.rho_y, p.eps) * softmin(p.C.T, f, p.a, p.eps) - g
        step = _direction(p, P, c, residual, error)
        slope = float(d @ step)
        if not slope > 0:
            step, slope = residual, float(d @ residual)
        noise = 1e-14 * (np.abs(p.a * f).sum() + np.abs(p.b * g).sum() + abs(value))
        t = _length(p, g, step, value - noise, slope)
        if t == 0:
            break
        g = g + t * step
        value, f = _semidual(p, g)
    return best


def _length(p: Problem, g: Array, step: Array, value: float, slope: float) -> float:
    """Of a step that brings a part of the gain predicted; a longer one as long as that pays, since
    the semidual is nearly a plane until clusters exchange mass."""
    t, reached = 1.0, _semidual(p, g + step)[0]
    while not reached >= value + 1e-4 * t * slope:
        t *= 0.4
        if t < 1e-16:
            return 0.0
        reached = _semidual(p, g + t * step)[0]
    while t >= 1 and (further := _semidual(p, g + 3 * t * step)[0]) > reached + 0.5 * t * slope:
        t, reached = 3 * t, further
    return t


def _direction(p: Problem, P: Array, c: Array, residual: Array, error: float) -> Array:
    """Newton's step on the log residual of the semidual, damped where the error is large."""
    r = P.sum(1)
    scaled = P / np.sqrt(np.maximum(r, 1e-300) / damping(p.rho_x, p.eps))[:, None]
    size = np.maximum(c / damping(p.rho_y, p.eps), 1e-300)
    root = np.sqrt(size)
    scaled /= root
    H = -(scaled.T @ scaled)
    H[np.diag_indices_from(H)] += 1 + 0.1 * min(1.0, error) + 1e-14
    if p.balanced:
        u = np.sqrt(c / c.sum())
        H += np.outer(u, u)
    # rows of the log residual are c times itself, in units of the Hessian
    right = c * residual / damping(p.rho_y, p.eps) / root
    try:
        return scipy.linalg.solve(H, right, assume_a="pos", check_finite=False) / root
    except (scipy.linalg.LinAlgError, ValueError):
        return residual


def solve(p: Problem, stages: float = 0.25) -> Proof:
    """As far as float64 goes; see `Proof.width`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow and singular systems are what the proof shows
        return _solve(p, stages)


def _solve(p: Problem, stages: float) -> Proof:
    if p.C.shape[1] > p.C.shape[0]:
        found = _solve(p.transposed(), stages)
        return Proof(p, found.g, found.f, found.P.T, found.low, found.high, found.mass)
    total_a, total_b = p.a.sum(), p.b.sum()
    unit = Problem(p.C, p.a / total_a, p.b / total_b, p.eps, p.rho_x, p.rho_y)
    g = _annealed(unit, stages)
    if not p.balanced:  # what the totals do to the solution is a constant
        g = g + _shift(math.log(total_a), math.log(total_b), p.eps, p.rho_x, p.rho_y)
    return prove(p, *polished(p, g))


def _shift(log_a: float, log_b: float, eps: float, rho_x: float, rho_y: float) -> float:
    """g of totals (a, b) less g of totals 1, where a marginal is soft."""
    if math.isinf(rho_x):
        return rho_y * (log_b - log_a)
    if math.isinf(rho_y):
        return rho_x * (log_b - log_a) - eps * log_a
    return rho_y * (rho_x * log_b - (eps + rho_x) * log_a) / (eps + rho_x + rho_y)


def _annealed(p: Problem, stages: float) -> Array:
    spread = float(p.C.max() - p.C.min())
    eps = max(p.eps, spread)
    g = np.zeros_like(p.b)
    while True:
        last = eps <= p.eps
        at = Problem(p.C, p.a, p.b, p.eps if last else eps, p.rho_x, p.rho_y)
        with np.errstate(all="ignore"):
            g = _newton(at, g, 1e-14 if last else 1e-6, 300 if last else 60)
        if last:
            return g
        eps *= stages


def polished(p: Problem, g: Array) -> tuple[Array, Array]:
    """(f, g) half an iteration on: exact columns."""
    f = damping(p.rho_x, p.eps) * softmin(p.C, g, p.b, p.eps)
    return f, damping(p.rho_y, p.eps) * softmin(p.C.T, f, p.a, p.eps)


def prove(p: Problem, f: Array, g: Array) -> Proof:
    P, gap = feasible(p, f, g)
    low = dual(p, f, g)
    return Proof(p, f, g, P, low, low + gap, float(P.sum()))
