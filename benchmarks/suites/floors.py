"""A minibatch's loss and gradient over their floor: the matrix products that they cannot avoid.

The floor is three products for the costs and two for the gradient of x, by torch (MKL), timed in
the same process in turn. ``--against`` names further checkouts, built in place, whose times are
taken in turn with this one's, and ``--single`` this one's by one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import workloads
from benchmarks.suites import Context, text_table

TITLE = "Value and gradient of a minibatch's divergence, over the five products it needs"
ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "benchmarks" / "floor.py"
PARTS = ("both", "forward", "floor")


class Case(NamedTuple):
    workload: str
    n: int
    eps: float
    dtype: str = "float32"

    @property
    def label(self) -> str:
        return f"{self.workload}, n={self.n}, eps={self.eps:g}, {self.dtype}"


IMAGES = [(200, 100.0), (200, 10.0), (200, 1.0), (500, 100.0), (500, 10.0)]
CASES = [
    *(Case("fashion_blurred", n, eps) for n, eps in IMAGES),
    Case("cosine_features", 256, 0.05),
    Case("gaussians_64d", 1000, 5.0),
    Case("fashion_blurred", 200, 10.0, "float64"),
    Case("fashion_blurred", 500, 10.0, "float64"),
    Case("cosine_features", 256, 0.05, "float64"),
    Case("gaussians_64d", 1000, 5.0, "float64"),
    Case("low_dimensional", 32, 8.0),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against", type=Path, action="append", default=[], help="another checkout, built in place"
    )
    parser.add_argument("--single", action="store_true", help="this checkout by one thread too")
    parser.add_argument("--floors-only", default="", help="cases whose label contains this")


def _save(cases: list[Case], path: Path) -> list[str]:
    """Writes the problems for the workers; returns what their data is."""
    problems, data = [], []
    for case in cases:
        problem = workloads.make(case.workload, case.n, case.eps)
        x, y = (cloud.to(getattr(torch, case.dtype)) for cloud in (problem.x, problem.y))
        problems.append({"x": x, "y": y, "eps": case.eps, "cost": problem.cost})
        data.append(problem.data)
    torch.save(problems, path)
    return data


@contextmanager
def _worker(
    checkout: Path, threads: int, problems: Path, clock: str
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(WORKER), str(checkout), str(problems), clock]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            _ask(process, threads)
            yield process
        finally:
            process.kill()


def _ask(process: subprocess.Popen[str], number: int) -> None:
    assert process.stdin
    process.stdin.write(f"{number}\n")
    process.stdin.flush()


def _sample(process: subprocess.Popen[str], case: int) -> list[float]:
    _ask(process, case)
    assert process.stdout
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"{process.args} ended")
    return [float(seconds) for seconds in answer.strip(" []\n").split(",")]


def run(context: Context) -> dict[str, Any]:
    cases = [case for case in CASES if context.options.floors_only in case.label]
    threads = torch.get_num_threads()
    workers_of = [(path.resolve(), threads) for path in (ROOT, *context.options.against)]
    workers_of += [(ROOT, 1)] if context.options.single else []
    samples: dict[tuple[int, int], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        problems = Path(folder) / "problems.pt"
        data = _save(cases, problems)
        workers = [
            stack.enter_context(_worker(*which, problems, context.options.clock))
            for which in workers_of
        ]
        for _ in range(2 * context.options.repetitions):
            for c in range(len(cases)):
                for w, worker in enumerate(workers):
                    samples.setdefault((c, w), []).append(_sample(worker, c))
    rows = []
    for (c, w), taken in samples.items():
        quartile = np.quantile(np.asarray(taken), 0.25, axis=0).tolist()
        case = {"case": cases[c].label, "data": data[c], "against": w > 0}
        rows.append({**case, **dict(zip(PARTS, quartile, strict=True))})
    return {"rows": rows, "threads": threads, "clock": context.options.clock}


def _cells(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    this: dict[str, Any] = {}
    for row in rows:
        this = this if row["against"] else row
        floors = [row["both"], row["forward"], row["both"] - row["forward"]]
        yield [
            row["case"] if this is row else "  another checkout",
            f"{1e3 * row['both']:.3g} ms",
            *(f"{seconds / row['floor']:.2f}" for seconds in floors),
            f"{1e3 * row['floor']:.3g} ms",
            "" if this is row else f"{this['both'] / row['both']:.2f}",
        ]


def table(result: dict[str, Any]) -> str:
    header = ["", "loss and gradient", "floors", "forward", "backward", "floor", "this / that"]
    return text_table(header, _cells(result["rows"]))


def figure(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if not row["against"]]
    fig = Figure(figsize=(7.4, 0.35 * len(rows) + 1), layout="constrained")
    axes = fig.subplots()
    labels = [row["case"] for row in rows]
    forward = [row["forward"] / row["floor"] for row in rows]
    backward = [(row["both"] - row["forward"]) / row["floor"] for row in rows]
    axes.barh(labels, forward, label="forward")
    axes.barh(labels, backward, left=forward, label="backward")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="floors", xscale="log")
    axes.legend()
    return fig
