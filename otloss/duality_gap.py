"""A bound on the error of a value, from any potentials: primal minus dual; see docs/totals.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otloss.reference import marginals

__all__ = ["Dual", "duality_gap", "gap_of"]


class Dual(NamedTuple):
    """A point of the dual problem, in float64."""

    a: Tensor  # (B, n)
    b: Tensor  # (B, m)
    f: Tensor  # (B, n)
    g: Tensor  # (B, m)
    eps: Any  # one, or (B,)
    rho_x: float
    rho_y: float

    def log_plan(self, rows: slice, C: Tensor) -> Tensor:
        """log P_ij of some rows, -inf where a weight is 0, from their costs."""
        eps = self.eps.reshape(-1, 1, 1) if isinstance(self.eps, Tensor) else self.eps
        exponent = (self.f[:, rows].unsqueeze(-1) + self.g.unsqueeze(-2) - C) / eps
        weight = self.a[:, rows].log().unsqueeze(-1) + self.b.log().unsqueeze(-2)
        return torch.where(weight > -math.inf, exponent + weight, -math.inf)

    def value(self, mass: Tensor) -> Tensor:
        """The dual, (B,), where the plan has the total ``mass``."""
        of_a = self.a * marginals.dual(self.f, self.rho_x)
        of_b = self.b * marginals.dual(self.g, self.rho_y)
        hard = math.isinf(self.rho_x) and math.isinf(self.rho_y)
        full = self.a.sum(-1) if hard else self.a.sum(-1) * self.b.sum(-1)
        return of_a.sum(-1) + of_b.sum(-1) - self.eps * (mass - full)

    def targets(self) -> tuple[Tensor, Tensor]:
        """The target marginals."""
        of_a = marginals.share(self.f, self.rho_x)
        return self.a * of_a, self.b * marginals.share(self.g, self.rho_y)

    def feasible(self) -> tuple[Tensor, Tensor]:
        """The target marginals scaled to one total: that of a constraint, else the geometric
        mean."""
        A, B = self.targets()
        x, y = A.sum(-1, keepdim=True), B.sum(-1, keepdim=True)
        if math.isinf(self.rho_x):
            return A, B * (x / y)
        if math.isinf(self.rho_y):
            return A * (y / x), B
        total = (x * y).sqrt()
        return A * (total / x), B * (total / y)


def duality_gap(
    dual: Dual,
    value: Tensor | None,
    blocks: Callable[[Callable[[slice, Tensor], tuple[Tensor, ...]]], Iterable[tuple[Tensor, ...]]],
) -> Tensor:
    """Primal value of a feasible plan minus dual value, (B,).

    ``blocks(function)`` yields ``function(rows, C)`` of all rows in turn; it is called twice.
    ``value``, if given, is what the bound is for: it widens where rounding put the value outside.
    """
    A0, B0 = dual.feasible()

    def sums(rows: slice, C: Tensor) -> tuple[Tensor, ...]:
        P = dual.log_plan(rows, C).exp()
        r = P.sum(-1)
        return r, P.sum(-2), (_shrink(A0[:, rows], r).unsqueeze(-1) * P).sum(-2)

    parts = list(blocks(sums))
    r = torch.cat([part[0] for part in parts], -1)
    columns, c = (torch.stack([part[k] for part in parts]).sum(0) for k in (1, 2))
    missing = (B0 - c).clamp(min=0)
    share = missing / missing.sum(-1, keepdim=True).clamp(min=torch.finfo(c.dtype).tiny)

    def divergence(rows: slice, C: Tensor) -> tuple[Tensor, ...]:
        L = dual.log_plan(rows, C)
        P, rows_wanted = L.exp(), A0[:, rows]
        Q = _shrink(rows_wanted, r[:, rows]).unsqueeze(-1) * P * _shrink(B0, c).unsqueeze(-2)
        lost = (rows_wanted - Q.sum(-1)).clamp(min=0)
        return (_kl(Q + lost.unsqueeze(-1) * share.unsqueeze(-2), P, L).sum((-2, -1)),)

    KL = torch.stack([part for (part,) in blocks(divergence)]).sum(0)
    return gap_of(dual, value, KL, r, columns, torch.zeros_like(KL))


def gap_of(
    dual: Dual, value: Tensor | None, KL: Tensor, r: Tensor, columns: Tensor, missing: Tensor
) -> Tensor:
    """The gap (B,), from KL(P'|P), the plan's sums, and the mass that these lack at most."""
    A, B = dual.targets()
    A0, B0 = dual.feasible()
    gap = dual.eps * KL
    soft_x, soft_y = math.isfinite(dual.rho_x), math.isfinite(dual.rho_y)
    gap = gap + (dual.rho_x * _kl(A0, A).sum(-1) if soft_x else 0.0)
    gap = gap + (dual.rho_y * _kl(B0, B).sum(-1) if soft_y else 0.0)
    if soft_x and soft_y:  # then the plan itself is feasible
        own = (
            dual.eps * missing
            + dual.rho_x * _kl(r, A, dual.a.log() - dual.f / dual.rho_x).sum(-1)
            + dual.rho_y * _kl(columns, B, dual.b.log() - dual.g / dual.rho_y).sum(-1)
        )
        gap = torch.minimum(gap, own)
    if value is None:
        return gap
    mass = r.sum(-1)
    below = (value.double() - dual.value(mass)).clamp(max=0)
    return torch.maximum(gap, value.double() - dual.value(mass + missing)) - below


def _shrink(wanted: Tensor, has: Tensor) -> Tensor:
    """Factors of at most 1 that leave at most what is wanted."""
    return (wanted / torch.where(has > 0, has, 1.0)).clamp(max=1)


def _kl(p: Tensor, q: Tensor, log_q: Tensor | None = None) -> Tensor:
    """p log(p/q) - p + q, exact where p is near q; ``log_q`` where q may underflow."""
    log_q = q.log() if log_q is None else log_q
    d = torch.where(q > 0, (p - q) / torch.where(q > 0, q, 1.0), math.inf)
    near = d.abs() < 0.5
    small = torch.where(near, d, 0.0)
    by_ratio = q * ((1 + small) * small.log1p() - small)
    by_logs = torch.where(p > 0, p * (torch.where(p > 0, p, 1.0).log() - log_q), 0.0) - p + q
    return torch.where(near, by_ratio, by_logs)
