"""Exchanges between the processes (ranks) of one call: what one of them raises, all raise.

All ranks make the exchanges of a call in the same order. What a rank computes for one of them it
computes inside of it, so that an error there still takes part: it says that it failed, then all say
what happened. A rank that has died breaks the connection or the group's time limit instead.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "Shard"]

Own = TypeVar("Own")
Told = TypeVar("Told")
REFUSALS = (ValueError, TypeError, NotImplementedError)  # stay what they are on the other ranks


class Ranks:
    """The processes of a group, within ``exchanging``."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group must contain this process: only its ranks may call")
        self._noted: list[Callable[[], Any]] = []

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Signals wait for the next exchange, or for the end: what a handler raises between two of
        them would leave the other ranks waiting."""
        handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            own = {number: signal.getsignal(number) for number in signal.valid_signals()}
            handlers = {number: handler for number, handler in own.items() if callable(handler)}

        def note(number: int, frame: Any) -> None:
            self._noted.append(lambda: handlers[number](number, frame))

        try:
            for number in handlers:
                signal.signal(number, note)
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self._handle_signals()

    def _handle_signals(self) -> None:
        while self._noted:
            self._noted.pop(0)()

    def agree(self, make: Callable[[], tuple[Own, Told]]) -> tuple[Own, list[Told]]:
        """What ``make`` gives: the first part, for this rank alone, and the second of all ranks."""
        made: Any = None
        told: Any = None
        failure: Any = None
        error: BaseException | None = None
        try:
            self._handle_signals()
            made, told = make()
        except BaseException as raised:
            kind = next((kind for kind in REFUSALS if isinstance(raised, kind)), RuntimeError)
            name = f"{type(raised).__name__}: " if kind is RuntimeError else ""
            failure, error = (kind, f"{name}{raised}"), raised
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, (told, failure), group=self.group)
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(found):
            if failure is not None:
                kind, message = failure
                raise kind(f"on rank {rank} of the group: {message}")
        return made, [told for told, _ in found]

    def sum(self, whole: Tensor, fill: Callable[[Tensor], Any]) -> Tensor:
        """The sum over the ranks of ``whole``, zeros, of which each fills its part.

        A sum with zeros is exact, takes parts of any size, and exists in every backend.
        """
        message, error = whole.new_zeros(whole.numel() + 1), None
        try:
            self._handle_signals()
            fill(message[1:].view_as(whole))
        except BaseException as raised:
            message[0], error = 1, raised
        dist.all_reduce(message, group=self.group)
        if message[0] > 0:
            self.agree(lambda: _raise(error))
        return message[1:].view_as(whole)


def _raise(error: BaseException | None) -> tuple[None, None]:
    if error is not None:
        raise error
    return None, None


class Shard(NamedTuple):
    """Which entries of a whole tensor, along one dimension, are this rank's."""

    ranks: Ranks
    first: int
    size: int
    total: int

    @staticmethod
    def of(ranks: Ranks, sizes: list[int]) -> Shard:
        """From the number of entries on each rank."""
        return Shard(ranks, sum(sizes[: ranks.rank]), sizes[ranks.rank], sum(sizes))

    def own(self, whole: Tensor, dim: int = -1) -> Tensor:
        return whole.narrow(dim, self.first, self.size)

    def gather(self, part: Tensor, dim: int = -1) -> Tensor:
        """The whole tensor, from the parts of all ranks."""
        shape = [*part.shape]
        shape[dim] = self.total
        return self.ranks.sum(part.new_zeros(shape), lambda whole: self.own(whole, dim).copy_(part))
