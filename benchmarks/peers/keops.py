"""A plain Sinkhorn loop on KeOps reductions: what one writes when the cost does not fit in memory.

The loops are those of ``torch_logsumexp``; the reductions are compiled at first use and recompute
the cost from the points. For the squared cost.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import TOLERANCES, ValueAndGradient, Variant, importable
from benchmarks.peers.torch_logsumexp import Softmin, solve_pair, solve_self
from benchmarks.workloads import Problem

MOST_DIMENSIONS = 64  # KeOps sums them one by one: beyond this other peers are far ahead


def available() -> tuple[bool, str]:
    return importable("pykeops")


def version() -> str:
    import pykeops

    return pykeops.__version__


@cache
def _reductions(d: int) -> tuple[Any, Any]:
    """log sum_j exp(V_j - C_ij / eps), and sum_j exp(U_i + V_j - C_ij / eps) (x_i - y_j)."""
    from pykeops.torch import generic_logsumexp, generic_sum

    points, rest = (f"X = Vi({d})", f"Y = Vj({d})"), ("V = Vj(1)", "E = Pm(1)")
    lse = generic_logsumexp("V - E * SqDist(X, Y)", "R = Vi(1)", *points, *rest)
    push = "Exp(U + V - E * SqDist(X, Y)) * (X - Y)"
    return lse, generic_sum(push, f"R = Vi({d})", *points, "U = Vi(1)", *rest)


def _softmin(x: Tensor, y: Tensor, log_w: Tensor, eps: float) -> Softmin:
    lse, _ = _reductions(x.shape[1])
    scale = x.new_tensor([1 / eps])

    def apply(v: Tensor) -> Tensor:
        return -lse(x, y, (v + log_w)[:, None], scale)[:, 0]

    return apply


def _solve_pair(problem: Problem, tol: float) -> tuple[Tensor, Tensor, int]:
    x, y, a, b, eps = problem.x, problem.y, problem.a, problem.b, problem.eps
    return solve_pair(_softmin(x, y, b.log(), eps), _softmin(y, x, a.log(), eps), b, tol)


@torch.no_grad()
def _divergence(problem: Problem, tol: float) -> ValueAndGradient:
    x, y, a, b, eps = problem.x, problem.y, problem.a, problem.b, problem.eps
    u, v, _ = _solve_pair(problem, tol)
    u_x, v_y = (solve_self(_softmin(z, z, w.log(), eps), w, tol) for z, w in ((x, a), (y, b)))
    _, push = _reductions(x.shape[1])

    def gradient(z: Tensor, s: Tensor, t: Tensor, w: Tensor) -> Tensor:
        s, t = s + a.log(), t + w.log()
        return 2 * push(x, z, s[:, None], t[:, None], x.new_tensor([1 / eps]))

    value = eps * (a @ (u - u_x) + b @ (v - v_y))
    return value, gradient(y, u, v, b) - gradient(x, u_x, u_x, a)


def divergence(problem: Problem) -> list[Variant]:
    if problem.cost != "sqeuclidean" or problem.x.shape[1] > MOST_DIMENSIONS:
        return []

    def at(tol: float) -> Variant:
        call = partial(_divergence, problem, tol)
        return Variant(f"tol={tol:.2g}", call, passes=lambda: 2 * _solve_pair(problem, tol)[2])

    return [at(tol) for tol in TOLERANCES]
