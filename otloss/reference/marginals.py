"""The parts of a problem: penalties of the marginals, softmins, the plan and its value."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

TRANSPORT = 1  # the objective's number, see csrc/kernels.h


class Marginals(NamedTuple):
    """How the plan of a pair is held to its weights: rho KL(P 1 | a), infinite for P 1 = a."""

    x: float
    y: float
    balanced: bool  # every marginal of the call is a constraint


BALANCED = Marginals(math.inf, math.inf, True)


BALANCED = Marginals(math.inf, math.inf, True)


def marginals_of(rho_x: float, rho_y: float, i: int, j: int) -> Marginals:
    """Of the pair (i, j): cloud 0 is held by rho_x, every other by rho_y, by themselves too."""
    rho = (rho_x, rho_y)
    return Marginals(rho[i > 0], rho[j > 0], math.isinf(rho_x) and math.isinf(rho_y))


def damping(rho: float, eps: float) -> float:
    """The factor of a softmin in the update of a potential; 1 for a constraint."""
    return 1 / (1 + eps / rho)


def dual(f: Tensor, rho: float) -> Tensor:
    """rho (1 - exp(-f / rho)), what a point of weight 1 adds to the dual; f for a constraint."""
    return f if math.isinf(rho) else -rho * torch.expm1(-f / rho)


def share(f: Tensor, rho: float) -> Tensor:
    """exp(-f / rho), the part of a point's weight that the plan takes; 1 for a constraint."""
    return torch.ones_like(f) if math.isinf(rho) else (-f / rho).exp()


def soft_mean(f: Tensor, w: Tensor, rho: float) -> Tensor:
    """-rho log(<w, exp(-f / rho)> / <w, 1>), (B, 1); the mean for a constraint."""
    mass = w.sum(-1, True)
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
    return SoftMean(soft_mean(f, w, rho).squeeze(-1), sizes / w.sum(-1))


def target_marginal(f: Tensor, w: Tensor, rho: float) -> Tensor:
    """w share(f), what is asked of the plan's marginal, scaled to the total of w."""
    if math.isinf(rho):
        return w
    return w * share(torch.where(w > 0, f - soft_mean(f, w, rho), 0.0), rho)


def softmin(eps: float, C: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """T(g)_i = -eps log sum_j b_j exp((g_j - C_ij) / eps); differentiable, 0 for b_j = 0."""
    positive = b > 0
    log_b = torch.where(positive, torch.where(positive, b, 1.0).log(), -math.inf)
    return -eps * torch.logsumexp(log_b.unsqueeze(-2) + (g.unsqueeze(-2) - C) / eps, dim=-1)


def plan(eps: float, C: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps); exactly 0 where a weight is 0."""
    exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - C) / eps
    weight = a.unsqueeze(-1) * b.unsqueeze(-2)
    return weight * torch.where(weight > 0, exponent, 0.0).exp()


def counted(C: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """C with 0 in place of whatever stands in rows and columns of weight 0."""
    return torch.where((a.unsqueeze(-1) > 0) & (b.unsqueeze(-2) > 0), C, 0.0)


def value(
    eps: float,
    C: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    objective: int,
    marginals: Marginals,
) -> Tensor:
    """The dual, or <P, C> for the transport objective; (B,).

    After an update of g the plan has the column sums b share(g).
    """
    if objective == TRANSPORT:
        return (plan(eps, C, f, g, a, b) * counted(C, a, b)).sum((-2, -1))
    terms = (a * dual(f, marginals.x)).sum(-1) + (b * dual(g, marginals.y)).sum(-1)
    if marginals.balanced:
        return terms
    return terms - eps * ((b * share(g, marginals.y)).sum(-1) - a.sum(-1) * b.sum(-1))
