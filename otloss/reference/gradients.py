"""Derivatives of values and potentials with respect to costs and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from otloss.reference.marginals import (
    TRANSPORT,
    Eps,
    Marginals,
    counted,
    damping,
    dual,
    plan,
    share,
    total,
)


def weight_gradients(
    eps: Eps, f: Tensor, g: Tensor, a: Tensor, b: Tensor, marginals: Marginals
) -> tuple[Tensor, Tensor]:
    """dOT/da and dOT/db at the solution, where the plan has the row sums a share(f).

    Of a balanced problem they are f + t and g - t; the one with <a, f + t> = <b, g - t>.
    """
    if marginals.balanced:
        shift = ((b * g).sum(-1, True) - (a * f).sum(-1, True)) / (2 * a.sum(-1, True))
        return f + shift, g - shift
    of_a = (1 + eps / marginals.x) * dual(f, marginals.x) + (eps * (total(b) - 1)).to(f.dtype)
    of_b = (1 + eps / marginals.y) * dual(g, marginals.y) + (eps * (total(a) - 1)).to(g.dtype)
    return of_a, of_b


def quotient(numerator: Tensor, weight: Tensor) -> Tensor:
    """numerator / weight, and 0 for padding."""
    positive = weight > 0
    return torch.where(positive, numerator / torch.where(positive, weight, 1.0), 0.0)


def transport_terms(
    scale: Tensor, P: Tensor, C: Tensor, a: Tensor, b: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scale <P, C> differentiated with respect to C, f, g, a, b, each on its own."""
    weighted = scale[:, None, None] * P * C
    row, column = weighted.sum(-1), weighted.sum(-2)
    grad_C = scale[:, None, None] * P - weighted / eps
    return grad_C, row / eps, column / eps, quotient(row, a), quotient(column, b)


def value_terms(
    scale: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, eps: float, marginals: Marginals
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scale * value, the regularized one, differentiated with respect to f, g, a, b."""
    share_g, of_a, of_b = share(g, marginals.y), dual(f, marginals.x), dual(g, marginals.y)
    if not marginals.balanced:
        of_a = of_a + eps * b.sum(-1, True)
        of_b = (1 + eps / marginals.y) * of_b + (eps * (total(a) - 1)).to(g.dtype)
    of_f = a * share(f, marginals.x)
    of_g = b * share_g / damping(marginals.y, eps)
    scale = scale[:, None]
    return scale * of_f, scale * of_g, scale * of_a, scale * of_b


def implicit_gradient(
    scale: Tensor,
    f_bar: Tensor,
    g_bar: Tensor,
    C: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    eps: float,
    objective: int,
    same: bool,
    marginals: Marginals,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scale * value + <f_bar, f> + <g_bar, g> with respect to C, a, b; differentiable.

    At the solution, with r and c the plan's marginals over the dampings, df and dg obey
    [diag(r) P; P' diag(c)] (df, dg) = (sum_j P (dC - eps db / b), sum_i P (dC - eps da / a)).
    A cloud against itself has one potential. In a balanced problem f and g stand for the pair with
    <a, f> = <b, g>, and of the weight gradients, defined up to (t, -t), it returns the one with
    <a, a_bar> = <b, b_bar>.
    """
    dtype = C.dtype
    scale, f_bar, g_bar, C, a, b, f, g = (t.double() for t in (scale, f_bar, g_bar, C, a, b, f, g))
    mass = a.sum(-1, True) + b.sum(-1, True)
    if marginals.balanced:
        shift = ((b * g).sum(-1, True) - (a * f).sum(-1, True)) / mass
        f, g = f + shift, g - shift
    f, g = torch.where(a > 0, f, 0.0), torch.where(b > 0, g, 0.0)
    if same:
        f = g = 0.5 * (f + g)
    C = counted(C, a, b)
    P = plan(eps, C, f, g, a, b)
    f_bar, g_bar = torch.where(a > 0, f_bar, 0.0), torch.where(b > 0, g_bar, 0.0)
    if objective == TRANSPORT:
        C_bar, f_direct, g_direct, a_bar, b_bar = transport_terms(scale, P, C, a, b, eps)
        f_bar, g_bar = f_bar + f_direct, g_bar + g_direct
    else:
        C_bar = scale[:, None, None] * P
        of_a, of_b = weight_gradients(eps, f, g, a, b, marginals)
        a_bar, b_bar = scale[:, None] * of_a, scale[:, None] * of_b
    if marginals.balanced:
        gauge = (f_bar.sum(-1, True) - g_bar.sum(-1, True)) / mass
        f_bar, g_bar = f_bar - gauge * a, g_bar + gauge * b
        a_bar, b_bar = a_bar - gauge * f, b_bar + gauge * g
    r, c = P.sum(-1) / damping(marginals.x, eps), P.sum(-2) / damping(marginals.y, eps)
    # A little more than rounding takes: clusters that exchange nothing leave the system singular.
    raised = 1 + 64 * torch.finfo(c.dtype).eps
    # No row of the system is empty: not one of padding, nor that of a point of which the plan takes
    # nothing.
    padding = torch.diag_embed((c <= 0).to(c))
    if same:
        half = 0.5 * (f_bar + g_bar)
        alpha = beta = _solve_linear(torch.diag_embed(raised * r) + P + padding, half)
    else:
        row = P / torch.where(r > 0, r, 1.0).unsqueeze(-1)
        schur = torch.diag_embed(raised * c) - P.mT @ row + padding
        if marginals.balanced:  # constants are its null space
            schur = schur + b.unsqueeze(-1) * b.unsqueeze(-2)
        beta = _solve_linear(schur, g_bar - (row.mT @ f_bar.unsqueeze(-1)).squeeze(-1))
        alpha = quotient(f_bar - (P @ beta.unsqueeze(-1)).squeeze(-1), r)
    C_bar = C_bar + P * (alpha.unsqueeze(-1) + beta.unsqueeze(-2))
    a_bar = a_bar - eps * quotient((P @ beta.unsqueeze(-1)).squeeze(-1), a)
    b_bar = b_bar - eps * quotient((P.mT @ alpha.unsqueeze(-1)).squeeze(-1), b)
    if marginals.balanced:
        t = ((b * b_bar).sum(-1, True) - (a * a_bar).sum(-1, True)) / mass
        a_bar, b_bar = a_bar + t, b_bar - t
    a_bar, b_bar = torch.where(a > 0, a_bar, 0.0), torch.where(b > 0, b_bar, 0.0)
    return C_bar.to(dtype), a_bar.to(dtype), b_bar.to(dtype)


def _solve_linear(matrix: Tensor, right: Tensor) -> Tensor:
    """One system at a time: of several at once, by several threads, MKL makes errors or no end."""
    pairs = zip(matrix, right, strict=True)
    return torch.stack([torch.linalg.solve_ex(A, of_one).result for A, of_one in pairs])
