"""One-sided derivatives in weights of 0.

The operations give a point of weight 0 the gradient 0. That is right for padding, where NaN or
infinity stands. An empty bin is a place that mass can come to: its costs are finite, and the value
has a derivative in its weight, for more mass. The potential there is that of the first mass to
come, f_i = damping T(g)_i, and in the gradients

    R_ij = b_j exp((f_i + g_j - C_ij) / eps)

takes the place of P_ij / a_i. What the implicit gradient needs besides, the solution of its linear
system, follows from the gradient of the other side's weights. The unrolled gradient needs every
iteration, and repeats them with weights in place of 0 that are too small to change anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from otloss import _check
from otloss.autograd.settings import Inputs, Places, Seeds, Settings, implementation, mode
from otloss.costs import COSTS
from otloss.method import in_blocks
from otloss.reference.arguments import as_pairs
from otloss.reference.gradients import quotient, weight_gradients
from otloss.reference.marginals import (
    Marginals,
    column_weights,
    damping,
    marginals_of,
    plan,
    share,
    softmin,
)

__all__ = ["FirstOrder", "extended", "fill", "masks", "some"]

_SECOND_ORDER: Final = (
    "second derivatives in weights of empty bins, points of weight 0 where the costs are finite, "
    "are not available: give padding NaN coordinates or costs, or detach the weights"
)

# What stands for a weight of 0 where iterations are repeated, over the total: rounding does not see
# it, and the kernels' exponentials, which end at 2^-126, still resolve its entries of the plan.
TINY: Final = 1e-20

# Of f and of g, or of the two weights, each of every pair.
Both = Sequence[Sequence[Tensor]]


def masks(places: Places, weights: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """The empty bins of every cloud, (B, n): points of weight 0 that are no padding."""
    return [
        (w == 0) & there & want
        for w, there, want in zip(weights, places.present, wanted, strict=True)
    ]


def some(empty: Sequence[Tensor]) -> list[bool]:
    """Which clouds have empty bins, as far as is known without stalling a device."""
    return [not _check.readable(e) or bool(e.any()) for e in empty]


class FirstOrder(torch.autograd.Function):
    """``(tensor, empty, given) -> tensor``, whose empty bins have no further derivative.

    ``given``: the tensor is a gradient, and only a derivative of its entries at empty bins is
    refused. Where data is not read, NaN takes the place of an error.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, empty: Tensor, given: bool) -> Tensor:
        ctx.empty, ctx.given = empty, given
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refused = ctx.empty
        if ctx.given:
            refused = (refused & (grad != 0)).any(-1, True)
        if not _check.readable(grad):
            grad = torch.where(refused, torch.nan, grad)
        elif bool(refused.any()):
            raise NotImplementedError(_SECOND_ORDER)
        return grad, None, None


def fill(
    s: Settings,
    places: Places,
    seeds: Seeds,
    weights: Sequence[Tensor],
    potentials: Both,
    given: Both,
    wanted: Sequence[bool],
) -> Both:
    """``given``, the gradients of both weights of every pair, with those of empty bins."""
    empty = masks(places, weights, wanted)
    has = some(empty)
    if not any(has):
        return given
    with torch.no_grad():
        if s.options.follows_iterations():
            found = _unrolled(s, places, seeds, weights, empty)
        else:
            found = [
                [
                    _of_side(_Side.of(s, places, weights, p, k), empty[c], seeds, potentials, given)
                    if has[c]
                    else given[k][p]
                    for p, c in enumerate(s.pairs[k::2])
                ]
                for k in (0, 1)
            ]
    # A derivative beyond the dtype is its largest number: an infinite one times the weight of 0
    # would be NaN, in the sums that reach other weights.
    most = torch.finfo(weights[0].dtype).max
    return [
        [
            torch.where(empty[c], there.clamp(-most, most).to(grad), grad) if has[c] else grad
            for c, there, grad in zip(clouds, *of_side, strict=True)
        ]
        for clouds, *of_side in zip((s.pairs[::2], s.pairs[1::2]), found, given, strict=True)
    ]


def extended(
    s: Settings, places: Places, weights: Sequence[Tensor], f: Tensor, g: Tensor
) -> list[Tensor]:
    """The potentials of a single pair, and at empty bins those of the first mass to come."""
    empty = masks(places, weights, [True, True])
    has, potentials = some(empty), [f, g]
    with torch.no_grad():
        if s.options.n_iters >= 0:
            _, (_, _, (f,), (g,), *_) = _repeated(s, places, weights, empty)
            found = [f, g]
        else:
            found = [
                _Side.of(s, places, weights, 0, k).sums(potentials[1 - k])[0] if has[k] else v
                for k, v in enumerate(potentials)
            ]
    return [
        FirstOrder.apply(torch.where(e, there.to(v), v), e, True) if any_there else v
        for v, there, e, any_there in zip(potentials, found, empty, has, strict=True)
    ]


def _precise(t: Tensor) -> Tensor:
    """In float64 on a CPU, where only rows of weight 0 are computed: some may be far away."""
    return t.detach().double() if t.is_cpu else t.detach()


class _Side(NamedTuple):
    """One side of a pair, its points as rows and those of the other side as columns."""

    settings: Settings
    places: Places
    pair: int
    exchanged: int  # 1 if the rows are those of the second cloud, else 0
    clouds: tuple[int, int]  # of rows, of columns
    a: Tensor  # (B, n) weights of the rows
    b: Tensor  # (B, m) of the columns, of the total of a if balanced
    marginals: Marginals  # of the rows, of the columns

    @staticmethod
    def of(s: Settings, places: Places, weights: Sequence[Tensor], p: int, k: int) -> _Side:
        i, j = as_pairs(s.pairs)[p]
        x, y, balanced = marginals_of(s.options.rho_x, s.options.rho_y, i, j)
        if k:
            i, j, x, y = j, i, y, x
        a, b = _precise(weights[i]), _precise(weights[j])
        if balanced:
            b = column_weights(a, b)
        return _Side(s, places, p, k, (i, j), a, b, Marginals(x, y, balanced))

    def sums(self, g: Tensor, h: Tensor | None = None) -> list[Tensor]:
        """f, and the row sums of R C and of R h, in rows of weight 0; 0 elsewhere. (B, n) each.

        Some rows at a time. Where data is not read it is all of them.
        """
        eps, rho, g = self.settings.options.eps, self.marginals.x, _precise(g)
        h = torch.zeros_like(g) if h is None else h
        n = self.a.shape[1]
        rows = torch.arange(n, device=self.a.device)
        if _check.readable(self.a):
            rows = rows[(self.a == 0).any(0)]

        def of_block(block: slice) -> tuple[Tensor, ...]:
            C = self._costs(rows[block])
            T = softmin(eps, C, g, self.b)
            f = damping(rho, eps) * T
            R = plan(eps, C, T, g, torch.ones_like(f), self.b) * share(f, rho).unsqueeze(-1)
            return f, (R * C).sum(-1), (R * h.unsqueeze(-2)).sum(-1)

        parts = zip(*in_blocks(of_block, len(rows), self.b), strict=True)
        results = [torch.cat(part, -1) for part in parts]
        return [r.new_zeros(r.shape[0], n).index_copy(-1, rows, r) for r in results]

    def _costs(self, rows: Tensor) -> Tensor:
        """C (B, rows, m) as it stands; in columns of weight 0 it is 0."""
        i, j = self.clouds
        if self.places.costs:
            C = self.places.costs[self.pair]
            C = _precise(C[:, :, rows].mT if self.exchanged else C[:, rows])
        else:
            x, y = (_precise(self.places.points[c]) for c in (i, j))
            weights = [self.places.present[i][:, rows].to(x), self.b]
            operation = implementation(self.settings.options.method)
            kind = COSTS[str(self.settings.options.cost)]
            (C,) = operation.cost([x[:, rows], y], weights, [0, 1], kind)
        return torch.where(self.b.unsqueeze(-2) > 0, C, 0.0)


def _of_side(side: _Side, empty: Tensor, seeds: Seeds, potentials: Both, given: Both) -> Tensor:
    """The gradient of the weights of the rows, (B, n), right where they are 0.

    That of row i is what a fixed f_i gives, less eps sum_j R_ij beta_j. That of column j has
    (P^T alpha)_j / b_j in it, and with r, c from the implicit system
    c_j beta_j = g_bar_j - (P^T alpha)_j. The terms of <P, C> cancel, and if the problem is balanced
    so does the constant that the gradients are defined up to.
    """
    s, p, own, other = side.settings, side.pair, side.exchanged, 1 - side.exchanged
    eps, (_, rho, balanced), a, b = s.options.eps, side.marginals, side.a, side.b
    f, g, g_bar = (_precise(t) for t in (potentials[own][p], potentials[other][p], given[other][p]))
    transport = s.options.objective == "transport"
    scale = s.coefficients[p] * _precise(seeds.of_value(p)).unsqueeze(-1)
    mass = a.sum(-1, True) + b.sum(-1, True)
    if balanced:
        shift = ((b * g).sum(-1, True) - (a * f).sum(-1, True)) / mass
        f, g = f + shift, g - shift
    h, gauge = torch.zeros_like(b), torch.zeros_like(mass)  # eps beta, but for its constant
    if mode(s, seeds) == "implicit":
        seed = torch.zeros_like(b)
        if seeds.f:
            on_f, seed = (
                torch.where(w > 0, _precise((seeds.f, seeds.g)[k][p]), 0.0)
                for k, w in ((own, a), (other, b))
            )
            gauge = (on_f.sum(-1, True) - seed.sum(-1, True)) / mass if balanced else gauge
        h = g_bar - gauge * g + eps * (quotient(seed, b) + gauge)
        if not transport:
            h = h - scale * weight_gradients(eps, f, g, a, b, side.marginals)[1]
        # A point so far that the plan takes nothing of it has no part in the system.
        h = torch.where(b > 0, quotient(h * damping(rho, eps), share(g, rho)), 0.0)
    there, cost, beta = side.sums(g, h)
    if transport:
        at_fixed = cost
    else:
        at_fixed = weight_gradients(eps, torch.where(empty, there, f), g, a, b, side.marginals)[0]
    return scale * at_fixed - gauge * there - beta


def _repeated(
    s: Settings, places: Places, weights: Sequence[Tensor], empty: Sequence[Tensor]
) -> tuple[Inputs, Sequence[Any]]:
    """The problems with a little mass in empty bins, and what ``solve`` makes of them."""
    operation, o = implementation(s.options.method), s.options
    filled = [
        torch.where(e, TINY * w.sum(-1, True), w)
        for e, w in zip(empty, map(_precise, weights), strict=True)
    ]
    points = [_precise(x) for x in places.points]
    costs: list[Tensor] = []
    if places.costs:
        for C, (i, j) in zip(places.costs, as_pairs(s.pairs), strict=True):
            counts = (filled[i].unsqueeze(-1) > 0) & (filled[j].unsqueeze(-2) > 0)
            both = empty[i].unsqueeze(-1) & empty[j].unsqueeze(-2)  # where C may be anything
            costs.append(_precise(torch.where(counts & ~(both & ~C.isfinite()), C, 0.0)))
    elif s.dense:
        costs = operation.cost(points, filled, s.pairs, COSTS[str(o.cost)])
    inputs = Inputs(costs, points, filled, [_precise(v) for v in places.init])
    limits = s.eps, o.max_iters, o.n_iters, True, False  # a tol, which is not read
    return inputs, operation.solve(*s.arguments(inputs), inputs.init, *limits)


def _unrolled(
    s: Settings, places: Places, seeds: Seeds, weights: Sequence[Tensor], empty: Sequence[Tensor]
) -> Both:
    """The gradients of both weights of every pair, right at empty bins."""
    inputs, (_, _, _, _, traces, *_) = _repeated(s, places, weights, empty)
    at_f, at_g = (
        [torch.where(empty[c], 0.0, _precise(t)) for t, c in zip(grads, side, strict=False)]
        for grads, side in ((seeds.f, s.pairs[::2]), (seeds.g, s.pairs[1::2]))
    )
    _, _, *found = implementation(s.options.method).unrolled_backward(
        _precise(seeds.loss), at_f, at_g, *s.arguments(inputs), inputs.init, traces, [], [], True
    )
    return found
