"""eps as a tensor: one number, or one for each problem of a batch, with its gradient.

Costs, eps and rho have one unit, so that for every t > 0

    OT(C, eps, rho) = t OT(C / t, eps / t, rho / t),

and likewise f and g. With t = eps over the number that it holds, which is 1 and has the derivative
of eps, a solve gets numbers, and its derivative in eps is one in its costs, exact in every mode:

    eps dOT/deps = OT - <P, C> - rho_x KL(P 1 | a) - rho_y KL(P' 1 | b) = eps KL(P | a b).

On a GPU, where eps is not read, t is eps and the solve gets 1.
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
from otloss.autograd.second_order import refuse_higher_order
from otloss.costs import degree
from otloss.problem import Problem
from otloss.reference.arguments import as_pairs
from otloss.reference.marginals import marginals_of

if TYPE_CHECKING:
    from otloss.run import Solved

__all__ = ["Scale", "ScaledValue", "check_shape", "detached", "of_rows", "scale_of"]

_SOFT = (
    "with unbalanced= the derivative in eps is available for the value of the regularized "
    'objective alone, by backward="envelope" or "implicit" and once: detach eps'
)


def detached(options: Options) -> Options:
    eps = options.eps
    return options._replace(eps=eps.detach()) if isinstance(eps, Tensor) else options


def of_rows(eps: float | Tensor, like: Tensor) -> float | Tensor:
    """eps as it multiplies potentials (B, n): a number, () or (B, 1), in the dtype of ``like``."""
    if not isinstance(eps, Tensor):
        return eps
    return (eps.unsqueeze(-1) if eps.dim() else eps).to(like)


def check_shape(eps: float | Tensor, problem: Problem) -> None:
    """Raises unless a tensor is one number, or one for each problem, where it can be used."""
    if not isinstance(eps, Tensor):
        return
    like = problem.weights[0]
    if eps.dim() and not (problem.batched and len(eps) == len(like)):
        expected = f"() or ({len(like)},)" if problem.batched else "()"
        raise ValueError(f"eps must have shape {expected} here, got {_check.describe(eps)}")
    if not (eps.is_cpu or eps.device == like.device):
        raise ValueError(
            f"eps must be on the CPU or the device of the clouds, {like.device}, got {eps.device}"
        )


def scale_of(problem: Problem, options: Options) -> Scale | None:
    """None where solves can take the options as they are."""
    eps, like = options.eps, problem.weights[0]
    if not isinstance(eps, Tensor):
        return None
    read = _is_read(eps, like)
    number = of_rows(eps.detach(), like) if read else 1.0
    if isinstance(number, Tensor) and _check.readable(eps) and eps.dim() == 0:
        number = eps.item()
    t = (eps / eps.detach() if read else eps).to(like.device)
    return Scale(t, read, options._replace(eps=number))


def _is_read(eps: Tensor, like: Tensor) -> bool:
    """Whether operations take it as it is: of a GPU they take one number on the CPU."""
    return eps.is_cpu and (like.is_cpu or eps.dim() == 0)


class Scale(NamedTuple):
    """From a problem to that of the same solution at an eps that is a number, and back."""

    t: Tensor  # () or (B,), float64
    is_one: bool
    options: Options  # with the eps that the solve gets

    def needs_potentials(self) -> bool:
        """Whether the derivative of the loss takes f and g."""
        return self.t.requires_grad and not self.options.balanced()

    def down(
        self, problem: Problem, costs: Sequence[Tensor] | None, init: Sequence[Tensor]
    ) -> tuple[Problem, Sequence[Tensor] | None, Sequence[Tensor]]:
        """The problem with its costs over t."""
        if self.is_one and not self.t.requires_grad:
            return problem, costs, init
        self._refuse(problem, init)
        if not self.is_one:
            init = [v / of_rows(self.t.detach(), v) for v in init]
        if costs is not None:
            return problem, [self.over(C) for C in costs], init
        centre = _centre(problem)
        factor = self.t.pow(-1 / degree(self.options.cost)) - 1
        points = []
        for x in problem.points:
            x = x.to(centre.dtype)
            from_centre = torch.where(x.isfinite(), x - centre, 0.0)  # padding may be anything
            points.append(x + from_centre * _of_entries(factor, x))
        return replace(problem, points=tuple(points)), None, init

    def over(self, C: Tensor) -> Tensor:
        """Costs over t."""
        return C + C * _of_entries(1 / self.t - 1, C)

    def up(
        self, solved: Solved, problem: Problem, pairs: list[int], coefficients: list[float]
    ) -> Solved:
        """The solution at eps, from that of the problem that ``down`` made."""
        if self.is_one and not self.t.requires_grad:
            return solved
        o, loss = self.options, solved.loss
        t = self.t.to(loss.dtype)
        potentials = [[v * of_rows(self.t, v) for v in each] for each in (solved.f, solved.g)]
        if o.balanced() or not self.t.requires_grad:
            loss = loss * t
        else:
            if o.objective == "regularized":
                loss = ScaledValue.apply(
                    loss, t, self.penalties(solved, problem, pairs, coefficients)
                )
            potentials = [refuse_higher_order(each, [t], _SOFT) for each in potentials]
        f, g = map(tuple, potentials)
        return replace(solved, loss=loss, f=f, g=g)

    def _refuse(self, problem: Problem, init: Sequence[Tensor]) -> None:
        """Raises for what has no such scale."""
        o = self.options
        if not self.is_one and (problem.present or not o.balanced()):
            what = "unbalanced=" if not o.balanced() else "weights that may be 0 and need gradients"
            raise NotImplementedError(
                f"eps as a tensor on a GPU, where it is not read, is not available with {what}: "
                "give a number or a tensor () on the CPU"
            )
        if self.t.requires_grad and o.follows_iterations() and init:
            raise NotImplementedError(
                "iterations of a given number from init= have no derivative in eps: detach it"
            )
        mode_lacks = o.follows_iterations() or o.solves_system()
        if self.t.requires_grad and not o.balanced() and mode_lacks:
            raise NotImplementedError(_SOFT)

    def penalties(
        self, solved: Solved, problem: Problem, pairs: list[int], coefficients: list[float]
    ) -> Tensor:
        """What the penalties add to the loss, like it: rho KL(P 1 | a) of every side."""
        o = self.options
        terms: list[Tensor] = []
        for p, (i, j) in enumerate(as_pairs(pairs)):
            x, y, _ = marginals_of(o.rho_x, o.rho_y, i, j)
            sides = (problem.weights[i], solved.f[p], x), (problem.weights[j], solved.g[p], y)
            of_x, of_y = (_penalty(*side) for side in sides)
            terms.append(coefficients[p] * (of_x + of_y))
        every = torch.stack(terms)
        return every if solved.loss.dim() == 2 else every.sum(0).reshape(solved.loss.shape)


def _of_entries(factor: Tensor, like: Tensor) -> Tensor:
    """() or (B,) for every entry of ``like``, (n, d) or (B, n, m)."""
    return (factor.reshape(-1, 1, 1) if factor.dim() else factor).to(like.dtype)


def _centre(problem: Problem) -> Tensor:
    """(1, d) or (B, 1, d), the mean of a cloud, in the dtype computed in.

    The derivative in eps is a sum over distances from it. From a centre far away that would be a
    small difference of large sums.
    """
    x, w = problem.points[0].detach(), problem.weights[0].detach().unsqueeze(-1)
    w = (w if problem.batched else w[0])[..., : x.shape[-2], :]  # without a dummy
    return torch.where(w > 0, w * x, 0.0).sum(-2, True) / w.sum(-2, True)


def _penalty(w: Tensor, f: Tensor, rho: float) -> Tensor:
    """rho KL(w exp(-f / rho) | w), (B,) in float64; 0 for a constraint."""
    w, u = w.detach().double(), f.detach().double() / rho
    kept = (-u).exp()
    return 0.0 * w.sum(-1) if math.isinf(rho) else rho * (w * (1 - kept - u * kept)).sum(-1)


class ScaledValue(torch.autograd.Function):
    """``(loss, t, penalties) -> t loss``, of which the penalties' part does not grow with t."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, t: Tensor, penalties: Tensor) -> Tensor:
        ctx.save_for_backward(loss, t, penalties)
        return loss * t

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        loss, t, penalties = ctx.saved_tensors
        of_t = (grad * (loss - penalties)).to(t.dtype).sum_to_size(t.shape)
        grads = refuse_higher_order([grad * t, of_t], [loss, t, grad], _SOFT)
        return *grads, None
