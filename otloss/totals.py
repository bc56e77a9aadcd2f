"""Problems at unit totals, and the exact way back to the caller's totals; docs/totals.md has both.

With O the value and f1, g1 the potentials of a pair whose weights sum to 1, the caller's are
OT = mu (O + constant), f = f1 + shift, g = g1 + shift. These numbers are functions of the totals
alone, in double and differentiable: neither large totals nor a large eps take digits from what the
kernels compute, and what cancels in a divergence is left out of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from otloss import _check
from otloss._options import Options
from otloss.problem import Problem
from otloss.reference.arguments import as_pairs
from otloss.reference.marginals import ROUNDING, Marginals, clamped, marginals_of, snapped, total
from otloss.run import Solved

if TYPE_CHECKING:
    from otloss.combination import Combination

__all__ = ["Totals", "at_given_totals", "at_unit_totals"]


_SMALL, _LARGEST = 1e-2, 709.0  # where a series is exact, where an exponential is finite

# (B,) in float64, or a number where the totals of a single problem are known.
Number = Any


class Way(NamedTuple):
    """From a pair at unit totals to the caller's."""

    log_mu: Number  # the plan's total, of one whose total is 1
    constant: Number
    f: Number  # the shift of f
    g: Number


class Totals(NamedTuple):
    """How a problem differs from the one at unit totals."""

    logs: tuple[Number, Number]  # of the totals of both clouds
    weights: tuple[Tensor, ...]  # at unit totals
    options: Options

    @property
    def eps(self) -> Number:
        return _near(self.options.eps, self.weights[0])

    def ways(self, pairs: list[int]) -> list[Way]:
        o, found = self.options, []
        for i, j in as_pairs(pairs):
            way = _way(self.logs[i], self.logs[j], self.eps, marginals_of(o.rho_x, o.rho_y, i, j))
            if o.n_iters >= 0:  # g starts as it was given, and all the shift is in f
                way = way._replace(f=way.f + way.g, g=0.0 * way.g)
            found.append(way)
        return found

    def start(self, init: Sequence[Tensor], pairs: list[int]) -> list[Tensor]:
        """Potentials to start from, f and g of each pair in turn, at unit totals."""
        if not init:
            return []
        shifts = [-v for way in self.ways(pairs) for v in (way.f, way.g)]
        moved = [self._shifted(*each) for each in zip(init, shifts, pairs, strict=True)]
        return [v.detach() for v in moved]

    def back(self, solved: Solved, combination: Combination, *, batched: bool) -> Solved:
        """The solution at the caller's totals, from the terms (P, B) of one at unit totals."""
        pairs, coefficients, debiased = combination
        o, ways = self.options, self.ways(pairs)
        masses = [_exp(way.log_mu) for way in ways]
        scale = self._column(masses)
        terms = _Held.apply(solved.loss, scale) if o.holds_plan() else scale * solved.loss
        dtype = self.weights[0].dtype
        loss = terms.sum(0)
        if o.objective == "regularized" and debiased:
            loss = loss + self._between(ways)
        elif o.objective == "regularized":
            for c, mass, way in zip(coefficients, masses, ways, strict=True):
                loss = loss + c * mass * way.constant
        loss = clamped(loss, terms.detach().abs().sum(0), dtype).to(dtype)
        f, g = (
            tuple(
                self._shifted(v, getattr(way, name), c)
                for v, way, c in zip(getattr(solved, name), ways, pairs[side::2], strict=False)
            )
            for side, name in enumerate("fg")
        )
        return replace(solved, loss=loss if batched else loss[0], f=f, g=g)

    def _column(self, numbers: list[Number]) -> Tensor:
        """One for each pair, (P, B) or (P, 1)."""
        like = self.weights[0].double()
        each = [v if isinstance(v, Tensor) else like.new_tensor(v) for v in numbers]
        return torch.stack(torch.broadcast_tensors(*(v.reshape(-1) for v in each)))

    def _between(self, ways: list[Way]) -> Number:
        """What the totals add to a divergence: all of order eps m_a m_b has cancelled."""
        o, (ab, *own) = self.options, ways
        terms = [
            (self.eps + 2 * rho) * _phi(way.log_mu - ab.log_mu)
            for way, rho in zip(own, (o.rho_x, o.rho_y), strict=True)
            if not math.isinf(rho)
        ]
        return 0.5 * _exp(ab.log_mu) * sum(terms)

    def _shifted(self, v: Tensor, shift: Number, cloud: int) -> Tensor:
        by = shift.unsqueeze(-1) if isinstance(shift, Tensor) else shift
        moved = (v.double() + by).to(v.dtype)
        return torch.where(self.weights[cloud] > 0, moved, 0.0)


class _Held(torch.autograd.Function):
    """``(terms, scale) -> terms * scale`` where the plan is held constant, and with it its total.

    The scale has no gradient, but that of the terms, the plan, changes with it.
    """

    @staticmethod
    def forward(ctx: Any, terms: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return terms * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        return grad * scale, None


def at_unit_totals(problem: Problem, options: Options) -> tuple[Problem, Totals | None]:
    """The problem with its weights over their totals; None where these are 1.

    Iterations of a given number run at the totals they are given where these change them, or where
    they are differentiated one by one, in a and b each on its own.
    """
    fixed = options.n_iters >= 0 and (not options.balanced() or options.follows_iterations())
    if fixed or not problem.padded:
        return problem, None
    dtype, known = problem.weights[0].dtype, _check.readable(problem.weights[0])
    if known:
        near = ROUNDING * torch.finfo(dtype).eps
        sums = [w.detach().sum(-1, dtype=torch.float64).tolist() for w in problem.weights]
        if all(abs(one - 1) <= near for of_cloud in sums for one in of_cloud):
            return problem, None
    counted = problem.counted_weights()
    a, b = (total(w).squeeze(-1) for w in counted)
    b = snapped(b, a.detach(), dtype)
    weights = tuple(
        (w / mass.unsqueeze(-1)).to(dtype) for w, mass in zip(counted, (a, b), strict=True)
    )
    # Numbers, where they are all that is needed: some sixty small operations less.
    single = known and len(a) == 1 and not (a.requires_grad or b.requires_grad)
    logs = (math.log(a.item()), math.log(b.item())) if single else (a.log(), b.log())
    return replace(problem, weights=weights), Totals(logs, weights, options)


def at_given_totals(
    solved: Solved,
    problem: Problem,
    totals: Totals | None,
    combination: Combination,
    options: Options,
) -> Solved:
    """The solution of ``problem`` from that of the one that ``at_unit_totals`` made of it."""
    if totals:
        return totals.back(solved, combination, batched=problem.batched)
    term = _mass_term(problem, combination, options)
    if term is None:
        return solved
    term = term.to(solved.loss.dtype)
    return replace(solved, loss=solved.loss + (term if problem.batched else term[0]))


def _mass_term(problem: Problem, combination: Combination, o: Options) -> Tensor | None:
    """What the totals add to a loss whose problems were solved at them, (B,) in float64.

    A divergence has a term of its own. A balanced problem at totals of 1 lacks the gradient of
    -eps m log m, the part of OT(m a, m b) that is not linear in m.
    """
    if o.objective != "regularized" or not problem.padded:
        return None
    if not o.balanced():
        if not combination.debiased:
            return None
        a, b = (total(w).squeeze(-1) for w in problem.counted_weights())
        return 0.5 * _near(o.eps, a) * (a - b).square()
    sides = zip(combination.pairs, (c for c in combination.coefficients for _ in "ab"), strict=True)
    shares = [0.0] * len(problem.weights)
    for cloud, coefficient in sides:
        shares[cloud] += coefficient
    if not any(shares) or o.follows_iterations():
        return None
    if not any(w.requires_grad for w in problem.weights):
        return None
    masses = torch.stack([w.sum(-1, dtype=torch.float64) for w in problem.counted_weights()], -1)
    change = (masses - masses.detach()) @ masses.new_tensor(shares)
    return -0.5 * _near(o.eps, masses) * change


def _way(log_a: Number, log_b: Number, eps: Number, marginals: Marginals) -> Way:
    """With R = eps + rho_x + rho_y, each part of R in its limit where a side is a constraint."""
    rho_x, rho_y, balanced = marginals
    R = eps + rho_x + rho_y
    if math.isfinite(rho_x + rho_y):
        of_x, of_y, of_eps, both = rho_x / R, rho_y / R, eps / R, rho_x * rho_y / R
    elif rho_x == rho_y:  # and equal totals
        of_x, of_y, of_eps, both = 0.5, 0.5, 0.0, 0.0
    else:
        of_x, of_y, of_eps = float(math.isinf(rho_x)), float(math.isinf(rho_y)), 0.0
        both = min(rho_x, rho_y)
    log_mu = (of_eps + of_x) * log_a + (of_eps + of_y) * log_b
    f = both * (log_a - log_b) - of_x * eps * log_b
    g = both * (log_b - log_a) - of_y * eps * log_a
    if balanced:
        return Way(log_mu, -eps * log_mu, f, g)
    constant = eps * _phi(of_y * log_a + of_x * log_b)
    for v, rho in ((f, rho_x), (g, rho_y)):
        if not math.isinf(rho):
            constant = constant + rho * _phi(v / rho)
    return Way(log_mu, constant, f, g)


def _near(eps: Number, like: Tensor) -> Number:
    return eps.to(like.device) if isinstance(eps, Tensor) else eps


def _exp(u: Any) -> Any:
    return u.exp() if isinstance(u, Tensor) else math.exp(min(u, _LARGEST))


def _phi(u: Any) -> Any:
    """e^u - 1 - u."""
    series = u * u / 2 * (1 + u / 3 * (1 + u / 4 * (1 + u / 5)))
    if isinstance(u, Tensor):
        return torch.where(u.abs() < _SMALL, series, u.expm1() - u)
    return series if abs(u) < _SMALL else math.expm1(min(u, _LARGEST)) - u
