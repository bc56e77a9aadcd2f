"""A divergence of large clouds and its gradient, in a process of its own.

    from benchmarks.large import measure
    measure("otloss multiscale, tol=0.001", "shapes_unit", 100_000, 5e-3)

The child notes its peak resident memory, calls, notes it again, and then checks what it got in
float64. Up to `MOST_SOLVED` points value and gradient are compared with the converged ones. Larger
clouds have none: rows of the gradient, and of the plan's marginals, are there computed in full
from potentials, those of `FINE` where a run of it kept them, else the call's own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.memory import ROOT, GaveUpError, cpu_limit, resident_peak
from benchmarks.process import set_thread_variables

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from benchmarks.reference import Solution
    from benchmarks.workloads import Problem

MOST_SOLVED = 10_000
SAMPLE = 256  # rows checked in full
BLOCK = 16  # of them at a time
WARM_UP = 2000  # points of a first call: what is loaded once is not the problem's memory
REPEATED = 10.0  # CPU seconds in which a short call is repeated, `ROUNDS` times at most
ROUNDS = 3
MAX_ITERS = 20_000
FINE = "otloss multiscale, float64, tol=1e-05"


class Measured(NamedTuple):
    cpu_seconds: float  # the median
    wall_seconds: float
    added_bytes: int  # by the first call
    value: float
    gradient_error: float | None
    value_error: float | None
    marginal_error: float | None  # of the sampled rows and columns
    checked_by: str


class _Answer(NamedTuple):
    value: Tensor
    gradient: Tensor
    potentials: list[Tensor]  # f and g of (x, y), (x, x) and (y, y), or none


def measure(
    method: str, workload: str, n: int, eps: float, *, threads: int = 1, limit: float = 1800
) -> Measured:
    """``method``: a peer and its setting; ``limit`` in CPU seconds, after which ``GaveUpError``."""
    command = [sys.executable, "-m", "benchmarks.large", method, workload, str(n), str(eps)]
    command += ["--threads", str(threads), "--limit", str(limit)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ.copy(), check=True, stdout=subprocess.PIPE
        )
    except subprocess.CalledProcessError as error:
        if error.returncode == -signal.SIGXCPU:
            raise GaveUpError(f"not done after {limit:.0f} s") from error
        raise
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _answer(method: str, problem: Problem) -> _Answer:
    import torch

    peer, setting = method.split(" ", 1)
    if peer == "geomloss":
        from benchmarks.peers import geomloss

        variants = {variant.label: variant for variant in geomloss.divergence(problem)}
        return _Answer(*variants[setting].call(), [])
    import otloss

    head, tol = setting.split(", tol=")
    name, double = head.split(",")[0], "float64" in head
    options: dict[str, Any] = {"method": name}
    loss = otloss.SinkhornDivergence(
        problem.eps, **options, tol=float(tol), max_iters=MAX_ITERS, warm_start=True
    )
    x, y = (t.detach().double() if double else t.detach() for t in (problem.x, problem.y))
    value = loss(x.requires_grad_(), y)
    gradient = torch.autograd.grad(value, x)[0]
    assert loss.memory is not None
    return _Answer(value.detach(), gradient, loss.memory.potentials)


class _Checked(NamedTuple):
    solution: Solution
    by: str


def _solution(problem: Problem, answer: _Answer, method: str) -> _Checked | None:
    """What the answer is compared with."""
    from benchmarks import reference

    x, y, a, b = problem.x, problem.y, problem.a, problem.b
    if len(x) <= MOST_SOLVED:
        found = reference.divergence(x, y, a, b, problem.cost, problem.eps)
        return _Checked(found, "the converged solution")
    kept = _kept(problem)
    if method != FINE and kept.exists():
        return _Checked(_load(kept), f"potentials of {FINE}")
    if not answer.potentials:
        return None
    own = _from_potentials(problem, answer)
    if method == FINE:
        _keep(kept, own)
    return _Checked(own, "own potentials")


def _kept(problem: Problem) -> Path:
    from benchmarks.reference import CACHE

    return CACHE / f"large-{problem.name}-{len(problem.x)}-{problem.eps:g}.pt"


def _keep(path: Path, solution: Solution) -> None:
    import torch

    path.parent.mkdir(exist_ok=True)
    torch.save(tuple(solution), path)


def _load(path: Path) -> Solution:
    import torch

    from benchmarks.reference import Solution

    return Solution(*torch.load(path))


def _from_potentials(problem: Problem, answer: _Answer) -> Solution:
    """Rows of the gradient that potentials give, in full in float64, and how far the potentials
    are from the optimality conditions there."""
    import torch

    from benchmarks.reference import Solution, transform

    x, y, a, b, *potentials = (
        t.double() for t in (problem.x, problem.y, problem.a, problem.b, *answer.potentials)
    )
    f, g, f_x, g_x = (v[0] for v in potentials[:4])
    rng = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(len(z), generator=rng)[:SAMPLE] for z in (x, y))

    def rows_of(z: Tensor, other: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        parts = [transform(part, other, v, w, problem.cost, problem.eps) for part in z.split(BLOCK)]
        potential, gradient = zip(*parts, strict=True)
        return torch.cat(potential), torch.cat(gradient)

    exact_f, cross = rows_of(x[rows], y, g, b)
    exact_f_x, own = rows_of(x[rows], x, g_x, a)
    exact_g, _ = rows_of(y[columns], x, f, a)
    changes = (exact_f - f[rows], exact_g - g[columns], exact_f_x - f_x[rows])
    error = max(torch.expm1(change / problem.eps).abs().mean().item() for change in changes)
    return Solution(answer.value.item(), a[rows, None] * (cross - own), error, rows)


def _measured(arguments: argparse.Namespace) -> Measured:
    import statistics

    import torch

    from benchmarks import workloads

    torch.set_num_threads(arguments.threads)

    def make(n: int) -> Problem:
        return workloads.make(arguments.workload, n, arguments.eps)

    problem = make(arguments.n)
    _answer(arguments.method, make(WARM_UP))
    before, cpu, wall = resident_peak(), list[float](), list[float]()
    added = 0
    with cpu_limit(arguments.limit):
        while not cpu or (len(cpu) < ROUNDS and sum(cpu) < REPEATED):
            start = time.process_time(), time.perf_counter()
            answer = _answer(arguments.method, problem)
            cpu.append(time.process_time() - start[0])
            wall.append(time.perf_counter() - start[1])
            added = added or resident_peak() - before
    checked = _solution(problem, answer, arguments.method)
    seconds = statistics.median(cpu), statistics.median(wall)
    if checked is None:
        return Measured(*seconds, added, answer.value.item(), None, None, None, "")
    solution, by = checked
    errors = solution.errors(answer.value, answer.gradient)
    own = by == "own potentials"
    return Measured(
        *seconds,
        added,
        answer.value.item(),
        errors["gradient_error"],
        None if own else errors["value_error"],
        solution.marginal_error if own else None,
        by,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("method")
    parser.add_argument("workload")
    parser.add_argument("n", type=int)
    parser.add_argument("eps", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1800)
    arguments = parser.parse_args()
    set_thread_variables(arguments.threads)
    print(json.dumps(_measured(arguments)._asdict()))


if __name__ == "__main__":
    main()
