"""What a solve is given: checked clouds and weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any, Final

import torch
from torch import Tensor

from otloss import _check, _options, ops

__all__ = [
    "Problem",
    "all_positive",
    "as_one_batch",
    "as_weights",
    "check_clouds",
]

LARGEST_KEPT: Final = 1 << 12  # entries of uniform weights that are kept from call to call


@dataclass
class Problem:
    """Checked clouds or cost matrices with their weights, batched."""

    names: tuple[str, ...]
    points: tuple[Tensor, ...]  # (n, d) or (B, n, d), or empty: costs are given
    weights: tuple[Tensor, ...]  # (B, n) each, in the dtype of the computation
    padded: bool  # some weight may be 0
    batched: bool
    # Where weights of 0 may want a gradient, else empty: what is no padding, (B, n) of each cloud,
    # and C (B, n, m) of each pair with the costs of empty bins, if costs are given.
    present: tuple[Tensor, ...] = ()
    seen: tuple[Tensor, ...] = ()

    def has_empty_bins(self) -> bool:
        """Whether a weight of 0 may want a gradient, as far as is known without stalling a device.

        A point of weight 0 is an empty bin if its costs are finite, else padding.
        """
        if not self.padded or not torch.is_grad_enabled():
            return False
        return any(w.requires_grad and not all_positive(w) for w in self.weights)

    def detached(self) -> Problem:
        points, weights = (tuple(t.detach() for t in ts) for ts in (self.points, self.weights))
        return replace(self, points=points, weights=weights)

    def of_pair(self, i: int, j: int) -> Problem:
        """The problem of clouds i and j alone."""
        present = (self.present[i], self.present[j]) if self.present else ()
        return replace(
            self,
            names=(self.names[i], self.names[j]),
            points=(self.points[i], self.points[j]),
            weights=(self.weights[i], self.weights[j]),
            present=present,
        )

    def of_rows(self, rows: slice | Tensor) -> Problem:
        """The problem of some points of the first cloud and all of the second."""
        (x, y), (a, b) = self.points, self.weights
        weights = (a[:, rows].contiguous(), b)
        present = tuple(p[:, r] for p, r in zip(self.present, (rows, slice(None)), strict=False))
        return replace(self, points=(x[..., rows, :], y), weights=weights, present=present)

    def reads(self, cost: Any) -> list[Tensor]:
        """What the costs are made from: points, and the parameters of a cost function."""
        return [*self.points, *(cost.parameters() if isinstance(cost, torch.nn.Module) else ())]

    def versions(
        self, C: Tensor | None, options: _options.Options, f: Tensor, g: Tensor
    ) -> list[tuple[str, Tensor, int]]:
        """The tensors that the caller has, the potentials too, under their names, and how often
        they have been changed in place."""
        if torch.compiler.is_compiling():
            return []
        names = chain(self.names, repeat("a parameter of cost"))
        named = [*zip(names, self.reads(options.cost), strict=False)]
        named += zip(("a", "b"), self.weights, strict=True)
        others = (("C", C), ("eps", options.eps), ("potential f", f), ("potential g", g))
        named += [(k, t) for k, t in others if isinstance(t, Tensor)]
        return [(k, t, t._version) for k, t in named if not t.is_inference()]

    def counted_weights(self) -> list[Tensor]:
        """The weights; those of padding are 0 and get gradient 0, in sums too."""
        present = self.present or [w > 0 for w in self.weights]
        return [torch.where(p, w, 0.0) for p, w in zip(present, self.weights, strict=True)]


def as_weights(w: Tensor | None, like: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """(B, n) weights, uniform if none were given."""
    if w is None:
        batch = like.shape[0] if like.dim() == 3 else 1
        kept = like.is_cpu and batch * n <= LARGEST_KEPT and ops.makes_plain_tensors()
        return (_kept_uniform if kept else _uniform)(batch, n, dtype, like.device)
    w = w if w.dim() == 2 else w.unsqueeze(0)
    w = w.expand(like.shape[0], n) if like.dim() == 3 else w
    return w.to(dtype).contiguous()


def _uniform(batch: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((batch, n), 1.0 / max(n, 1), dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _kept_uniform(batch: int, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept, because making one takes a few percent of a small call. Nobody writes to it."""
    with torch.inference_mode(False):
        return _uniform(batch, n, dtype, device)


def check_clouds(
    clouds: dict[str, Any],
    weights: dict[str, Any] | None = None,
    *,
    balanced: bool = True,
    parts: bool = False,
) -> Problem:
    """Checks clouds by name against the first, and the weights of the first two; ``parts``: they
    are parts of clouds, which may have no points, or none that counts."""
    _check.no_transforms()
    names, points = tuple(clouds), [_check.points_or_part(k, v, parts) for k, v in clouds.items()]
    named = weights or dict.fromkeys(names)
    given = [w for w in named.values() if w is not None]
    points = as_one_batch(points, given)
    first = points[0]
    for name, x in zip(names[1:], points[1:], strict=True):
        _check.same_space(names[0], first, name, x)
    if given:
        for (name, w), cloud, x in zip(named.items(), names, points, strict=True):
            if w is not None:
                _check.weights(name, w, tuple(x.shape[:-1]), cloud, x, parts)
    dtype = _check.compute_dtype(*points, *given)
    ready = [
        as_weights(w, x, x.shape[-2], dtype) for w, x in zip(named.values(), points, strict=True)
    ]
    if given and balanced:
        _check.same_mass(ready[0], ready[1], given)
    # Half precision is left as it is: operations convert it, and their gradients go back to it.
    double = dtype == torch.float64
    points = [x if (x.dtype == torch.float64) == double else x.to(dtype) for x in points]
    return Problem(names, tuple(points), tuple(ready), len(given) > 0, first.dim() == 3)


def as_one_batch(points: list[Tensor], weights: list[Any]) -> list[Tensor]:
    """Clouds or matrices that are a batch of one, once for each problem of the others."""
    batches = [len(x) for x in points if x.dim() == 3]
    if not batches:
        return points
    rows = [len(w) for w in weights if isinstance(w, Tensor) and w.dim() == 2]
    B = max(batches) if max(batches) > 1 else max([1, *rows])
    return [x.expand(B, -1, -1) if x.dim() == 3 and len(x) == 1 < B else x for x in points]


def all_positive(w: Tensor) -> bool:
    """Whether there is no padding, as far as is known without stalling a device."""
    return _check.readable(w) and bool((w > 0).all())
