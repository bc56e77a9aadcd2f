"""Iterations: a fixed number of them, or until the marginal error is small."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otloss.reference.marginals import (
    BALANCED,
    Marginals,
    counted,
    damping,
    share,
    soft_mean,
    softmin,
)


def _softmin(eps: float, C: Tensor, g: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """The softmin over rows, 0 for points of weight 0: their potential is kept there."""
    return torch.where(a > 0, softmin(eps, C, g, b), 0.0)


def _marginal_error(g: Tensor, update: Tensor, b: Tensor, eps: float, rho: float) -> Tensor:
    """L1 distance of a marginal of the plan to the one that is asked for, over the latter's mass.

    The plan has b exp((g - update) / eps), where the softmin ``update`` follows on g. Asked for is
    b share(g).
    """
    asked = b * share(torch.where(b > 0, g - soft_mean(g, b, rho), 0.0), rho)
    ratio = ((g - update) / eps + g / rho).clamp(max=80).exp()
    return (asked * (ratio - 1).abs()).sum(-1) / asked.sum(-1)


def fixed_iterations(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    eps: float,
    n_iters: int,
    marginals: Marginals = BALANCED,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """``n_iters`` updates of f, then g, from g: f, g, the error, and [f g] of each iteration.

    Differentiable by autograd to any order, at the memory of every iteration.
    """
    C = counted(C, a, b)
    f, error, steps = torch.zeros_like(a), torch.full_like(a[..., 0], math.nan), []
    for _ in range(n_iters):
        f = damping(marginals.x, eps) * _softmin(eps, C, g, b, a)
        update = _softmin(eps, C.mT, f, a, b)
        error = _marginal_error(g, update, b, eps, marginals.y)
        g = damping(marginals.y, eps) * update
        steps.append(torch.cat([f, g], dim=-1))
    return f, g, error, steps


def symmetric(
    C: Tensor, a: Tensor, f: Tensor, eps: float, tol: float, max_iters: int, rho: float
) -> tuple[Tensor, Tensor, int]:
    """One potential, f = damping T(f), by relaxed iterations that contract whatever eps."""
    iterations, factor = 0, damping(rho, eps)
    if not bool(f.any()):
        f = _softmin(eps, C, f, a, a)
        mean = (a * f).sum(-1, True) / a.sum(-1, True)
        f = torch.where(a > 0, factor * (f - factor / (1 + factor) * mean), 0.0)
        iterations = 1
    while True:
        update = _softmin(eps, C, f, a, a)
        iterations += 1
        error = _marginal_error(f, update, a, eps, rho)
        step = factor * update - f
        if bool((error <= tol).all()) or iterations >= max_iters:
            return f + step / (1 + factor), error, iterations
        f = f + 2 / (2 + factor) * step


def annealed(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    eps: float,
    tol: float,
    max_iters: int,
    scale: float,
    marginals: Marginals,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Gauss-Seidel iterations while eps halves from the largest cost down to its value."""
    iterations, step_eps = 0, max(eps, scale)
    while True:
        f, g = _update_rows(step_eps, C, a, b, g, marginals)
        update = _softmin(step_eps, C.mT, f, a, b)
        error = _marginal_error(g, update, b, step_eps, marginals.y)
        g = damping(marginals.y, step_eps) * update
        iterations += 1
        if step_eps == eps and (bool((error <= tol).all()) or iterations >= max_iters):
            return f, g, error, iterations
        if step_eps > eps and bool((error <= max(tol, 0.1)).all()):
            step_eps = max(eps, step_eps / 2)
        if iterations + 1 >= max_iters:
            step_eps = eps


def _update_rows(
    eps: float, C: Tensor, a: Tensor, b: Tensor, g: Tensor, marginals: Marginals
) -> tuple[Tensor, Tensor]:
    """The best f and the best translation of g together: f of g - t, and g - t.

    Without the translation a large rho takes some rho / eps iterations to find the total mass
    (Séjourné, Vialard, Peyré 2022). Between constraints there is nothing to find.
    """
    update, factor = _softmin(eps, C, g, b, a), damping(marginals.x, eps)
    if math.isinf(marginals.x) and math.isinf(marginals.y):
        return update, g
    excess = (a.sum(-1, True) / b.sum(-1, True)).log()
    excess = excess - soft_mean(factor * update, a, marginals.x) / marginals.x
    excess = excess + soft_mean(g, b, marginals.y) / marginals.y
    t = excess / (1 / marginals.y + factor / marginals.x)
    return torch.where(a > 0, factor * (update + t), 0.0), torch.where(b > 0, g - t, 0.0)
