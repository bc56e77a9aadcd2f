"""An independent brute force in float64, written from the formulas. Nothing here is from otloss.

One problem at a time: x (n, d), y (m, d), C (n, m), a (n,), b (m,), all float64. Points of weight 0
are removed before solving, so padding is compared with its definition.

Sinkhorn's iteration in the log domain comes close to the solution and Newton's method on the
semidual finishes, to a marginal error of about 1e-14. The gradients are the envelope theorem's for
the regularised objective, and the implicit function theorem's for everything else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# --------------------------------------------------------------------------------------- costs


def cost(x: Tensor, y: Tensor, name: str) -> Tensor:
    """C (n, m), differentiable; the gradient of a norm is 0 at 0."""
    if name == "cosine":
        return 1 - _direction(x) @ _direction(y).T
    squared = (x[:, None] - y[None]).square().sum(-1)
    return squared if name == "sqeuclidean" else _root(squared)


def _root(squared: Tensor) -> Tensor:
    return torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)


def _direction(x: Tensor) -> Tensor:
    squared = x.square().sum(-1, keepdim=True)
    return torch.where(squared > 0, x / torch.where(squared > 0, squared, 1.0).sqrt(), 0.0)


# --------------------------------------------------------------------------------------- solve


@dataclass
class Solution:
    f: Tensor  # (n,) with <a, f> = <b, g>; 0 where the weight is 0
    g: Tensor  # (m,)
    P: Tensor  # (n, m)
    value: Tensor  # OT_eps, from the primal formula
    transport: Tensor  # <P, C>
    error: float  # L1 marginal error over the total mass
    gap: float  # 1 - (contraction of one iteration): potentials are as good as error / gap


def softmin(C: Tensor, g: Tensor, b: Tensor, eps: float) -> Tensor:
    """T(g)_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)."""
    return -eps * torch.logsumexp(b.log() + (g - C) / eps, dim=1)


def plan(C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float) -> Tensor:
    return a[:, None] * b * ((f[:, None] + g - C) / eps).exp()


def solve(C: Tensor, a: Tensor, b: Tensor, eps: float) -> Solution:
    """The optimum, to float64 rounding."""
    C, a, b = C.detach(), a.detach(), b.detach()
    b = b * (a.sum() / b.sum())  # weights that were rounded to float32 differ by that in total
    rows, columns = a > 0, b > 0
    small = C[rows][:, columns]
    a_, b_ = a[rows], b[columns]
    start = _annealed_start(small, a_, b_, eps)
    if C.shape[0] == C.shape[1] and torch.equal(C, C.T) and torch.equal(a, b):
        f_ = g_ = _symmetric_newton(small, a_, start, eps)
    else:
        f_, g_ = _newton(small, a_, b_, start, eps)
    shift = ((b_ * g_).sum() - (a_ * f_).sum()) / (a_.sum() + b_.sum())
    f, g, P = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(C)
    f[rows], g[columns] = f_ + shift, g_ - shift
    P_ = plan(small, f_, g_, a_, b_, eps)
    assert _error(P_, a_, b_) < 1e-11, "the oracle did not converge"
    P[rows[:, None] & columns] = P_.flatten()
    transport = (P_ * small).sum()
    # KL(P | a b) = sum P log(P / ab) - sum P + mass; the last two cancel for balanced plans.
    entropy = (P_ * (f_[:, None] + g_ - small)).sum()
    singular = torch.linalg.svdvals(P_ / a_.sqrt()[:, None] / b_.sqrt())
    gap = max(1e-15, 1 - float(singular[1]) ** 2) if singular.numel() > 1 else 1.0
    return Solution(f, g, P, transport + entropy, transport, _error(P_, a_, b_), gap)


def _error(P: Tensor, a: Tensor, b: Tensor) -> float:
    rows, columns = (P.sum(1) - a).abs().sum(), (P.sum(0) - b).abs().sum()
    return float(torch.maximum(rows, columns) / a.sum())


def _annealed_start(C: Tensor, a: Tensor, b: Tensor, eps: float) -> Tensor:
    """g after some iterations at each of a falling sequence of eps."""
    g, at = torch.zeros_like(b), max(eps, float(C.max() - C.min()))
    while True:
        for _ in range(5):
            g = softmin(C.T, softmin(C, g, b, at), a, at)
        if at == eps:
            return g
        at = max(eps, 0.6 * at)


def _newton(C: Tensor, a: Tensor, b: Tensor, g: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Maximises <a, T(g)> + <b, g>, its Hessian scaled by 1/sqrt(b) on both sides."""

    def semidual(g: Tensor) -> Tensor:
        return (a * softmin(C, g, b, eps)).sum() + (b * g).sum()

    root = b.sqrt()
    for _ in range(500):
        f = softmin(C, g, b, eps)
        P = plan(C, f, g, a, b, eps)
        residual = b - P.sum(0)
        error = float(residual.abs().sum() / b.sum())
        if error < 1e-13:
            break
        scaled = P / a.sqrt()[:, None] / root
        H = torch.diag(P.sum(0) / b) - scaled.T @ scaled + torch.outer(root, root) / b.sum()
        # The damping makes the first steps safe and vanishes at the solution.
        H += 0.1 * min(1.0, error) * torch.eye(b.numel(), dtype=b.dtype)
        step = eps * torch.linalg.solve(H, residual / root) / root
        step -= (b * step).sum() / b.sum()
        t = 1 / max(1.0, float(step.abs().max()) / (5 * eps))
        slope = float((residual * step).sum())
        noise = 1e-13 * float((b * g.abs()).sum() + (a * f.abs()).sum())
        if semidual(g + t * step) >= semidual(g) + 1e-4 * t * slope - noise:
            g = g + t * step
        else:
            for _ in range(20):
                g = softmin(C.T, softmin(C, g, b, eps), a, eps)
    f = softmin(C, g, b, eps)
    return f, softmin(C.T, f, a, eps)


def _symmetric_newton(C: Tensor, a: Tensor, g: Tensor, eps: float) -> Tensor:
    """f with P(f, f) 1 = a: well conditioned however small eps is, where (f, g) is not."""
    f = (g + softmin(C, g, a, eps)) / 2
    root = a.sqrt()
    for _ in range(30):
        f = (f + softmin(C, f, a, eps)) / 2
    for _ in range(30):
        P = plan(C, f, f, a, a, eps)
        residual = a - P.sum(1)
        if float(residual.abs().sum() / a.sum()) < 1e-14:
            break
        H = torch.diag(P.sum(1) / a) + P / root[:, None] / root
        f = f + eps * torch.linalg.solve(H, residual / root) / root
    return f


def iterate(C: Tensor, a: Tensor, b: Tensor, eps: float, count: int) -> list[tuple[Tensor, Tensor]]:
    """(f, g) after each of `count` full iterations from zero potentials; differentiable."""
    g, steps = torch.zeros_like(b), []
    for _ in range(count):
        f = torch.where(a > 0, softmin(C, g, b, eps), 0.0)
        g = torch.where(b > 0, softmin(C.T, f, a, eps), 0.0)
        steps.append((f, g))
    return steps


def differentiable_potentials(C: Tensor, a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The optimal potentials with their exact first derivatives in C, a and b.

    z = z* - J^+ F(z*, C, a, b) with F the marginal residuals: a Newton step of length 0. Weights
    must be positive; the derivative holds along changes that keep <a, 1> = <b, 1>.
    """
    solution = solve(C, a, b, eps)
    f, g, P = solution.f, solution.g, solution.P
    scale = torch.cat([a, b]).detach().rsqrt()
    n = a.numel()
    J = torch.zeros(scale.numel(), scale.numel(), dtype=C.dtype)
    J[:n, :n], J[n:, n:] = torch.diag(P.sum(1)), torch.diag(P.sum(0))
    J[:n, n:], J[n:, :n] = P, P.T
    inverse = torch.linalg.pinv(scale[:, None] * J * scale, hermitian=True, rtol=1e-13)
    Q = plan(C, f, g, a, b, eps)
    F = torch.cat([Q.sum(1) - a, Q.sum(0) - b])
    z = torch.cat([f, g]) - eps * scale * (inverse @ (scale * F))
    return z[:n], z[n:]


# --------------------------------------------------------------------------------------- losses


@dataclass
class Loss:
    """A value and a scalar whose autograd gradient is the loss's."""

    value: Tensor
    surrogate: Tensor

    def grads(self, *inputs: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(self.surrogate, inputs, allow_unused=True, retain_graph=True)
        pairs = zip(grads, inputs, strict=True)
        return [torch.zeros_like(t) if grad is None else grad for grad, t in pairs]


def term(C: Tensor, a: Tensor, b: Tensor, eps: float, objective: str, backward: str) -> Loss:
    """One OT problem: `C`, `a`, `b` may require gradients."""
    if backward == "implicit":
        f, g = differentiable_potentials(C, a, b, eps)
        P = plan(C, f, g, a, b, eps)
        value = (P * C).sum() if objective == "transport" else (a * f).sum() + (b * g).sum()
        return Loss(value.detach(), value)
    s = solve(C, a, b, eps)
    # C may be infinite at points of weight 0
    linear = (s.P * torch.where(s.P > 0, C, 0.0)).sum()
    if objective == "transport":
        return Loss(s.transport, linear)
    return Loss(s.value, linear + (a * s.f).sum() + (b * s.g).sum())


def unrolled_term(C: Tensor, a: Tensor, b: Tensor, eps: float, objective: str, count: int) -> Loss:
    """One OT problem after exactly `count` iterations, differentiated through all of them."""
    f, g = iterate(C, a, b, eps, count)[-1]
    value = (a * f).sum() + (b * g).sum()
    if objective == "transport":
        value = (plan(C, f, g, a, b, eps) * C).sum()
    return Loss(value.detach(), value)


def combine(terms: list[tuple[float, Loss]]) -> Loss:
    value = sum(c * t.value for c, t in terms)
    return Loss(value, sum(c * t.surrogate for c, t in terms))  # type: ignore[arg-type]


def loss(
    x: Tensor,
    y: Tensor,
    eps: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost_name: str = "sqeuclidean",
    objective: str = "regularized",
    debiased: bool = True,
    backward: str = "envelope",
    n_iters: int | None = None,
) -> Loss:
    """The Sinkhorn divergence, or with ``debiased=False`` the plain OT loss."""
    a, b = _uniform(x) if a is None else a, _uniform(y) if b is None else b

    def one(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Loss:
        C = cost(u, v, cost_name)
        if n_iters is not None:
            return unrolled_term(C, p, q, eps, objective, n_iters)
        return term(C, p, q, eps, objective, backward)

    if not debiased:
        return one(x, y, a, b)
    return combine([(1.0, one(x, y, a, b)), (-0.5, one(x, x, a, a)), (-0.5, one(y, y, b, b))])


def _uniform(x: Tensor) -> Tensor:
    return torch.full_like(x[:, 0], 1 / x.shape[0]).detach()


# ----------------------------------------------------------------------------------- closed forms


def gaussian_ot(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor, eps: float) -> Tensor:
    """OT_eps between Gaussians for |x - y|^2, with KL against the product (Janati et al. 2020)."""
    d, s2 = cov_x.shape[0], eps / 2
    root = _sqrtm(cov_x)
    identity = torch.eye(d, dtype=cov_x.dtype)
    D = _sqrtm(4 * root @ cov_y @ root + s2**2 * identity)
    trace = cov_x.trace() + cov_y.trace() - D.trace()
    log_det = torch.linalg.slogdet(D + s2 * identity).logabsdet
    constant = d * s2 * (1 - torch.log(torch.tensor(2 * s2, dtype=cov_x.dtype)))
    return (mean_x - mean_y).square().sum() + trace + constant + s2 * log_det


def _sqrtm(A: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
