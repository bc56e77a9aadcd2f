"""A target that stays from call to call, and the solution of its self problem OT(b, b)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SelfProblem", "Target"]


class SelfProblem:
    """OT(b, b) of one cloud, kept from the second call on that it stays for: a copy of a fresh
    minibatch takes some percent of a call."""

    def __init__(self, of: Sequence[tuple[Any, int]], settings: Any) -> None:
        self.of = of  # the tensors, weakly, and how often they had been changed in place
        # What they held, once they have come again: changes through NumPy or .data are not counted.
        self.copies: list[Any] | None = None
        self.settings = settings  # what else the solution depends on
        self.solution: Tensor | None = None  # (B, m + 5): the potential, the status

    def is_of(self, tensors: Sequence[Any], settings: tuple[Any, ...]) -> bool:
        same = self.settings == settings and all(
            ref() is t and (t is None or version == t._version)
            for (ref, version), t in zip(self.of, tensors, strict=True)
        )
        if same and self.copies is None:
            self.copies = [None if t is None else t.detach().clone() for t in tensors]
        return same and all(
            t is copy is None or torch.equal(t, copy)
            for t, copy in zip(tensors, self.copies or (), strict=True)
        )

    def is_wanted(self) -> bool:
        return self.solution is None and self.copies is not None

    def keep(self, f: Tensor, status: Tensor) -> None:
        """Takes f (B, m) and status (B, 5) of a call, where ``is_wanted``."""
        self.solution = torch.cat([f.double(), status], dim=-1)


class Target:
    """The self problem of the last cloud that a loss was given as its target.

    It is solved again for another tensor, or if this one was changed in place, and forgotten with
    the tensor.
    """

    def __init__(self) -> None:
        self._last: SelfProblem | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of a module starts without
        return Target, ()

    def self_problem(
        self, y: Tensor, weights: Sequence[Tensor | None], *settings: Any
    ) -> SelfProblem:
        """``settings``: all else that the solution depends on, to the last bit."""
        tensors, last = (y, *weights), self._last
        if last is None or not last.is_of(tensors, settings):
            owner = weakref.ref(self)

            def forget(_: Any) -> None:
                target = owner()
                if target is not None and target._last is last:
                    target._last = None

            of = [(_absent, 0) if t is None else (weakref.ref(t), t._version) for t in tensors]
            of[0] = weakref.ref(y, forget), y._version
            last = self._last = SelfProblem(of, settings)
        return last


def _absent() -> None:
    return None
