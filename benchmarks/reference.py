"""The converged solution in float64: errors in the benchmarks are errors against this.

Up to `MOST_DENSE` points it shares nothing with otloss: OT_eps(a, b) is solved by Newton's method
on the semidual in g (the potential of y), started by annealing eps; the self problems by symmetric
averaging. Dense, O(n^3) per Newton step.

Larger clouds have no such oracle in reasonable time. There otloss finds the potentials, in float64
and to a tight tolerance, and plain torch *checks* them: on a sample of rows and columns the
optimality conditions f = T_x(g) and g = T_y(f), which only the solution fulfils, are evaluated in
float64 from the points, and the gradient of the sampled rows is computed there. What was found is
kept in ``marginal_error``; errors of gradients are errors on these rows.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

MARGINAL_TOLERANCE = 1e-11
STAGE_TOLERANCE = 1e-3
MAX_NEWTON = 300

MOST_DENSE = 2048
STREAMED_TOLERANCE = 3e-6  # the gradient's error is then below 2e-5
SAMPLE = 4096  # rows and columns on which a streamed solution is checked
BLOCK = 256  # of them at a time
MAX_AVERAGING = 500
CACHE = Path(tempfile.gettempdir()) / "otloss-benchmarks"


class Solution(NamedTuple):
    value: float
    gradient: Tensor  # (n, d), dS/dx; only `rows` of it, if given
    marginal_error: float
    rows: Tensor | None = None  # (k,)

    def errors(self, value: Tensor, gradient: Tensor) -> dict[str, float]:
        """Relative errors of a value and (Frobenius norm) of a gradient."""
        gradient = gradient.detach().double().cpu()
        gradient = gradient if self.rows is None else gradient[self.rows]
        difference = (gradient - self.gradient).norm()
        return {
            "value_error": abs(value.item() - self.value) / abs(self.value),
            "gradient_error": (difference / self.gradient.norm()).item(),
        }


def cost_matrix(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """C (n, m) in plain torch, centred first so that |x|^2 + |y|^2 - 2<x,y> keeps its digits."""
    if cost == "cosine":
        return 1 - normalize(x, dim=-1) @ normalize(y, dim=-1).mT
    centre = y.detach().mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    squared = (x * x).sum(-1)[..., :, None] + (y * y).sum(-1)[..., None, :] - 2 * x @ y.mT
    if cost == "sqeuclidean":
        return squared.clamp_min(0)
    # Below the floor are coincident points: the square root's gradient there is 0, not NaN.
    floor = 1e-12 * squared.detach().amax()
    return torch.where(squared > floor, squared.clamp_min(floor).sqrt(), 0.0)


def _rows(C: Tensor, g: Tensor, log_b: Tensor, eps: float) -> Tensor:
    """T(g)_i = -eps log sum_j b_j exp((g_j - C_ij)/eps)."""
    return -eps * torch.logsumexp((g - C) / eps + log_b, dim=-1)


def _plan(C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float) -> Tensor:
    return ((f[:, None] + g - C) / eps).exp() * a[:, None] * b


class _State(NamedTuple):
    """A point of the semidual J(g) = <a, T(g)> + <b, g> with what a Newton step needs there."""

    g: Tensor
    value: float
    plan: Tensor
    deficit: Tensor  # b - c, with c the column marginal: the gradient of J
    error: float


def _state(C: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float) -> _State:
    f = _rows(C, g, b.log(), eps)
    P = _plan(C, f, g, a, b, eps)
    deficit = b - P.sum(0)
    return _State(g, (a @ f + b @ g).item(), P, deficit, deficit.abs().sum().item())


def _newton_step(state: _State, a: Tensor, damping: float, eps: float) -> Tensor:
    """Solve (H + damping diag(c)) dg = eps (b - c), H = diag(c) - P^T diag(1/a) P.

    H is the Laplacian of a graph on the points of y. Its diagonal is summed from the other
    entries: by subtraction the weak links between well-matched groups would be lost.
    """
    W = state.plan.T @ (state.plan / a[:, None])
    W.fill_diagonal_(0)
    degree = W.sum(1)
    H = torch.diag(degree + damping * state.plan.sum(0) + 1e-300) - W
    factor, failed = torch.linalg.cholesky_ex(H)
    if failed:
        return eps * state.deficit / state.plan.sum(0)
    step = torch.cholesky_solve(eps * state.deficit[:, None], factor)[:, 0]
    return step - step.mean()


def _newton(C: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float, tol: float) -> _State:
    """Levenberg-Marquardt steps on the semidual until the marginal error is at most tol."""
    state, damping = _state(C, g, a, b, eps), 1e-3
    for _ in range(MAX_NEWTON):
        if state.error <= tol:
            break
        step = _newton_step(state, a, damping, eps)
        trial = _state(C, state.g + step, a, b, eps)
        gain, predicted = trial.value - state.value, (state.deficit @ step).item()
        # Near the solution the gain drowns in rounding, where the error still tells.
        if gain >= 0.1 * predicted or trial.error < 0.5 * state.error:
            state, damping = trial, max(damping / 10, 1e-16)
        else:
            damping = min(damping * 4, 1e3)
    return state


def solve_pair(C: Tensor, a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, float]:
    """Potentials (f, g) of OT_eps(a, b) and the L1 error of the plan's column marginal."""
    g = torch.zeros_like(b)
    stage = max(eps, C.std().item())
    while stage > eps:
        for _ in range(10):
            g = _rows(C.T, _rows(C, g, b.log(), stage), a.log(), stage)
        g = _newton(C, g, a, b, stage, STAGE_TOLERANCE).g
        stage = max(eps, stage / 2)
    state = _newton(C, g, a, b, eps, MARGINAL_TOLERANCE)
    return _rows(C, state.g, b.log(), eps), state.g, state.error


def solve_self(C: Tensor, a: Tensor, eps: float) -> Tensor:
    """The one potential of OT_eps(a, a): f <- (f + T(f))/2 contracts by at least a half."""
    least = 1e-13 * max(1.0, C.abs().max().item())
    return _average(lambda f: _rows(C, f, a.log(), eps), torch.zeros_like(a), least)


def _average(T: Callable[[Tensor], Tensor], f: Tensor, least: float) -> Tensor:
    """The fixed point of T by averaging, until T changes no entry by more than ``least``."""
    for _ in range(MAX_AVERAGING):
        new = T(f)
        change = (new - f).abs().max().item()
        f = (f + new) / 2
        if change < least:
            break
    return f


def divergence(x: Tensor, y: Tensor, a: Tensor, b: Tensor, cost: str, eps: float) -> Solution:
    """S and dS/dx at convergence, in float64, with weights normalised in float64.

    Kept on disk under the hash of the problem: the large ones take minutes.
    """
    x, y, a, b = (t.detach().cpu().double() for t in (x, y, a, b))
    tensors = (x, y, a / a.sum(), b / b.sum())
    digest = hashlib.sha1(f"{cost} {eps!r} {STREAMED_TOLERANCE}".encode())
    for t in tensors:
        digest.update(t.numpy().tobytes())
    path = CACHE / f"{digest.hexdigest()}.pt"
    if path.exists():
        return Solution(*torch.load(path))
    method = _dense_divergence if max(len(x), len(y)) <= MOST_DENSE else _streamed_divergence
    solution = method(*tensors, cost, eps)
    CACHE.mkdir(exist_ok=True)
    torch.save(tuple(solution), path)
    return solution


def _dense_divergence(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, cost: str, eps: float
) -> Solution:
    x.requires_grad_()
    C_xy, C_xx, C_yy = (cost_matrix(*pair, cost) for pair in ((x, y), (x, x), (y, y)))
    with torch.no_grad():
        f, g, error = solve_pair(C_xy, a, b, eps)
        f_x, g_y = solve_self(C_xx, a, eps), solve_self(C_yy, b, eps)
        value = a @ (f - f_x) + b @ (g - g_y)
        P_xy, P_xx = _plan(C_xy, f, g, a, b, eps), _plan(C_xx, f_x, f_x, a, a, eps)
    # Envelope theorem: at the optimum, d OT_eps = <P, dC>.
    gradient = torch.autograd.grad((P_xy * C_xy).sum() - (P_xx * C_xx).sum() / 2, x)[0]
    return Solution(value.item(), gradient, error)


def transform(
    x: Tensor, y: Tensor, g: Tensor, b: Tensor, cost: str, eps: float
) -> tuple[Tensor, Tensor]:
    """T_x(g) on the points x, and the gradient in x of <P 1, C> for rows of mass 1, by blocks."""
    potentials, gradients = [], []
    for part in x.split(BLOCK):
        part = part.detach().requires_grad_()
        C = cost_matrix(part, y, cost)
        scores = (g - C.detach()) / eps + b.log()
        potentials.append(-eps * torch.logsumexp(scores, -1))
        gradients.append(torch.autograd.grad((scores.softmax(-1) * C).sum(), part)[0])
    return torch.cat(potentials), torch.cat(gradients)


def _streamed_divergence(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, cost: str, eps: float
) -> Solution:
    import otloss

    options: dict[str, Any] = {"cost": cost, "method": "streamed"}

    def self_potential(z: Tensor, w: Tensor) -> Tensor:
        def transform(f: Tensor) -> Tensor:
            once = otloss.solve_sample(z, z, eps, a=w, b=w, init=(f, f), n_iters=1, **options)
            return once.potentials[0]

        return _average(transform, torch.zeros_like(w), STREAMED_TOLERANCE * eps)

    tight: dict[str, Any] = {"tol": STREAMED_TOLERANCE, "max_iters": 100_000}
    with torch.no_grad():
        f, g = otloss.solve_sample(x, y, eps, a=a, b=b, **tight, **options).potentials
        f_x, g_y = self_potential(x, a), self_potential(y, b)
    value = (a @ (f - f_x) + b @ (g - g_y)).item()

    rng = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(x), generator=rng)[:SAMPLE]
    columns = torch.randperm(len(y), generator=rng)[:SAMPLE]
    exact_f, cross = transform(x[rows], y, g, b, cost, eps)
    exact_g, _ = transform(y[columns], x, f, a, cost, eps)
    exact_f_x, own = transform(x[rows], x, f_x, a, cost, eps)
    changes = (exact_f - f[rows], exact_g - g[columns], exact_f_x - f_x[rows])
    error = max(torch.expm1(change / eps).abs().mean().item() for change in changes)
    return Solution(value, a[rows, None] * (cross - own), error, rows)
