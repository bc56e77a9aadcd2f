"""otloss itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import (
    TOLERANCES,
    IterationVariant,
    ValueAndGradient,
    Variant,
    importable,
)
from benchmarks.workloads import Problem

MAX_ITERS = 20_000


def available() -> tuple[bool, str]:
    return importable("otloss")


def version() -> str:
    import otloss

    return otloss.__version__


def iteration(C: Tensor, eps: float) -> list[IterationVariant]:
    import otloss

    def run(k: int) -> Any:
        with torch.no_grad():
            return otloss.solve(C, eps, n_iters=k).potentials

    return [IterationVariant("otloss", run, tuple)]


def _value_and_gradient(problem: Problem, **options: Any) -> ValueAndGradient:
    import otloss

    x = problem.x.detach().requires_grad_()
    weights = {} if problem.uniform else {"a": problem.a, "b": problem.b}
    value = otloss.sinkhorn_divergence(
        x, problem.y, problem.eps, cost=problem.cost, **weights, **options
    )
    return value.detach(), torch.autograd.grad(value, x)[0]


def overhead(problem: Problem, n_iters: int) -> list[Variant]:
    def call(**options: Any) -> partial[ValueAndGradient]:
        return partial(_value_and_gradient, problem, **options)

    return [
        Variant("otloss, envelope", call(n_iters=n_iters, backward="envelope")),
        Variant("otloss, unrolled", call(n_iters=n_iters)),
        Variant("otloss, default call", call()),
    ]


def _sweeps(problem: Problem, tol: float) -> int:
    import otloss

    options: dict[str, Any] = {"cost": problem.cost, "tol": tol, "max_iters": MAX_ITERS}
    if not problem.uniform:
        options |= {"a": problem.a, "b": problem.b}
    with torch.no_grad():
        return int(otloss.solve_sample(problem.x, problem.y, problem.eps, **options).n_iters)


def divergence(problem: Problem) -> list[Variant]:
    def at(tol: float) -> Variant:
        call = partial(_value_and_gradient, problem, tol=tol, max_iters=MAX_ITERS)
        return Variant(f"tol={tol:.2g}", call, passes=lambda: 2 * _sweeps(problem, tol))

    ladder = [at(tol) for tol in TOLERANCES]
    return [Variant("default", partial(_value_and_gradient, problem), "default"), *ladder]
