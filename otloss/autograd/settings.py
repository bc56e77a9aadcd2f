"""What the nodes of a solve carry, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Final, NamedTuple

import torch
from torch import Tensor

from otloss import ops
from otloss._options import OBJECTIVES, Options
from otloss.costs import COSTS
from otloss.reference import operations
from otloss.reference.arguments import Arguments
from otloss.target import SelfProblem

__all__ = [
    "Gradients",
    "Inputs",
    "Places",
    "Seeds",
    "Settings",
    "Wanted",
    "batched",
    "implementation",
    "mode",
    "unbatched",
]

HALF: Final = (torch.float16, torch.bfloat16)


class Settings(NamedTuple):
    """What a solve is told besides tensors, as plain values that the tracer understands."""

    pairs: list[int]  # flat: [i0, j0, i1, j1, ...]
    coefficients: list[float]  # the loss is the sum of coefficient * value over the pairs
    options: Options
    potentials: bool  # whether f and g are outputs, differentiable
    trace: bool  # keep the potentials of every iteration
    dense: bool  # store cost matrices made from points
    combined: bool  # return the loss, not its terms
    batched: bool  # the loss is (B,), not ()
    single: bool  # operations get single clouds (n, d) as they are: no view takes time
    eps: Tensor  # made once for both passes, like rho, from the options
    rho: Tensor | None
    tol: Tensor
    live: Sequence[int] = ()  # the pairs that a gradient flows through
    target: SelfProblem | None = None  # the last pair, where its solution is kept
    system: list[Tensor] | None = None  # receives the status of the implicit gradient's system
    places: Places | None = None  # where weights can be those of empty bins, and are differentiated

    def of_live(self) -> Settings:
        """Those of the pairs that a gradient flows through."""
        pairs = [c for p in self.live for c in self.pairs[2 * p : 2 * p + 2]]
        coefficients = [self.coefficients[p] for p in self.live]
        places = self.places.of_pairs(self.live) if self.places else None
        return Settings(pairs, coefficients, *self[2:-1], places)

    def packs(self) -> bool:
        """Whether a solve may pack its results: nothing but the envelope gradient reads them."""
        return (
            self.single
            and self.dense
            and not (self.potentials or self.trace)
            and self.of_value() == "envelope"
            and not (self.target and self.target.is_wanted())
        )

    def of_value(self) -> str:
        """Which gradient that of the value is: the implicit one is that at fixed potentials."""
        chosen = self.options.gradient()
        exact = chosen == "implicit" and self.options.objective == "regularized"
        return "envelope" if exact else chosen

    def arguments(self, inputs: Inputs) -> Arguments:
        """What the operations take of a set of problems."""
        o, (costs, points, weights, _) = self.options, inputs
        kind = COSTS[str(o.cost)] if points else 0
        multiscale = o.method == "multiscale" and len(points) > 0
        modes = OBJECTIVES.index(o.objective), o.precision == "tf32", multiscale
        clouds = points, weights, self.pairs, kind
        return Arguments(costs, *clouds, self.coefficients, self.eps, self.rho, *modes)


class Places(NamedTuple):
    """What stands at points of weight 0, which the operations do not see: costs or points."""

    costs: list[Tensor]  # (B, n, m) per pair, none of them hidden, or none
    points: list[Tensor]  # (B, n, d) per cloud, or none
    init: list[Tensor]  # f and g of each pair in turn, or none
    present: list[Tensor]  # of each cloud what is no padding, (B, n)

    def of_pairs(self, pairs: Sequence[int]) -> Places:
        costs, init = _of_pairs(self, pairs)
        return Places(costs, self.points, init, self.present)


class Inputs(NamedTuple):
    """Tensors that a solve starts from, as the operations take them."""

    costs: list[Tensor]  # (B, n, m) or (1, n, m) per pair, or none
    points: list[Tensor]  # (B, n, d) per cloud, or none
    weights: list[Tensor]  # (B, n) per cloud
    init: list[Tensor]  # f and g of each pair in turn, or none

    def of_pairs(self, pairs: Sequence[int]) -> Inputs:
        if not (self.costs or self.init):
            return self
        costs, init = _of_pairs(self, pairs)
        return Inputs(costs, self.points, self.weights, init)


def _of_pairs(tensors: Places | Inputs, pairs: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    costs = [tensors.costs[p] for p in pairs] if tensors.costs else []
    return costs, [v for p in pairs for v in tensors.init[2 * p : 2 * p + 2]]


class Seeds(NamedTuple):
    """Gradients of what a solve returned."""

    loss: Tensor  # (B,), or (P, B) where every pair has its own
    f: list[Tensor]  # per pair, or none
    g: list[Tensor]

    def of_pairs(self, pairs: Sequence[int]) -> Seeds:
        if self.loss.dim() < 2 and not self.f:
            return self
        loss = self.loss if self.loss.dim() < 2 else self.loss[list(pairs)]
        return Seeds(loss, *([each[p] for p in pairs if each] for each in (self.f, self.g)))

    def of_value(self, p: int) -> Tensor:
        """(B,) of coefficient * value of pair p."""
        return self.loss if self.loss.dim() == 1 else self.loss[p]


class Wanted(NamedTuple):
    costs: list[int]  # pairs
    points: list[int]  # clouds
    weights: list[bool]  # of each cloud


class Gradients(NamedTuple):
    """What is wanted, in that order; of weights None where they are not."""

    costs: Sequence[Tensor]
    points: Sequence[Tensor]
    weights: list[Tensor | None]


def implementation(method: str) -> ModuleType:
    """Where the operations are."""
    return operations if method == "reference" else ops


def batched(x: Tensor) -> Tensor:
    """(B, n, d), contiguous, in the dtype that is computed in."""
    if x.dim() == 2:
        x = x.unsqueeze(0)
    if x.dtype in HALF:
        x = x.float()
    return x.contiguous()


def unbatched(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of ``x`` from that of ``batched(x)``."""
    grad = grad if grad.dim() == x.dim() else grad.view_as(x)
    return grad if grad.dtype == x.dtype else grad.to(x.dtype)


def mode(s: Settings, seeds: Seeds) -> str:
    """Which gradient it is."""
    return s.options.gradient() if seeds.f else s.of_value()
