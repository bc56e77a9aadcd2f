"""What a loss does with its clouds, kept for calls that are alike.

Checks, uniform weights, the method and the settings follow from the options and from the kind of
the clouds: shape, dtype, whether they have gradients. Of a small loss they take a fifth of the
time, and of a minibatch of images some percent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from otloss import method, ops
from otloss._options import Options
from otloss.autograd import Settings
from otloss.problem import LARGEST_KEPT, Problem

if TYPE_CHECKING:
    from otloss.combination import Combination

__all__ = ["KnownCall", "keep", "kind_of_call", "known_call"]

MOST_KEPT: Final = 256  # calls
DTYPES: Final = {torch.float32, torch.float64}


class KnownCall(NamedTuple):
    """Of a call without weights and cost matrices."""

    weights: tuple[Tensor, ...]  # uniform, (1, n) each
    settings: Settings

    def problem(self, clouds: dict[str, Tensor]) -> Problem:
        return Problem(tuple(clouds), tuple(clouds.values()), self.weights, False, False)


_calls: dict[Any, KnownCall] = {}


def kind_of_call(
    clouds: dict[str, Any],
    weights: dict[str, Tensor | None],
    combination: Combination,
    options: Options,
) -> Any:
    """All that what is kept depends on; None where data or another tensor has a say, too.

    Clouds of up to ``LARGEST_KEPT`` points are too small for the engine that a look at the points
    decides on, unless it is asked for by name.
    """
    if not ops.makes_plain_tensors() or any(w is not None for w in weights.values()):
        return None
    if not (isinstance(options.eps, float) and isinstance(options.cost, str)):
        return None
    if options.method == "multiscale" or forward_ad._current_level >= 0:
        return None
    kind = [options, torch.is_grad_enabled(), method.dense_budget]
    kind += [*combination.pairs, *combination.coefficients]
    dtypes = set()
    for x in clouds.values():
        plain = type(x) is Tensor or type(x) is torch.nn.Parameter
        if not plain or x.is_nested or x.layout != torch.strided or not x.is_cpu:
            return None
        shape, dtype = x.shape, x.dtype
        if len(shape) != 2 or shape[0] > LARGEST_KEPT or not x.is_contiguous():
            return None
        dtypes.add(dtype)
        kind += shape, dtype, x.requires_grad
    as_they_are = len(dtypes) == 1 and dtypes <= DTYPES
    return tuple(kind) if as_they_are else None


def known_call(kind: Any) -> KnownCall | None:
    return None if kind is None else _calls.get(kind)


def keep(kind: Any, problem: Problem, settings: Settings) -> None:
    """For calls of this kind."""
    if len(_calls) >= MOST_KEPT:
        _calls.clear()
    _calls[kind] = KnownCall(problem.weights, settings._replace(target=None))
