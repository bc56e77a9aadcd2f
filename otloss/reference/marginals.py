"""The parts of a problem: penalties of the marginals, softmins, the plan and its value."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# Of all problems, () or (B, 1).
Eps = Any

TRANSPORT = 1  # the objective's number, see csrc/kernels.h


class Marginals(NamedTuple):
    """How the plan of a pair is held to its weights: rho KL(P 1 | a), infinite for P 1 = a."""

    x: float
    y: float
    balanced: bool  # every marginal of the call is a constraint


BALANCED = Marginals(math.inf, math.inf, True)

# exp(-UNDERFLOW) is 0.
UNDERFLOW = {torch.float32: 104.0, torch.float64: 746.0}
ROUNDING = 8  # machine epsilons: of a sum of weights, and of a loss against its terms


def centred(f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The solution with <a, f> = <b, g>, of all (f + t, g - t), which are solutions too."""
    excess = (b * g).sum(-1, True) - (a * f).sum(-1, True)
    shift = excess / (a.sum(-1, True) + b.sum(-1, True))
    return torch.where(a > 0, f + shift, 0.0), torch.where(b > 0, g - shift, 0.0)


def snapped(total: Tensor, to: float | Tensor, dtype: torch.dtype) -> Tensor:
    """A total of weights of the dtype, exactly ``to`` where it differs by rounding: eps would
    multiply that. Its derivative stays."""
    near = (total - to).abs() <= ROUNDING * torch.finfo(dtype).eps * to
    return total + torch.where(near, to - total, 0.0).detach()


def column_weights(a: Tensor, b: Tensor) -> Tensor:
    """b of a balanced problem, scaled to the total of a, from which it may differ by rounding."""
    return b * (a.sum(-1, True) / b.sum(-1, True))


def total(w: Tensor) -> Tensor:
    """The total of weights, (..., 1) in float64; 1 where it is 1 to rounding."""
    return snapped(w.sum(-1, keepdim=True, dtype=torch.float64), 1.0, w.dtype)


def clamped(loss: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of terms of total size ``size``, 0 where it is negative by rounding. Its derivative
    stays."""
    rounding = (loss < 0) & (loss >= -ROUNDING * torch.finfo(dtype).eps * size)
    return loss + torch.where(rounding, -loss, 0.0).detach()


def marginals_of(rho_x: float, rho_y: float, i: int, j: int) -> Marginals:
    """Of the pair (i, j): cloud 0 is held by rho_x, every other by rho_y, by themselves too."""
    x, y = (rho_y if cloud > 0 else rho_x for cloud in (i, j))
    return Marginals(x, y, math.isinf(rho_x) and math.isinf(rho_y))


def damping(rho: float, eps: Eps) -> Eps:
    """The factor of a softmin in the update of a potential; 1 for a constraint."""
    return 1 / (1 + eps / rho)


def dual(f: Tensor, rho: float) -> Tensor:
    """rho (1 - exp(-f / rho)), what a point of weight 1 adds to the dual; f for a constraint."""
    return f if math.isinf(rho) else -rho * torch.expm1(-f / rho)


def share(f: Tensor, rho: float) -> Tensor:
    """exp(-f / rho), the part of a point's weight that the plan takes; 1 for a constraint."""
    return torch.ones_like(f) if math.isinf(rho) else (-f / rho).exp()


def semidual(
    eps: float, C: Tensor, g: Tensor, a: Tensor, b: Tensor, marginals: Marginals
) -> Tensor:
    """The dual at g and the best f, moved by the best translation where a side is soft; (B,)."""
    rho_x, rho_y, _ = marginals
    on_f = damping(rho_x, eps)
    f = on_f * softmin(eps, C, g, b)
    if not (math.isinf(rho_x) and math.isinf(rho_y)):
        excess = (total(a) / total(b)).log() - soft_mean(f, a, rho_x) / rho_x
        t = (excess + soft_mean(g, b, rho_y) / rho_y) / (1 / rho_y + on_f / rho_x)
        f, g = f + on_f * t, g - t
    return value(eps, C, f, g, a, b, 0, marginals)


def soft_mean(f: Tensor, w: Tensor, rho: float) -> Tensor:
    """-rho log(<w, exp(-f / rho)> / <w, 1>), (B, 1); the mean for a constraint."""
    mass = total(w).to(w.dtype)
    if math.isinf(rho):
        return (w * f).sum(-1, True) / mass
    least = torch.where(w > 0, f, math.inf).amin(-1, True)
    raised = torch.where(w > 0, f - least, 0.0)
    lost = (w * torch.expm1(-raised / rho)).sum(-1, True) / mass
    exact = (w * (-raised / rho).exp()).sum(-1, True) / mass
    return least - rho * torch.where(lost > -0.5, torch.log1p(lost), exact.log())


class SoftMean(NamedTuple):
    mean: Tensor  # (...,) of potentials, see soft_mean
    magnitude: Tensor  # (...,) mean of their sizes in the target marginal


def mean_and_magnitude(f: Tensor, w: Tensor, rho: float) -> SoftMean:
    """In float64."""
    f, w = f.double(), w.double()
    sizes = (target_marginal(f, w, rho) * f.abs()).sum(-1)
    return SoftMean(soft_mean(f, w, rho).squeeze(-1), sizes / total(w).squeeze(-1))


def target_marginal(f: Tensor, w: Tensor, rho: float) -> Tensor:
    """w share(f), which the plan's marginal is compared with, scaled to the total of w."""
    if math.isinf(rho):
        return w
    return w * share(torch.where(w > 0, f - soft_mean(f, w, rho), 0.0), rho)


def of_entries(eps: Eps) -> Eps:
    """eps as it divides costs (B, n, m)."""
    return eps.unsqueeze(-1) if isinstance(eps, Tensor) and eps.dim() else eps


def softmin(eps: Eps, C: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """T(g)_i = -eps log sum_j b_j exp((g_j - C_ij) / eps); differentiable, 0 for b_j = 0.

    Where the total of b is 1 and exponents are small, rounding is that of C, not of eps: the
    exponentials are 1 more than what is summed, and the total is 1 by definition.
    """
    positive = b > 0
    log_b = torch.where(positive, torch.where(positive, b, 1.0).log(), -math.inf)
    z = (g.unsqueeze(-2) - C) / of_entries(eps)
    whole = torch.logsumexp(log_b.unsqueeze(-2) + z, dim=-1)
    z = torch.where(positive.unsqueeze(-2), z, 0.0)
    small, mass = (z.abs().amax(-1) < 1) & (total(b) == 1), b.sum(-1, True)
    excess = (b.unsqueeze(-2) * z.clamp(max=1).expm1()).sum(-1) + (mass - mass.detach())
    return -eps * torch.where(small, torch.where(small, excess, 0.0).log1p(), whole)


def plan(eps: Eps, C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps); 0 where a weight is 0, with derivative 0."""
    exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - C) / of_entries(eps)
    counts = (a.unsqueeze(-1) > 0) & (b.unsqueeze(-2) > 0)
    return weighted(torch.where(counts, exponent, -torch.inf), a, b)


def weighted(exponent: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a_i b_j exp(exponent_ij), also where the product of the weights alone would underflow."""
    root = (0.5 * exponent).exp()
    return (a.unsqueeze(-1) * root) * (b.unsqueeze(-2) * root)


def counted(C: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """C with 0 in place of whatever stands in rows and columns of weight 0."""
    return torch.where((a.unsqueeze(-1) > 0) & (b.unsqueeze(-2) > 0), C, 0.0)


def forbidding(eps: Eps, least: float | Tensor, dtype: torch.dtype) -> Any:
    """The cost between the dummy points of partial transport, () or (B, 1, 1), from the least of
    the others or 0.

    Their potentials add up, at the solution, to no more than minus that least cost and the
    logarithms of shares, so that the plan underflows to 0 there.
    """
    return 2 * UNDERFLOW[dtype] * of_entries(eps) - least


def bordered(C: Tensor, eps: Eps) -> Tensor:
    """C (B, n, m) with a dummy point more on either side, (B, n + 1, m + 1): at cost 0 from all
    others."""
    finite = torch.where(C.isfinite(), C, 0.0).detach()
    corner = forbidding(eps, finite.amin((-2, -1), keepdim=True).clamp(max=0), C.dtype)
    last = pad(corner.to(C), (C.shape[-1], 0))
    return torch.cat([pad(C, (0, 1)), last], 1)


def value(
    eps: Eps,
    C: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    objective: int,
    marginals: Marginals,
) -> Tensor:
    """The dual, or <P, C> for the transport objective; (B,) in float64.

    After an update of g the plan has the column sums b share(g), share = 1 - dual / rho: its total
    is left in the dual's terms, where it does not cancel that of a and b.
    """
    if objective == TRANSPORT:
        return (plan(eps, C, f, g, a, b) * counted(C, a, b)).sum((-2, -1), dtype=torch.float64)
    of_f = (a.double() * dual(f.double(), marginals.x)).sum(-1)
    of_g = b.double() * dual(g.double(), marginals.y)
    if marginals.balanced:
        return of_f + of_g.sum(-1)
    rest = (eps * total(b) * (total(a) - 1)).squeeze(-1)
    return of_f + ((1 + eps / marginals.y) * of_g).sum(-1) + rest
