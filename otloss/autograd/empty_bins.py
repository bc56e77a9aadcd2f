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

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from otloss import _check
from otloss.autograd.settings import Inputs, Places, Seeds, Settings, implementation, is_envelope
from otloss.costs import COSTS
from otloss.method import in_blocks
from otloss.reference.gradients import quotient, weight_gradients
from otloss.reference.marginals import Marginals, damping, marginals_of, share
from otloss.reference.operations import Arguments, as_pairs

__all__ = ["FirstOrder", "extended", "fill", "masks", "some"]

_SECOND_ORDER: Final = (
    "second derivatives in weights of empty bins, points of weight 0 where the costs are finite, "
    "are not available: give padding NaN coordinates or costs, or detach the weights"
)

# What stands for a weight of 0 where iterations are repeated, over the total: rounding does not see
# it, and the kernels' exponentials, which end at 2^-126, still resolve its entries of the plan.
TINY: Final = 1e-20


class Side(NamedTuple):
    """One side of a pair, its points as rows and those of the other side as columns."""

    pair: int
    exchanged: int  # 1: the rows are those of the second cloud
    rows: int  # cloud
    columns: int
    a: Tensor  # (B, n) weights of the rows
    b: Tensor  # (B, m) of the columns, of the total of a if balanced
    marginals: Marginals  # of the rows, of the columns


def _sides(s: Settings, weights: Sequence[Tensor], wanted: Sequence[bool]) -> Iterator[Side]:
    """Both sides of every pair, but for those whose weights are not wanted."""
    for p, (i, j) in enumerate(as_pairs(s.pairs)):
        x, y, balanced = marginals_of(s.options.rho_x, s.options.rho_y, i, j)
        for side in ((p, 0, i, j), (p, 1, j, i)):
            if not wanted[side[2]]:
                continue
            a, b = (_precise(weights[c]) for c in side[2:])
            if balanced:  # totals may differ by rounding
                b = b * (a.sum(-1, True) / b.sum(-1, True))
            yield Side(
                *side, a, b, Marginals(y, x, balanced) if side[1] else Marginals(x, y, balanced)
            )


def _precise(t: Tensor) -> Tensor:
    """In float64 on a CPU, where only rows of weight 0 are computed: some may be far away."""
    return t.detach().double() if t.is_cpu else t.detach()


def _over_rows(
    s: Settings,
    places: Places,
    side: Side,
    function: Callable[..., tuple[Tensor, ...]],
    *arguments: Any,
) -> list[Tensor]:
    """``function(side, C, *arguments)`` of the rows of weight 0, some at a time, each result as
    (B, n) with 0 in other rows. Where data is not read it is of all rows."""
    n = side.a.shape[1]
    rows = torch.arange(n, device=side.a.device)
    if _check.readable(side.a):
        rows = rows[(side.a == 0).any(0)]
    parts = in_blocks(
        lambda block: function(side, _costs(s, places, side, rows[block]), *arguments),
        len(rows),
        side.b,
    )
    results = [torch.cat(part, -1) for part in zip(*parts, strict=True)]
    return [r.new_zeros(r.shape[0], n).index_copy(-1, rows, r) for r in results]


def _costs(s: Settings, places: Places, side: Side, rows: Tensor) -> Tensor:
    """C (B, rows, m) as it stands; in columns of weight 0 it is 0."""
    if places.costs:
        C = places.costs[side.pair]
        C = _precise(C[:, :, rows].mT if side.exchanged else C[:, rows])
    else:
        x, y = (_precise(places.points[c]) for c in (side.rows, side.columns))
        weights = [places.present[side.rows][:, rows].to(x), side.b]
        operation, kind = implementation(s.options.method), COSTS[str(s.options.cost)]
        (C,) = operation.cost([x[:, rows], y], weights, [0, 1], kind)
    return torch.where(side.b.unsqueeze(-2) > 0, C, 0.0)


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
    """``(tensor, empty, given)``: the tensor, whose empty bins have no further derivative.

    ``given``: it is a gradient, and only what is asked of its empty bins has none. Where data is
    not read, NaN takes the place of an error.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, empty: Tensor, given: bool) -> Tensor:
        ctx.empty, ctx.given = empty, given
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        asked = ctx.empty
        if ctx.given:
            asked = (asked & (grad != 0)).any(-1, True)
        if not _check.readable(grad):
            grad = torch.where(asked, torch.nan, grad)
        elif bool(asked.any()):
            raise NotImplementedError(_SECOND_ORDER)
        return grad, None, None


@torch.no_grad()
def fill(
    s: Settings,
    seeds: Seeds,
    inputs: Inputs,
    potentials: tuple[list[Tensor], list[Tensor]],
    given: tuple[list[Tensor], list[Tensor]],
    wanted: list[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    """``given``, the gradients of both weights of every pair, with those of empty bins."""
    places = s.places
    if places is None or (s.backward == "envelope" and s.options.objective == "transport"):
        return given
    empty = masks(places, inputs.weights, wanted)
    clouds = some(empty)
    if not any(clouds):
        return given
    grads = [list(given[0]), list(given[1])]
    if s.backward == "unrolled":
        found = _unrolled(s, places, seeds, inputs.weights, empty)
    else:
        found = [list(given[0]), list(given[1])]
        for side in _sides(s, inputs.weights, clouds):
            bins = empty[side.rows]
            found[side.exchanged][side.pair] = _of_side(
                s, places, seeds, side, bins, potentials, given
            )
    for p, pair in enumerate(as_pairs(s.pairs)):
        failed = 0 * _precise(potentials[0][p]).sum(-1, True)  # NaN or 0
        for k, c in enumerate(pair):
            # A derivative beyond the dtype is its largest number: an infinite one times the weight
            # of 0 would be NaN, in the sums that reach other weights.
            most = torch.finfo(grads[k][p].dtype).max
            value = (found[k][p] + failed).clamp(-most, most).to(grads[k][p])
            grads[k][p] = torch.where(empty[c], value, grads[k][p])
    return grads[0], grads[1]


def extended(
    s: Settings, places: Places, weights: Sequence[Tensor], f: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """The potentials of a single pair, and at empty bins those of the first mass to come."""
    potentials = [f], [g]
    empty = masks(places, weights, [True, True])
    with torch.no_grad():
        found = _extended(s, places, weights, potentials, empty)
    f, g = (
        FirstOrder.apply(torch.where(e, there.to(v), v), e, True) if has else v
        for v, there, e, has in zip((f, g), found, empty, some(empty), strict=True)
    )
    return f, g


def _extended(
    s: Settings,
    places: Places,
    weights: Sequence[Tensor],
    potentials: tuple[list[Tensor], list[Tensor]],
    empty: list[Tensor],
) -> list[Tensor]:
    """Right at empty bins."""
    if s.options.n_iters >= 0:
        _, solution = _repeated(s, places, weights, empty)
        return [solution[2][0], solution[3][0]]
    found = [v[0] for v in potentials]
    for side in _sides(s, weights, some(empty)):
        other = _precise(potentials[1 - side.exchanged][0])
        (found[side.rows],) = _over_rows(s, places, side, _potential, s.options.eps, other)
    return found


def _potential(side: Side, C: Tensor, eps: float, g: Tensor) -> tuple[Tensor, ...]:
    return _softmin(side, C, eps, g)[:1]


def _softmin(side: Side, C: Tensor, eps: float, g: Tensor) -> tuple[Tensor, Tensor]:
    """f = damping T(g) and R, of rows of the cost."""
    rho, positive = side.marginals.x, side.b > 0
    log_b = torch.where(positive, side.b, 1.0).log()
    z = torch.where(positive, log_b + g / eps, -torch.inf).unsqueeze(-2) - C / eps
    total = z.logsumexp(-1)
    f = -eps * damping(rho, eps) * total
    return f, (z - total.unsqueeze(-1)).exp() * share(f, rho).unsqueeze(-1)


def _of_side(
    s: Settings,
    places: Places,
    seeds: Seeds,
    side: Side,
    empty: Tensor,
    potentials: tuple[list[Tensor], list[Tensor]],
    given: tuple[list[Tensor], list[Tensor]],
) -> Tensor:
    """The gradient of the weights of the rows, (B, n), right where they are 0.

    That of row i is what a fixed f_i gives, less eps sum_j R_ij beta_j. That of column j has
    (P^T alpha)_j / b_j in it, and with r, c from the implicit system
    c_j beta_j = g_bar_j - (P^T alpha)_j. The terms of <P, C> cancel, and if the problem is balanced
    so does the constant that the gradients are defined up to.
    """
    p, eps, (_, rho_other, balanced) = side.pair, s.options.eps, side.marginals
    own, other, a, b = side.exchanged, 1 - side.exchanged, side.a, side.b
    f, g, g_bar = (_precise(t) for t in (potentials[own][p], potentials[other][p], given[other][p]))
    transport = s.options.objective == "transport"
    scale = s.coefficients[p] * _precise(seeds.of_value(p)).unsqueeze(-1)
    mass = a.sum(-1, True) + b.sum(-1, True)
    if balanced:
        shift = ((b * g).sum(-1, True) - (a * f).sum(-1, True)) / mass
        f, g = f + shift, g - shift
    h, gauge = torch.zeros_like(b), torch.zeros_like(mass)  # eps beta, but for its constant
    if not is_envelope(s, seeds):
        seed = torch.zeros_like(b)
        if seeds.f:
            on_f, seed = (
                torch.where(w > 0, _precise((seeds.f, seeds.g)[k][p]), 0.0)
                for k, w in ((own, a), (other, b))
            )
            gauge = (on_f.sum(-1, True) - seed.sum(-1, True)) / mass if balanced else gauge
        h = g_bar - gauge * g + eps * (quotient(seed, b) + gauge)
        if not transport:
            h = h - scale * _at_fixed(eps, side, f, g)[1]
        h = torch.where(b > 0, h * damping(rho_other, eps) / share(g, rho_other), 0.0)

    there, cost, beta = _over_rows(s, places, side, _sums, eps, g, h)
    at_fixed = cost if transport else _at_fixed(eps, side, torch.where(empty, there, f), g)[0]
    return scale * at_fixed - gauge * there - beta


def _sums(side: Side, C: Tensor, eps: float, g: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    f, R = _softmin(side, C, eps, g)
    return f, (R * C).sum(-1), (R * h.unsqueeze(-2)).sum(-1)


def _at_fixed(eps: float, side: Side, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """dOT/da of the rows and of the columns."""
    return weight_gradients(eps, f, g, side.a, side.b, side.marginals)


def _repeated(
    s: Settings, places: Places, weights: Sequence[Tensor], empty: list[Tensor]
) -> tuple[Arguments, Sequence[Any]]:
    """The problems with a little mass in empty bins, and what ``solve`` makes of them."""
    operation, o = implementation(s.options.method), s.options
    points = [_precise(x) for x in places.points]
    filled = [
        torch.where(e, TINY * w.sum(-1, True), w)
        for e, w in zip(empty, map(_precise, weights), strict=True)
    ]
    costs: list[Tensor] = []
    if places.costs:
        for C, (i, j) in zip(places.costs, as_pairs(s.pairs), strict=True):
            there = (filled[i].unsqueeze(-1) > 0) & (filled[j].unsqueeze(-2) > 0)
            both = empty[i].unsqueeze(-1) & empty[j].unsqueeze(-2)
            costs.append(_precise(torch.where(there & ~(both & ~C.isfinite()), C, 0.0)))
    elif s.dense:
        costs = operation.cost(points, filled, s.pairs, COSTS[str(o.cost)])
    init = [_precise(v) for v in places.init]
    problem = s.arguments(Inputs(costs, points, filled, init))
    limits = problem.eps, o.max_iters, o.n_iters  # tol is not read
    return problem, operation.solve(*problem, init, *limits, True, False)


def _unrolled(
    s: Settings, places: Places, seeds: Seeds, weights: Sequence[Tensor], empty: list[Tensor]
) -> list[list[Tensor]]:
    """The gradient of both weights of every pair, right at empty bins."""
    problem, solution = _repeated(s, places, weights, empty)
    pairs = as_pairs(s.pairs)
    at_f, at_g = (
        [torch.where(empty[c], 0.0, _precise(t)) for t, c in zip(grads, side, strict=False)]
        for grads, side in zip((seeds.f, seeds.g), zip(*pairs, strict=True), strict=True)
    )
    operation, init = implementation(s.options.method), [_precise(v) for v in places.init]
    _, _, *found = operation.unrolled_backward(
        _precise(seeds.loss), at_f, at_g, *problem, init, solution[4], [], [], True
    )
    return found
