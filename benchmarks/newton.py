"""What Newton's step saves on a CPU: ``python -m benchmarks.newton``.

Sweeps and CPU time of a solve in float32 with L-BFGS alone and with Newton's step from the plan's
large entries, in turns, on one thread. Printed as the table of ``docs/solver-measurements.md`` and
kept in ``benchmarks/results/newton.json``.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from typing import Any

import torch

import otloss
from benchmarks import workloads
from benchmarks.alone import markdown, run

CASES = (
    ("fashion_blurred", 500, 10.0),
    ("fashion_blurred", 500, 1.0),
    ("perturbed_digits", 512, 1.0),
    ("cosine_features", 256, 0.002),
    ("outliers", 512, 0.2),
    ("shapes_3d", 1000, 5e-3),
    ("shapes_3d", 1000, 2e-4),
    ("shapes_3d", 10_000, 5e-3),
    ("shapes_3d", 10_000, 2e-4),
)
TOLERANCES = (1e-3, 1e-4)
ROUNDS = 7
MOST = 5000  # sweeps


def solve(problem: workloads.Problem, tol: float, newton: bool) -> tuple[int, float]:
    """Sweeps, searches for entries included, and milliseconds."""
    os.environ["OTLOSS_NEWTON"] = str(int(newton))
    start = time.thread_time()
    result = otloss.solve_sample(
        problem.x,
        problem.y,
        problem.eps,
        **problem.options,
        # the engine for large clouds has a Newton step of its own
        method="dense" if len(problem.x) < 5000 else "streamed",
        tol=tol,
        max_iters=MOST,
    )
    return result.n_iters, 1e3 * (time.thread_time() - start)


def case(name: str, n: int, eps: float, tol: float) -> dict[str, Any]:
    problem = workloads.make(name, n, eps)
    rounds = [[solve(problem, tol, newton) for newton in (False, True)] for _ in range(ROUNDS)]
    sweeps = [rounds[0][side][0] for side in (0, 1)]
    times = [statistics.median(r[side][1] for r in rounds) for side in (0, 1)]
    return {"workload": name, "n": n, "eps": eps, "tol": tol, "sweeps": sweeps, "ms": times}


def measure() -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otloss.ConvergenceWarning)
        return [case(*problem, tol) for problem in CASES for tol in TOLERANCES]


def table(rows: list[dict[str, Any]]) -> str:
    head = ["workload, n, eps"]
    head += [f"{what} to {tol:g}" for tol in TOLERANCES for what in ("sweeps", "ms")]
    lines: dict[str, list[str]] = {}
    for row in rows:
        line = lines.setdefault(f"{row['workload']}, {row['n']}, {row['eps']:g}", [])
        line.append(" / ".join(map(str, row["sweeps"])))
        line.append(" / ".join(f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}" for ms in row["ms"]))
    return markdown(head, [[name, *cells] for name, cells in lines.items()])


if __name__ == "__main__":
    run("newton", __doc__ or "", measure, table)
