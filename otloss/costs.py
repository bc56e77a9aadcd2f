"""The costs: one class each, with its number, formula, gradient and bound.

A new cost is a class here, in the list ``NAMED``, and a functor in csrc/core/costs.h. Names,
numbers and the plain versions of everything computed from points come from these classes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

__all__ = [
    "COSTS",
    "NAMED",
    "Cost",
    "NamedCost",
    "degree",
    "full_precision",
    "product",
    "subtracted",
    "without_padding",
]

# A cost is a name below or a function (x, y) -> C with x (n, d), y (m, d), C (n, m), batched where
# x and y are.
Cost = str | Callable[[Tensor, Tensor], Tensor]


class NamedCost:
    """c(x_i, y_j) between clouds x (B, n, d) and y (B, m, d). All methods but ``bound`` and
    ``is_zero_to_itself`` are differentiable."""

    name: ClassVar[str]
    number: ClassVar[int]  # of the functor: `CostKind` in csrc/core/costs.h
    degree: ClassVar[int]  # of t in c(t x, t y)
    subtracted: ClassVar[float] = 0.0  # what a cost is the difference of: it has that rounding

    def between(self, x: Tensor, y: Tensor) -> Tensor:
        """C (B, n, m)."""
        raise NotImplementedError

    def gradient(self, W: Tensor, C: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """sum_ij W_ij c(x_i, y_j) differentiated in x and in y, by matrix products; W, C (B, n, m).

        C is the cost itself, for gradients that depend on it.
        """
        raise NotImplementedError

    def bound(self, x: Tensor, y: Tensor) -> Tensor:
        """No c(x_i, y_j) is larger; (B,), NaN where a point is NaN."""
        raise NotImplementedError

    def is_zero_to_itself(self, x: Tensor) -> Tensor:
        """Which points have c(x_i, x_i) = 0, (B, n): exactly, whatever rounding makes of it."""
        return torch.ones_like(x[..., 0], dtype=torch.bool)

    def gaussian_potential(
        self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: float
    ) -> Tensor | None:
        """The potential g on y (m, d) between the Gaussians fitted to x (n, d) and y, if it has a
        closed form."""
        return None


class SqEuclidean(NamedCost):
    """|x - y|^2, without 1/2."""

    name, number, degree = "sqeuclidean", 0, 2

    def between(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)

    def gradient(self, W: Tensor, C: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return _difference_gradient(2 * W, x, y)

    def bound(self, x: Tensor, y: Tensor) -> Tensor:
        return (_largest_norm(x) + _largest_norm(y)).square()

    def gaussian_potential(
        self, x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: float
    ) -> Tensor | None:
        """Janati, Muzellec, Peyré, Cuturi 2020, in float64; see docs/solver.md."""
        mean_x, A = _moments(x.double(), a.double())
        mean_y, B = _moments(y.double(), b.double())
        if not bool((A @ A @ B).isfinite().all()):
            return None
        root, e = _square_root(A), eps / 2
        values, vectors = torch.linalg.eigh(root @ B @ root)
        inverse = 1 / ((values.clamp(min=0) + e * e / 4).sqrt() + e / 2)
        factor = root @ vectors
        z = y.double() - mean_y
        image = z - (z @ factor * inverse) @ factor.mT
        g = (z * image).sum(-1) + 2 * z @ (mean_y - mean_x)
        return torch.where(b > 0, g.to(b), 0.0)


class Euclidean(NamedCost):
    """|x - y|, with gradient 0 where x = y."""

    name, number, degree = "euclidean", 1, 1

    def between(self, x: Tensor, y: Tensor) -> Tensor:
        return _root((x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1))

    def gradient(self, W: Tensor, C: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        counted = (C > 0) & (W != 0)
        V = torch.where(counted, W / torch.where(counted, C, 1.0), 0.0)
        return _difference_gradient(V, x, y)

    def bound(self, x: Tensor, y: Tensor) -> Tensor:
        return _largest_norm(x) + _largest_norm(y)


class Cosine(NamedCost):
    """1 - <x, y> / (|x| |y|); 1 with gradient 0 for a point of norm 0."""

    name, number, degree, subtracted = "cosine", 2, 0, 1.0

    def between(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 - product(_unit(x), _unit(y).mT)

    def gradient(self, W: Tensor, C: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._tangent(W, x, y), self._tangent(W.mT, y, x)

    def bound(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 + 0 * (_largest_norm(x) + _largest_norm(y))

    def is_zero_to_itself(self, x: Tensor) -> Tensor:
        return x.ne(0).any(-1)

    @staticmethod
    def _tangent(W: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The gradient in x: (<Wy, x^> x^ - Wy) / |x| with y and x^ of norm 1."""
        unit, image, norm = _unit(x), product(W, _unit(y)), _norm(x)
        tangent = (image * unit).sum(-1, keepdim=True) * unit - image
        return torch.where(norm > 0, tangent / torch.where(norm > 0, norm, 1.0), 0.0)


NAMED: Final[tuple[NamedCost, ...]] = (SqEuclidean(), Euclidean(), Cosine())  # by number
COSTS: Final[dict[str, int]] = {cost.name: cost.number for cost in NAMED}


def subtracted(cost: Cost) -> float:
    return NAMED[COSTS[cost]].subtracted if isinstance(cost, str) else 0.0


def degree(cost: Cost) -> int:
    """Of t in c(t x, t y); 0 for a function, of which that is not known."""
    return NAMED[COSTS[cost]].degree if isinstance(cost, str) else 0


def full_precision(t: Tensor) -> AbstractContextManager[Any]:
    """Where matrix products keep the dtype of ``t``, under autocast too."""
    kind = t.device.type
    # which torch 2.10 cannot be asked while it traces
    has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if has_autocast else nullcontext()


def product(A: Tensor, B: Tensor) -> Tensor:
    """A @ B of matrices or batches of them, in their own dtype under autocast too, and likewise its
    derivatives, which may be taken there."""
    found: Tensor = _Product.apply(A, B)
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(A, B)
        with full_precision(A):
            return A @ B

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (A, B), (of_A, of_B) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            product(grad, B.mT).sum_to_size(A.shape) if of_A else None,
            product(A.mT, grad).sum_to_size(B.shape) if of_B else None,
        )


def without_padding(points: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Points of weight 0 moved to 0: what is there, NaN included, must not matter."""
    if not weights:
        return points
    return [torch.where(w.unsqueeze(-1) > 0, x, 0.0) for x, w in zip(points, weights, strict=True)]


def _root(squared: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0."""
    positive = squared != 0  # NaN stays
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def _norm(x: Tensor) -> Tensor:
    """(..., 1); squares of small points do not underflow."""
    least = torch.finfo(x.dtype).tiny
    largest = x.detach().abs().amax(-1, keepdim=True)
    scale = torch.where((largest > 0) & (largest < 1), largest.clamp(min=least), 1.0)
    return scale * _root((x / scale).square().sum(-1, keepdim=True))


def _unit(x: Tensor) -> Tensor:
    """Points scaled to norm 1; 0 stays 0."""
    norm = _norm(x)
    return torch.where(norm != 0, x / torch.where(norm != 0, norm, 1.0), 0.0)


def _largest_norm(x: Tensor) -> Tensor:
    return x.square().sum(-1).amax(-1).sqrt()


def _difference_gradient(V: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j V_ij (x_i - y_j) and sum_i V_ij (y_j - x_i), about the clouds' mean: less rounding."""
    with torch.no_grad():
        centre = torch.cat([x, y], dim=1).mean(dim=1, keepdim=True)
    x, y = x - centre, y - centre
    grad_x = x * V.sum(-1).unsqueeze(-1) - product(V, y)
    grad_y = y * V.sum(-2).unsqueeze(-1) - product(V.mT, x)
    return grad_x, grad_y


def _moments(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of a cloud (n, d) with weights (n,)."""
    w = w / w.sum()
    mean = w @ x
    z = x - mean
    return mean, (w[:, None] * z).mT @ z


def _square_root(A: Tensor) -> Tensor:
    """Of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(A)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
