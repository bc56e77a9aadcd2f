"""POT (Python Optimal Transport): log-domain and kernel-domain Sinkhorn.

To an accuracy, the divergence is put together from the plans of three problems: that is faster than
``ot.solve_sample(..., reg_type="KL", debias=True)``, which is S exactly too. POT's stopping test is
the L2 norm of the marginal's violation, tested every ten iterations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.peers import (
    STEP,
    IterationVariant,
    ValueAndGradient,
    Variant,
    importable,
    storable,
)
from benchmarks.reference import cost_matrix
from benchmarks.workloads import Problem

# POT tests the stopping criterion at iterations 0, 10, 20, ...; the time between 2 and 10
# iterations holds no test at all, which is the reading most favourable to POT.
PAIRS = ((10, 50), (2, 10))
# The ladder is the number of iterations; a problem that needs fewer stops by POT's own test, at an
# error in the marginal too small to matter.
ITERATIONS = tuple(sorted({round(STEP**k) for k in range(76)}))  # 1 to 35 000
STOP = 1e-4  # times the norm of the marginal


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


def _solve_sample(problem: Problem, max_iters: int) -> ValueAndGradient:
    """One call of POT's own: three problems in the log domain, gradients by autograd."""
    import ot

    x = problem.x.detach().requires_grad_()
    weights = {} if problem.uniform else {"a": problem.a, "b": problem.b}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = ot.solve_sample(
            x,
            problem.y,
            **weights,
            metric=problem.cost,
            debias=True,
            reg=problem.eps,
            reg_type="KL",
            grad="envelope",
            tol=0.0,
            max_iter=max_iters,
        ).value
    return value.detach(), torch.autograd.grad(value, x)[0]


def overhead(problem: Problem, n_iters: int) -> list[Variant]:
    return [Variant("POT solve_sample", partial(_solve_sample, problem, n_iters))]


class _Term(NamedTuple):
    """One solved problem: its value, the gradient in its first cloud, and the iterations."""

    value: Tensor
    gradient: Tensor
    iterations: int


def _plan_gradient(P: Tensor, C: Tensor, x: Tensor, y: Tensor, cost: str) -> Tensor:
    """d<P, C>/dx at a fixed plan."""
    if cost == "cosine":
        length = x.norm(dim=1, keepdim=True)
        unit, image = x / length, P @ normalize(y, dim=1)
        return ((image * unit).sum(1, keepdim=True) * unit - image) / length
    W = 2 * P if cost == "sqeuclidean" else torch.where(C > 0, P / C, 0)
    return W.sum(1, keepdim=True) * x - W @ y


def _term(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, problem: Problem, method: str, iterations: int
) -> _Term:
    import ot

    # POT's fastest backends: torch for sinkhorn_log, numpy for those of matrix products.
    solver, keys, convert = {
        "sinkhorn_log": (ot.bregman.sinkhorn_log, ("log_u", "log_v"), torch.as_tensor),
        "sinkhorn": (ot.bregman.sinkhorn_knopp, ("u", "v"), Tensor.numpy),
        "sinkhorn_stabilized": (ot.bregman.sinkhorn_stabilized, ("logu", "logv"), Tensor.numpy),
    }[method]
    C, eps = cost_matrix(x, y, problem.cost), problem.eps
    stop = STOP * b.norm().item()
    data = (convert(t) for t in (a, b, C))
    plan, log = solver(*data, eps, numItermax=iterations, stopThr=stop, log=True, warn=False)
    u, v = (torch.as_tensor(log[key]) for key in keys)
    u, v = (u.log(), v.log()) if method == "sinkhorn" else (u, v)
    value = eps * (a @ (u - a.log()) + b @ (v - b.log()))
    P = torch.as_tensor(plan)
    count = log.get("niter", log.get("n_iter")) + 1
    return _Term(value, _plan_gradient(P, C, x, y, problem.cost), count)


@torch.no_grad()
def _divergence(problem: Problem, method: str, iterations: int) -> ValueAndGradient:
    """S and its gradient from the plans of three problems (the envelope theorem)."""
    x, y, a, b = problem.x, problem.y, problem.a, problem.b
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        xy, xx, yy = (
            _term(*pair, problem, method, iterations)
            for pair in ((x, y, a, b), (x, x, a, a), (y, y, b, b))
        )
    return xy.value - (xx.value + yy.value) / 2, xy.gradient - xx.gradient


@torch.no_grad()
def _passes(problem: Problem, method: str, iterations: int) -> int:
    pair = (problem.x, problem.y, problem.a, problem.b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return 2 * _term(*pair, problem, method, iterations).iterations


def divergence(problem: Problem) -> list[Variant]:
    def at(method: str, k: int) -> Variant:
        call = partial(_divergence, problem, method, k)
        passes = partial(_passes, problem, method, k)
        return Variant(f"{method}, {k} iterations", call, method, passes)

    methods = ("sinkhorn_log", "sinkhorn", "sinkhorn_stabilized")
    return [at(method, k) for method in methods for k in ITERATIONS] if storable(problem) else []
