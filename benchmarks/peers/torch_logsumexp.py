"""The loop that most people write: two ``torch.logsumexp`` per iteration, on a stored cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.peers import TOLERANCES, IterationVariant, ValueAndGradient, Variant, storable
from benchmarks.reference import cost_matrix
from benchmarks.workloads import Problem

MAX_ITERS = 20_000
Softmin = Callable[[Tensor], Tensor]


def available() -> tuple[bool, str]:
    return True, ""


def version() -> str:
    return torch.__version__


def iteration(C: Tensor, eps: float) -> list[IterationVariant]:
    n, m = C.shape
    log_a = C.new_full((n,), 1 / n).log()
    log_b = C.new_full((m,), 1 / m).log()
    scaled = -C / eps
    transposed = scaled.T.contiguous()

    def run(k: int, columns: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        # u = f/eps and v = g/eps: the cost is divided once, not in every iteration.
        u, v = torch.zeros_like(log_a), torch.zeros_like(log_b)
        with torch.no_grad():
            for _ in range(k):
                u = -torch.logsumexp(scaled + (v + log_b), dim=1)
                w = u + log_a
                v = -torch.logsumexp(columns + (w[:, None] if dim == 0 else w), dim=dim)
        return u, v

    def potentials(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return eps * result[0], eps * result[1]

    # A transposed copy makes the column reduction contiguous; the faster of the two counts.
    return [
        IterationVariant(
            f"torch.logsumexp{label}",
            partial(run, columns=columns, dim=dim),
            potentials,
            family="torch.logsumexp",
        )
        for label, columns, dim in (("", scaled, 0), (", transposed copy", transposed, 1))
    ]


def _softmin(K: Tensor, log_w: Tensor, dim: int) -> Softmin:
    """v -> -log sum_j w_j exp(v_j + K_ij)."""

    def apply(v: Tensor) -> Tensor:
        w = v + log_w
        return -torch.logsumexp(K + (w[:, None] if dim == 0 else w), dim=dim)

    return apply


def _excess(b: Tensor, v: Tensor, new: Tensor) -> float:
    """L1 error of the column marginal b exp(v - new) of the plan of (u, v), new = T_y(u)."""
    return (b * torch.expm1(v - new)).abs().sum().item()


def solve_pair(
    rows: Softmin, columns: Softmin, b: Tensor, tol: float, max_iters: int = MAX_ITERS
) -> tuple[Tensor, Tensor, int]:
    """Gauss-Seidel until the L1 marginal error, which costs no reduction, is <= tol."""
    v, k, done = torch.zeros_like(b), 0, False
    while not done and k < max_iters:
        u = rows(v)
        new = columns(u)
        done = tol > 0 and _excess(b, v, new) <= tol
        v, k = new, k + 1
    return u, v, k


def solve_self(T: Softmin, a: Tensor, tol: float, max_iters: int = MAX_ITERS) -> Tensor:
    """Symmetric averaging: one potential, and few iterations whatever eps is."""
    u = torch.zeros_like(a)
    for _ in range(max_iters):
        new = T(u)
        done = tol > 0 and _excess(a, u, new) <= tol
        u = (u + new) / 2
        if done:
            break
    return u


def _term(C: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor, eps: float) -> Tensor:
    """OT_eps with its envelope gradient: the dual value, plus <P, C> with zero value."""
    with torch.no_grad():
        plan = (u[:, None] + v - C / eps).exp() * a[:, None] * b
        value = eps * (a @ u + b @ v)
    linear = (plan * C).sum()
    return linear + (value - linear).detach()


def _divergence(problem: Problem, tol: float, max_iters: int) -> ValueAndGradient:
    x = problem.x.detach().requires_grad_()
    y, a, b, eps = problem.y, problem.a, problem.b, problem.eps
    C_xy = cost_matrix(x, y, problem.cost)
    C_xx = cost_matrix(x, x, problem.cost)
    C_yy = cost_matrix(y, y, problem.cost)
    with torch.no_grad():
        K, stop = -C_xy / eps, (tol, max_iters)
        u, v, _ = solve_pair(_softmin(K, b.log(), 1), _softmin(K, a.log(), 0), b, *stop)
        u_x = solve_self(_softmin(-C_xx / eps, a.log(), 1), a, *stop)
        u_y = solve_self(_softmin(-C_yy / eps, b.log(), 1), b, *stop)
    value = _term(C_xy, u, v, a, b, eps)
    value = value - _term(C_xx, u_x, u_x, a, a, eps) / 2 - _term(C_yy, u_y, u_y, b, b, eps) / 2
    return value.detach(), torch.autograd.grad(value, x)[0]


def overhead(problem: Problem, n_iters: int) -> list[Variant]:
    return [Variant("torch.logsumexp", partial(_divergence, problem, 0.0, n_iters))]


def _passes(problem: Problem, tol: float) -> int:
    K = -cost_matrix(problem.x, problem.y, problem.cost) / problem.eps
    a, b = problem.a, problem.b
    return 2 * solve_pair(_softmin(K, b.log(), 1), _softmin(K, a.log(), 0), b, tol)[2]


def divergence(problem: Problem) -> list[Variant]:
    def at(tol: float) -> Variant:
        call = partial(_divergence, problem, tol, MAX_ITERS)
        return Variant(f"tol={tol:.2g}", call, passes=lambda: _passes(problem, tol))

    return [at(tol) for tol in TOLERANCES] if storable(problem) else []
