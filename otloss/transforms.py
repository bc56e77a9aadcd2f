"""The tensors of a call inside torch.func, by name, and what the call makes of them there.

Cost functions are called inside, since they may hold tensors of the transforms, such as parameters
that are differentiated; their matrices are tensors of the call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from otloss import _check, ops
from otloss._options import Options, check_eps
from otloss.autograd import Argument, through
from otloss.cost_matrices import call_cost, replaced
from otloss.reference.arguments import as_pairs
from otloss.result import OTResult

__all__ = ["ResultInside", "inside"]

Clouds = dict[str, Tensor]
Weights = dict[str, Tensor | None]


def inside(
    call: Callable[[Clouds, Weights, Options], tuple[Tensor, ...]],
    clouds: Clouds,
    weights: Weights,
    options: Options,
    pairs: list[int],
) -> tuple[Tensor, ...]:
    """``call(clouds, weights, options)`` inside torch.func. ``weights``, of clouds in their order,
    may have more vectors behind them."""

    def function(tensors: Clouds) -> tuple[Tensor, ...]:
        given = {k: tensors[k] for k in clouds}, {k: tensors.get(k) for k in weights}
        return call(*given, _options_of(options, tensors))

    return through(function, _named(clouds, weights, options, pairs))


def _named(
    clouds: Clouds, weights: Weights, options: Options, pairs: list[int]
) -> dict[str, Argument]:
    """Checks kinds and axes; all else is checked by the call."""
    eps, cost = options.eps, options.cost
    points = {k: _check.cloud(k, x) for k, x in clouds.items()}
    given = {k: _check.floating(k, w) for k, w in weights.items() if w is not None}
    matrices = dict[str, Argument]()
    if not isinstance(cost, str):
        dtype = _check.compute_dtype(*points.values(), *given.values())
        sides = itertools.zip_longest(points.values(), weights.values())
        ready = [_ready(x.to(dtype), w) for x, w in sides if x is not None]
        for p, (i, j) in enumerate(as_pairs(pairs)):
            C = call_cost(cost, ready[i], ready[j])
            matrices[f"costs {p}"] = Argument(C if ready[i].dim() == 3 else C[0], 2)
        points = {k: x.detach() for k, x in points.items()}
    return {
        **{k: Argument(x, 2, shared=k == "C" and len(given) > 0) for k, x in points.items()},
        **{k: Argument(w, 1) for k, w in given.items()},
        **({"eps": Argument(eps, 0)} if isinstance(eps, Tensor) else {}),
        **matrices,
    }


def _ready(x: Tensor, w: Tensor | None) -> Tensor:
    """A cloud with a real point in place of padding."""
    if w is None:
        return x
    w = w.detach() if w.dim() == 2 else w.detach().unsqueeze(0)
    return replaced(x, w, w > 0)


def _options_of(options: Options, tensors: Clouds) -> Options:
    """The options of the call itself."""
    matrices = [C for name, C in tensors.items() if name.startswith("costs ")]
    if matrices:
        method = "reference" if options.method == "reference" else "dense"
        options = options._replace(cost=_Given(matrices), method=method)
    return options._replace(eps=check_eps(tensors["eps"])) if "eps" in tensors else options


class _Given:
    """A cost function whose matrices, of pair after pair, were made before."""

    def __init__(self, matrices: Sequence[Tensor]) -> None:
        self.matrices = iter(matrices)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        C = next(self.matrices, None)
        if C is None:  # costs of empty bins, which have another real point in their place
            raise NotImplementedError(
                "inside torch.func weights of 0 have no gradient with a cost function: detach the "
                "weights, or use a cost by name"
            )
        return C


class ResultInside(OTResult):
    """The result of a solve inside torch.func: what the call itself returns."""

    def __init__(self, results: Sequence[Tensor]) -> None:
        self.value, f, g, status = results
        self.potentials = f, g
        self._status, self._reported = status.detach(), True

    @staticmethod
    def tensors_of(result: OTResult) -> tuple[Tensor, ...]:
        return result.value, *result.potentials, result._out(result._status)

    def _status_field(self, field: int) -> Tensor:
        return self._status[..., field]

    def _number(self, t: Tensor) -> Tensor:
        return t

    @property
    def marginal_error(self) -> Tensor:
        return self._status_field(ops.ERROR)

    def __repr__(self) -> str:
        return f"OTResult(value={self.value})"

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(
            "inside torch.func a result has value, potentials and how it converged: "
            "P = a_i b_j exp((f_i + g_j - C_ij) / eps) makes the plan of them"
        )
