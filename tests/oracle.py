"""An independent brute force in float64, written from the formulas. Nothing here is from otloss.

One problem at a time: x (n, d), y (m, d), C (n, m), a (n,), b (m,), all float64. Points of weight 0
are removed before solving, so padding is compared with its definition.

Sinkhorn's iteration in the log domain comes close to the solution and Newton's method on the
semidual (where a marginal is soft: on the dual) finishes, to a marginal error of about 1e-14. The
gradients are the envelope theorem's for the regularised objective, and the implicit function
theorem's for everything else.
"""

from __future__ import annotations

import math
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
        here = semidual(g)
        shrunk = (t * 0.5**k for k in range(12))
        taken = (t for t in shrunk if semidual(g + t * step) >= here + 1e-4 * t * slope - noise)
        t = next(taken, 0.0)
        g = g + t * step
        for _ in range(0 if t else 20):
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


# ------------------------------------------------------------------------------------ unbalanced

HARD = (math.inf, math.inf)  # (rho_x, rho_y)


def target_marginal(w: Tensor, v: Tensor, rho: float) -> Tensor:
    """The marginal that the optimality conditions ask of the plan."""
    return w * (-v / rho).exp()


def dual(
    C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float, rho: tuple[float, float]
) -> Tensor:
    """With the mass term: at the maximum the value with the generalised KL."""
    terms = [
        (w * v).sum() if math.isinf(r) else r * (w * (1 - (-v / r).exp())).sum()
        for w, v, r in ((a, f, rho[0]), (b, g, rho[1]))
    ]
    return terms[0] + terms[1] - eps * (plan(C, f, g, a, b, eps).sum() - a.sum() * b.sum())


def primal(
    C: Tensor, P: Tensor, a: Tensor, b: Tensor, eps: float, rho: tuple[float, float]
) -> Tensor:
    """<P, C> + eps KL(P | a b) + rho_x KL(P 1 | a) + rho_y KL(P^T 1 | b) of any plan."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (torch.special.xlogy(p, p / q) - p + q).sum()

    total = (P * C).sum() + eps * kl(P, a[:, None] * b)
    for marginal, w, r in ((P.sum(1), a, rho[0]), (P.sum(0), b, rho[1])):
        total = total + (0.0 if math.isinf(r) else r * kl(marginal, w))
    return total


def soft_solve(C: Tensor, a: Tensor, b: Tensor, eps: float, rho: tuple[float, float]) -> Solution:
    """The optimum where at least one marginal is soft: Newton's method on the dual."""
    C, a, b = C.detach(), a.detach(), b.detach()
    rows, columns = a > 0, b > 0
    small, a_, b_ = C[rows][:, columns], a[rows], b[columns]
    n = a_.numel()
    z = torch.cat(iterate(small, a_, b_, eps, 20, rho)[-1])
    w = torch.cat([a_, b_])
    error = math.inf
    for _ in range(500):
        f, g = z[:n], z[n:]
        P = plan(small, f, g, a_, b_, eps)
        wanted = torch.cat([target_marginal(a_, f, rho[0]), target_marginal(b_, g, rho[1])])
        residual = wanted - torch.cat([P.sum(1), P.sum(0)])
        error = float(residual.abs().sum() / P.sum())
        if error < 1e-13:
            break
        H = torch.diag(torch.cat([P.sum(1), P.sum(0)]) / eps)
        H[:n, n:], H[n:, :n] = P / eps, P.T / eps
        H += torch.diag(
            wanted / torch.cat([torch.full_like(f, rho[0]), torch.full_like(g, rho[1])])
        )
        root = H.diagonal().sqrt()
        scaled = H / root[:, None] / root + min(1e-3, error) * torch.eye(len(w), dtype=C.dtype)
        step = torch.linalg.solve(scaled, residual / root) / root
        t, start = 1.0, dual(small, f, g, a_, b_, eps, rho)
        noise = 1e-14 * float(abs(start)) + 1e-14 * float(w.sum()) * float(z.abs().max())
        while t > 1e-9:
            trial = z + t * step
            if dual(small, trial[:n], trial[n:], a_, b_, eps, rho) >= start - noise:
                break
            t /= 2
        z = z + t * step
    assert error < 1e-9, f"the oracle did not converge: {error}"
    f, g, P = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(C)
    f[rows], g[columns] = z[:n], z[n:]
    P_ = plan(small, z[:n], z[n:], a_, b_, eps)
    P[rows[:, None] & columns] = P_.flatten()
    value = primal(small, P_, a_, b_, eps, rho)
    return Solution(f, g, P, value, (P_ * small).sum(), error, 1.0)


def solution(C: Tensor, a: Tensor, b: Tensor, eps: float, rho: tuple[float, float]) -> Solution:
    if rho != HARD:
        return soft_solve(C, a, b, eps, rho)
    return solve(C, a, b, eps)


# ----------------------------------------------------------------------------------- derivatives


def iterate(
    C: Tensor, a: Tensor, b: Tensor, eps: float, count: int, rho: tuple[float, float] = HARD
) -> list[tuple[Tensor, Tensor]]:
    """(f, g) after each of `count` full iterations from zero potentials; differentiable."""
    g, steps = torch.zeros_like(b), []
    on_f, on_g = (1 / (1 + eps / r) for r in rho)
    for _ in range(count):
        f = torch.where(a > 0, on_f * softmin(C, g, b, eps), 0.0)
        g = torch.where(b > 0, on_g * softmin(C.T, f, a, eps), 0.0)
        steps.append((f, g))
    return steps


def differentiable_potentials(
    C: Tensor, a: Tensor, b: Tensor, eps: float, rho: tuple[float, float] = HARD
) -> tuple[Tensor, Tensor]:
    """The optimal potentials with their exact first derivatives in C, a and b.

    z = z* - J^+ F(z*, C, a, b) with F the marginal residuals: a Newton step of length 0. Weights
    must be positive; where both marginals are constraints the derivative holds along changes that
    keep <a, 1> = <b, 1>.
    """
    found = solution(C, a, b, eps, rho)
    f, g, P = found.f, found.g, found.P
    wanted = torch.cat([target_marginal(a, f, rho[0]), target_marginal(b, g, rho[1])])
    scale = wanted.detach().rsqrt()
    n = a.numel()
    J = torch.zeros(scale.numel(), scale.numel(), dtype=C.dtype)
    J[:n, :n], J[n:, n:] = torch.diag(P.sum(1)), torch.diag(P.sum(0))
    J[:n, n:], J[n:, :n] = P, P.T
    inverse_rho = torch.cat([torch.full_like(f, 1 / rho[0]), torch.full_like(g, 1 / rho[1])])
    J += torch.diag(eps * inverse_rho * wanted.detach())
    inverse = torch.linalg.pinv(scale[:, None] * J * scale, hermitian=True, rtol=1e-13)
    Q = plan(C, f, g, a, b, eps)
    F = torch.cat([Q.sum(1), Q.sum(0)]) - wanted
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


def soft_term(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    objective: str,
    backward: str,
    rho: tuple[float, float],
) -> Loss:
    """One problem of a call with a soft marginal, even if this one has none."""
    s = solution(C, a, b, eps, rho)
    # C may be infinite at points of weight 0
    linear = (s.P * torch.where(s.P > 0, C, 0.0)).sum()
    if objective == "transport":
        if backward == "implicit":
            f, g = differentiable_potentials(C, a, b, eps, rho)
            linear = (plan(C, f, g, a, b, eps) * C).sum()
        return Loss(s.transport, linear)
    rows, columns = a > 0, b > 0
    small = C[rows][:, columns]
    value = dual(small, s.f[rows], s.g[columns], a[rows], b[columns], eps, rho)
    if rho != HARD:
        torch.testing.assert_close(s.value, value.detach(), rtol=1e-8, atol=1e-8)
    return Loss(value.detach(), value)


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
    # OT(t a, t b) = t OT(a, b) - eps m t log t: half of that constant goes to either side.
    potentials = (a * (s.f - eps / 2)).sum() + (b * (s.g - eps / 2)).sum()
    return Loss(s.value, linear + potentials)


def unrolled_term(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    objective: str,
    count: int,
    rho: tuple[float, float] | None = None,
) -> Loss:
    """One OT problem after exactly `count` iterations, differentiated through all of them."""
    f, g = iterate(C, a, b, eps, count, rho or HARD)[-1]
    value = (a * f).sum() + (b * g).sum() if rho is None else dual(C, f, g, a, b, eps, rho)
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
    rho: tuple[float, float] | None = None,
) -> Loss:
    """The Sinkhorn divergence, or with ``debiased=False`` the plain OT loss."""
    a, b = _uniform(x) if a is None else a, _uniform(y) if b is None else b
    rho_x, rho_y = rho or HARD

    def one(u: Tensor, v: Tensor, p: Tensor, q: Tensor, *strength: float) -> Loss:
        C, pair = cost(u, v, cost_name), None if rho is None else strength
        if n_iters is not None:
            return unrolled_term(C, p, q, eps, objective, n_iters, pair)
        if pair is None:
            return term(C, p, q, eps, objective, backward)
        return soft_term(C, p, q, eps, objective, backward, pair)

    between = one(x, y, a, b, rho_x, rho_y)
    if not debiased:
        return between
    terms = [(1.0, between)]
    terms += [(-0.5, one(x, x, a, a, rho_x, rho_x)), (-0.5, one(y, y, b, b, rho_y, rho_y))]
    if rho is not None and objective == "regularized":
        mass = eps / 2 * (a.sum() - b.sum()) ** 2
        terms.append((1.0, Loss(mass.detach(), mass)))
    return combine(terms)


def _uniform(x: Tensor) -> Tensor:
    return torch.full_like(x[:, 0], 1 / x.shape[0]).detach()


# --------------------------------------------------------------------------------------- partial


def enlarged(C: Tensor, a: Tensor, b: Tensor, mass: float | Tensor) -> tuple[Tensor, ...]:
    """C (n + 1, m + 1) and weights of the balanced problem whose plan moves ``mass`` between the
    given points; differentiable."""
    n, m = C.shape
    larger = torch.cat([torch.cat([C, C.new_zeros(n, 1)], 1), C.new_zeros(1, m + 1)])
    corner = torch.zeros_like(larger)
    corner[n, m] = 1e3 * (1 + float(C.detach().abs().max()))
    kept_x, kept_y = (a.sum() - mass).reshape(1), (b.sum() - mass).reshape(1)
    return larger + corner, torch.cat([a, kept_y]), torch.cat([b, kept_x])


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
