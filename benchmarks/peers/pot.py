"""POT (Python Optimal Transport): log-domain and kernel-domain Sinkhorn.

``ot.solve_sample(..., reg_type="KL", debias=True)`` is S exactly, with the cost |x-y|^2.
POT's stopping test is the L2 norm of the marginal's violation, tested every ten iterations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import IterationVariant, ValueAndGradient, Variant, importable
from benchmarks.reference import cost_matrix
from benchmarks.workloads import Problem

# POT tests the stopping criterion at iterations 0, 10, 20, ...; the time between 2 and 10
# iterations holds no test at all, which is the reading most favourable to POT.
PAIRS = ((10, 50), (2, 10))
TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 1e-7)
MAX_ITERS = 5000


def available() -> tuple[bool, str]:
    return importable("ot")


def version() -> str:
    import ot

    return ot.__version__


def iteration(C: Tensor, eps: float) -> list[IterationVariant]:
    import ot

    n, m = C.shape
    a, b = C.new_full((n,), 1 / n), C.new_full((m,), 1 / m)
    torch_data = (a, b, C)
    numpy_data = tuple(t.cpu().numpy() for t in torch_data)

    def run(k: int, solver: Callable[..., Any], data: tuple[Any, ...]) -> Any:
        # stopThr=0 is never met, so that exactly k iterations run.
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return solver(*data, eps, numItermax=k, stopThr=0, log=True, warn=False)[1]

    def log_potentials(log: dict[str, Any]) -> tuple[Tensor, Tensor]:
        u, v = torch.as_tensor(log["log_u"]), torch.as_tensor(log["log_v"])
        return eps * (u.cpu() - a.cpu().log()), eps * (v.cpu() - b.cpu().log())

    def kernel_potentials(log: dict[str, Any]) -> tuple[Tensor, Tensor]:
        u, v = torch.as_tensor(log["u"]).log(), torch.as_tensor(log["v"]).log()
        return log_potentials({"log_u": u, "log_v": v})

    kernel = partial(ot.sinkhorn, method="sinkhorn")
    return [
        IterationVariant(
            f"{family}, {backend}",
            partial(run, solver=solver, data=data),
            read,
            first="g",
            family=family,
            pairs=PAIRS,
        )
        for family, solver, read in (
            ("POT sinkhorn_log", ot.bregman.sinkhorn_log, log_potentials),
            ("POT sinkhorn (kernel domain)", kernel, kernel_potentials),
        )
        for backend, data in (("torch", torch_data), ("numpy", numpy_data))
    ]


def _divergence(problem: Problem, tol: float, max_iters: int) -> ValueAndGradient:
    import ot

    x = problem.x.detach().requires_grad_()
    options = {
        "reg": problem.eps,
        "reg_type": "KL",
        "grad": "envelope",
        "tol": tol,
        "max_iter": max_iters,
    }
    weights = {} if problem.uniform else {"a": problem.a, "b": problem.b}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if problem.cost == "euclidean":
            value = _debiased_from_costs(x, problem, options)
        else:
            value = ot.solve_sample(
                x, problem.y, **weights, metric=problem.cost, debias=True, **options
            ).value
    return value.detach(), torch.autograd.grad(value, x)[0]


def _debiased_from_costs(x: Tensor, problem: Problem, options: dict[str, Any]) -> Tensor:
    """The divergence from cost matrices: POT's |x-y| has a NaN gradient where x meets itself."""
    import ot

    def value(p: Tensor, q: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return ot.solve(cost_matrix(p, q, problem.cost), a=u, b=v, **options).value

    y, a, b = problem.y, problem.a, problem.b
    return value(x, y, a, b) - (value(x, x, a, a) + value(y, y, b, b)) / 2


def overhead(problem: Problem, n_iters: int) -> list[Variant]:
    return [Variant("POT solve_sample", partial(_divergence, problem, 0.0, n_iters))]


def divergence(problem: Problem) -> list[Variant]:
    return [
        Variant(f"tol={tol:g}", partial(_divergence, problem, tol, MAX_ITERS)) for tol in TOLERANCES
    ]
