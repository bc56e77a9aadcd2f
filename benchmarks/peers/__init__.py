"""The peers that otloss is measured against: one module each, found by their file name.

A peer module defines

    available() -> tuple[bool, str]    whether it can run here, and if not, why
    version() -> str

and any of the functions below; a suite skips the peers that lack its function. Each function
states the peer's own conventions once, so that suites only ever see those of otloss
(``C = |x-y|^2`` without the 1/2, absolute ``eps``, ``S`` and ``dS/dx``).

    iteration(C, eps) -> list[IterationVariant]
        Fixed numbers of full Sinkhorn iterations on a given float32 cost, uniform weights.
    overhead(problem, n_iters) -> list[Variant]
        Value and x-gradient of the Sinkhorn divergence after about ``n_iters`` iterations.
    divergence(problem) -> list[Variant]
        The same to a wanted accuracy: for each way to use the peer (a family) a ladder of settings
        from the cheapest to the most exact, in steps of at most a third more work; ``STEP`` is
        the ratio where a setting is a number. Empty if the peer cannot solve the problem.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from benchmarks.workloads import Problem

ValueAndGradient = tuple[Tensor, Tensor]

STEP = 1.15  # between numbers of iterations
TOLERANCES = tuple(10 ** (-k / 8) for k in range(49))  # 1 to 1e-6
LARGEST_MATRIX = 1 << 26  # entries: peers that store costs do not try more


@dataclass(frozen=True)
class Variant:
    """One way to call a peer; the whole of ``call`` is timed."""

    label: str
    call: Callable[[], ValueAndGradient]
    family: str = ""
    # Log-sum-exp reductions over all pairs of the problem between the two clouds, as `call` does.
    passes: Callable[[], int] | None = None


def storable(problem: Problem) -> bool:
    """Whether the problem's cost matrix is of a size that peers which store it are asked to."""
    n, m = problem.sizes
    return n * m <= LARGEST_MATRIX


@dataclass(frozen=True)
class IterationVariant:
    """One way to run a fixed number of iterations; only ``run`` is timed."""

    label: str
    run: Callable[[int], Any]
    # The result of `run` as potentials (f, g) in otloss's conventions, up to (f + t, g - t).
    potentials: Callable[[Any], tuple[Tensor, Tensor]]
    # Which potential an iteration updates first: same work, different iterates.
    first: str = "f"
    # Only the fastest variant of a family is measured in full.
    family: str = ""
    # Pairs of iteration counts whose time difference gives the time per iteration. A peer with
    # work that is not in every iteration may offer several; the fastest result counts.
    pairs: tuple[tuple[int, int], ...] = ((10, 50),)


def names() -> list[str]:
    """Every peer that has a file here, otloss first."""
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return sorted(found, key=lambda name: name != "otloss")


def load(wanted: list[str] | None = None) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Import the wanted peers: those that can run, and the reasons of those that cannot."""
    usable: dict[str, ModuleType] = {}
    skipped: dict[str, str] = {}
    for name in wanted or names():
        module = importlib.import_module(f"{__name__}.{name}")
        ok, reason = module.available()
        if ok:
            usable[name] = module
        else:
            skipped[name] = reason
    return usable, skipped


def importable(module: str) -> tuple[bool, str]:
    """The usual ``available()``: can the peer's package be imported?"""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return False, f"{module} cannot be imported: {error}"
    return True, ""
