"""The best shifts of groups of columns against each other: csrc/cpu/solve/group_shifts.h.

Where the plan falls apart into groups that exchange next to nothing, the semidual is nearly flat
along potentials that are constant on each group, until one is shifted so far that mass moves to
another. The shifts are the potentials of a small transport problem, of the rows and these groups.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from otloss.reference.marginals import damping, dual, share

STEPS, TRIES, SHRINK = 30, 30, 0.3
TOLERANCE = 0.05  # of the log residual, and of a step over the temperature
NO_GAIN = 1e-6  # of a longer step, over the temperature and the mass
SUFFICIENT_GAIN, ROUNDING, RIDGE = 1e-4, 1e-14, 1e-13
RATIO = 0.25  # of one temperature to the one before
SLACK = 2  # as much as columns lack may leave a group


class Groups(NamedTuple):
    M: Tensor  # (n, k) -eps log of the part of A that the plan sends to each group of columns
    A: Tensor  # (n,) what rows hold, positive
    B: Tensor  # (k,) what groups of columns want, positive
    lacking: float  # what the plan lacks of B, in all
    eps: float
    rho_x: float
    rho_y: float

    @property
    def hard(self) -> bool:
        return math.isinf(self.rho_x) and math.isinf(self.rho_y)


class Point(NamedTuple):
    """The groups' dual problem at shifts t and a temperature h in the place of eps."""

    t: Tensor  # (k,)
    value: float
    Q: Tensor  # (n, k) the plan
    r: Tensor  # (n,) its row sums
    c: Tensor  # (k,) its column sums
    w: Tensor  # (k,) those that are wanted


def best_shifts(groups: Groups) -> Tensor:
    """(k,) what to add to the potentials of each group of columns.

    By Newton's method, or, where that leads nowhere, at temperatures that fall from the largest M.
    """
    groups, zero = _lump_rows(groups), torch.zeros_like(groups.B)
    reached, t = _ascend(groups, groups.eps, zero)
    if not reached:
        t = _anneal(groups, zero)
    return _centred(groups.B, t) if groups.hard else t


def _lump_rows(groups: Groups) -> Groups:
    """The rows lumped together that stay in their group, the one they send most to.

    Of a group no more leaves than columns lack in all, those first that have the shortest way.
    """
    home = groups.M.argmin(1)
    stays, lumps = torch.ones_like(groups.A, dtype=torch.bool), []
    for group in range(len(groups.B)):
        rows = (home == group).nonzero()[:, 0]
        order = (groups.M[rows] - groups.M[rows, group, None]).argsort(0)
        held = groups.A[rows][order]
        leaves = held.cumsum(0) - held <= SLACK * groups.lacking
        leaves[:, group] = False
        stays[rows[order[leaves]]] = False
        left = rows[stays[rows]]
        if len(left):
            sent = groups.A[left].log()[:, None] - groups.M[left] / groups.eps
            A = groups.A[left].sum()
            lumps.append((A, groups.eps * (A.log() - sent.logsumexp(0))))
    A = torch.cat([groups.A[~stays], *(A[None] for A, _ in lumps)])
    M = torch.cat([groups.M[~stays], *(M[None] for _, M in lumps)])
    return groups._replace(A=A, M=M)


def _anneal(groups: Groups, t: Tensor) -> Tensor:
    h = max(groups.eps, float((groups.M.amax(1) - groups.M.amin(1)).max()))
    _, t = _ascend(groups, h, t)
    while h > groups.eps:
        h = max(groups.eps, RATIO * h)
        _, t = _ascend(groups, h, t)
    return t


def _at(groups: Groups, h: float, t: Tensor) -> Point:
    """A soft side's potential is damped, which its part of the dual contains."""
    rho_x = groups.rho_x + h
    z = (t - groups.M) / h
    f = -h * torch.logsumexp(z, 1)
    r, w = groups.A * share(f, rho_x), groups.B * share(t, groups.rho_y)
    Q = r[:, None] * z.softmax(1)
    value = (groups.A * dual(f, rho_x)).sum() + (groups.B * dual(t, groups.rho_y)).sum()
    return Point(t, float(value), Q, r, Q.sum(0), w)


def _ascend(groups: Groups, h: float, t: Tensor) -> tuple[bool, Tensor]:
    """Whether the top is reached, and the shifts."""
    at = _at(groups, h, t)
    for _ in range(STEPS):
        log_residual = (at.w / at.c.clamp(min=1e-300)).log()
        p = _newton_step(groups, h, at, log_residual)
        near = p.abs().max() <= TOLERANCE * h
        near = near or abs((at.w - at.c) @ p) <= NO_GAIN * h * groups.B.sum()
        if near and log_residual.abs().max() <= TOLERANCE:
            return True, at.t
        found = _rise(groups, h, p, at) or _rise(groups, h, h * log_residual, at)
        if found is None:
            break
        at = found
    return False, at.t


def _rise(groups: Groups, h: float, p: Tensor, at: Point) -> Point | None:
    """A higher point along a direction."""
    slope, length = float((at.w - at.c) @ p), 1.0
    for _ in range(TRIES if slope > 0 else 0):
        trial = _at(groups, h, at.t + length * p)
        rounding = ROUNDING * (abs(at.value) + h)
        if trial.value >= at.value + SUFFICIENT_GAIN * length * slope - rounding:
            return trial
        length *= SHRINK
    return None


def _newton_step(groups: Groups, h: float, at: Point, log_residual: Tensor) -> Tensor:
    """(diag(c + h w / rho_y) - damping_x Q^T diag(1/r) Q) p = h c log(w / c), scaled by c^(1/2)."""
    root = at.c.clamp(min=1e-200).sqrt()
    H = (at.c + h / groups.rho_y * at.w).diag()
    H = H - damping(groups.rho_x, h) * at.Q.mT @ (at.Q / at.r[:, None])
    H = H / root / root[:, None] + RIDGE * torch.eye(len(root)).to(H)
    if groups.hard:  # constants, which it does not see
        H = H + root * root[:, None] / at.c.sum()
        log_residual = _centred(at.c, log_residual)
    return h * torch.linalg.solve(H, at.c / root * log_residual) / root


def _centred(w: Tensor, v: Tensor) -> Tensor:
    return v - (w @ v) / w.sum()
