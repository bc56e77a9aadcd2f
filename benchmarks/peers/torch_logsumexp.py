"""The loop that most people write: two ``torch.logsumexp`` per iteration, on a stored cost."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.peers import IterationVariant, ValueAndGradient, Variant
from benchmarks.reference import cost_matrix
from benchmarks.workloads import Problem

TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
MAX_ITERS = 5000
CHECK_EVERY = 10


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


def _softmin(K: Tensor, v: Tensor, dim: int) -> Tensor:
    return -torch.logsumexp(K + (v[:, None] if dim == 0 else v), dim=dim)


def _solve_pair(
    K: Tensor, log_a: Tensor, log_b: Tensor, tol: float, max_iters: int
) -> tuple[Tensor, Tensor]:
    """Gauss-Seidel on K = -C/eps until the L1 marginal error, tested now and then, is <= tol."""
    u, v = torch.zeros_like(log_a), torch.zeros_like(log_b)
    for k in range(1, max_iters + 1):
        u = _softmin(K, v + log_b, 1)
        new = _softmin(K, u + log_a, 0)
        # The column marginal of the plan of (u, v) is b exp(v - new): no extra reduction.
        test = tol > 0 and k % CHECK_EVERY == 0
        done = test and (log_b.exp() * (1 - (v - new).exp())).abs().sum() <= tol
        v = new
        if done:
            break
    return u, v


def _solve_self(K: Tensor, log_a: Tensor, tol: float, max_iters: int) -> Tensor:
    """Symmetric averaging: one potential, and few iterations whatever eps is."""
    u = torch.zeros_like(log_a)
    for _ in range(max_iters):
        new = _softmin(K, u + log_a, 1)
        done = tol > 0 and (log_a.exp() * (1 - (u - new).exp())).abs().sum() <= tol
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
        u, v = _solve_pair(-C_xy / eps, a.log(), b.log(), tol, max_iters)
        u_x = _solve_self(-C_xx / eps, a.log(), tol, max_iters)
        u_y = _solve_self(-C_yy / eps, b.log(), tol, max_iters)
    value = _term(C_xy, u, v, a, b, eps)
    value = value - _term(C_xx, u_x, u_x, a, a, eps) / 2 - _term(C_yy, u_y, u_y, b, b, eps) / 2
    return value.detach(), torch.autograd.grad(value, x)[0]


def overhead(problem: Problem, n_iters: int) -> list[Variant]:
    return [Variant("torch.logsumexp", partial(_divergence, problem, 0.0, n_iters))]


def divergence(problem: Problem) -> list[Variant]:
    return [
        Variant(f"tol={tol:g}", partial(_divergence, problem, tol, MAX_ITERS)) for tol in TOLERANCES
    ]
