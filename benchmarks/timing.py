"""Timing of several calls against one another: interleaved, repeated, with robust statistics."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)

FEWEST = 3

# CPU time leaves out the spells in which a busy machine runs other processes. It counts every
# thread of this process: use it with one thread, where it is wall time on an idle machine.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Timer:
    """A clock, and the device to wait for before reading it."""

    device: torch.device
    clock: str = "wall"

    def seconds(self, call: Call, count: int = 1) -> float:
        """Mean seconds of ``count`` calls in a row."""
        read = CLOCKS[self.clock]
        self._wait()
        start = read()
        for _ in range(count):
            call()
        self._wait()
        return (read() - start) / count

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _calls_per_sample(call: Call, shortest: float, timer: Timer, once: float | None) -> int:
    """How many calls make a sample that lasts: a clock read costs, and so does a cold cache."""
    if once is None or once < shortest:
        once = timer.seconds(call)
    if once < 1:
        once = min(once, timer.seconds(call))
    return max(1, min(1000, round(shortest / max(once, 1e-9))))


def interleaved(
    calls: dict[Key, Call],
    repetitions: int,
    timer: Timer,
    shortest: float = 2e-2,
    budget: float = 20.0,
    seed: int = 0,
    expected: dict[Key, float] | None = None,
) -> dict[Key, np.ndarray]:
    """Seconds per call, ``repetitions`` samples of each, in rounds of shuffled order.

    Every round times every call once, so that a busy spell of the machine hits all of them; the
    warm-up calls that set the sample length are not counted. A call that has used up
    ``budget`` seconds leaves the later rounds, but not before the third; one that is ``expected``
    to last longer than that is made once.
    """
    expected = expected or {}
    counts = {
        key: _calls_per_sample(call, shortest, timer, expected.get(key))
        for key, call in calls.items()
    }
    fewest = {key: 1 if expected.get(key, 0) > budget else FEWEST for key in calls}
    samples: dict[Key, list[float]] = {key: [] for key in calls}
    order, rng = list(calls), random.Random(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repetitions):
            rng.shuffle(order)
            for key in order:
                if len(samples[key]) < fewest[key] or sum(samples[key]) * counts[key] < budget:
                    samples[key].append(timer.seconds(calls[key], counts[key]))
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {key: np.asarray(values) for key, values in samples.items()}


def statistics(samples: np.ndarray, scale: float = 1.0) -> dict[str, float]:
    """Median, quartiles and minimum, times ``scale``."""
    q1, median, q3 = (np.quantile(samples, q) * scale for q in (0.25, 0.5, 0.75))
    return {
        "median": float(median),
        "q1": float(q1),
        "q3": float(q3),
        "min": float(samples.min() * scale),
        "repetitions": len(samples),
    }


def copy_call(nbytes: int, device: torch.device) -> Call:
    """A copy of ``nbytes`` from one buffer to another: 2 ``nbytes`` of traffic."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    return copy
