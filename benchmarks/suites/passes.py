"""How many passes over the cost the solver needs, in float64, whatever a pass costs.

A pass here is one log-sum-exp reduction over all pairs; the dense kernel's sweep does two, one for
the rows and one for the columns (a reading that looks for large entries counts as a sweep, too).
Counted for the xy problem of a divergence, the errors that it leaves there: the self problems are
solved exactly. The tolerance is lowered step by step; each threshold shows the first stop at which
it was reached.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from torch import Tensor

from benchmarks import workloads
from benchmarks.suites import Context, text_table

TITLE = "Passes to an accuracy, float64"
PASSES_PER_SWEEP = 2
TOLERANCES = tuple(10 ** (-0.1 * k) for k in range(1, 81))
REFERENCE_TOLERANCE = 1e-10
MAX_ITERS = 20_000

# (what is measured, threshold)
THRESHOLDS = (
    ("value", 1e-3),
    ("value", 1e-6),
    ("gradient", 1e-2),
    ("gradient", 1e-4),
    ("marginal", 1e-3),
    ("marginal", 1e-6),
)

# Workload, points, eps.
CASES = (
    ("random_images", 512, 100.0),
    ("random_images", 512, 10.0),
    ("perturbed_digits", 512, 10.0),
    ("perturbed_digits", 512, 1.0),
    ("perturbed_digits_euclidean", 512, 1.0),
    ("fashion_minibatches", 512, 10.0),
    ("fashion_blurred", 500, 10.0),
    ("solids_3d", 2000, 5e-3),
    ("solids_3d", 2000, 2e-4),
    ("shapes_3d", 2000, 5e-3),
    ("shapes_3d", 2000, 2e-4),
    ("gaussians_64d_weighted", 512, 5.0),
    ("cosine_features", 256, 0.002),
    ("outliers", 512, 0.08),
    ("outliers_apart", 512, 0.165),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def _solve(problem: workloads.Problem, tol: float, method: str) -> tuple[int, float, Tensor]:
    """Sweeps, value and its gradient for x of the problem between the clouds."""
    import otloss

    x = problem.x.clone().requires_grad_()
    result = otloss.solve_sample(
        x,
        problem.y,
        problem.eps,
        **problem.options,
        tol=tol,
        max_iters=MAX_ITERS,
        method=method,
        backward="envelope",
    )
    (gradient,) = torch.autograd.grad(result.value, x)
    return int(result.n_iters), result.value.item(), gradient


def _divergence(problem: workloads.Problem) -> tuple[float, Tensor]:
    """Exact value and gradient, which errors are relative to."""
    import otloss

    x = problem.x.clone().requires_grad_()
    value = otloss.sinkhorn_divergence(
        x,
        problem.y,
        problem.eps,
        **problem.options,
        tol=REFERENCE_TOLERANCE,
        max_iters=MAX_ITERS,
    )
    (gradient,) = torch.autograd.grad(value, x)
    return value.item(), gradient


def _case(name: str, n: int, eps: float, method: str) -> dict[str, Any]:
    problem = workloads.make(name, n, eps).to(torch.float64)
    value_size, gradient_size = _divergence(problem)
    _, value, gradient = _solve(problem, REFERENCE_TOLERANCE, method)
    reached: dict[str, int] = {}
    gradient_at_default = None
    for tol in TOLERANCES:
        sweeps, v, g = _solve(problem, tol, method)
        errors = {
            "value": abs(v - value) / abs(value_size),
            "gradient": ((g - gradient).norm() / gradient_size.norm()).item(),
            "marginal": tol,
        }
        for what, threshold in THRESHOLDS:
            key = f"{what} {threshold:g}"
            if errors[what] <= threshold * (1 + 1e-9) and key not in reached:
                reached[key] = PASSES_PER_SWEEP * sweeps
        if abs(tol - 1e-3) < 1e-9:
            gradient_at_default = errors["gradient"]
        if len(reached) == len(THRESHOLDS):
            break
    return {
        "workload": name,
        "n": n,
        "eps": eps,
        "method": method,
        "hardness": workloads.hardness(problem),
        "passes": reached,
        "gradient_error_at_tol_1e-3": gradient_at_default,
    }


def run(context: Context) -> dict[str, Any]:
    import otloss

    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otloss.ConvergenceWarning)
        for name, n, eps in CASES:
            methods = ["dense", "streamed"] if name.endswith("_3d") else ["dense"]
            for method in methods:
                try:
                    rows.append(_case(name, n, eps, method))
                except workloads.UnavailableError as error:
                    context.skipped[name] = str(error)
    return {"rows": rows}


def table(result: dict[str, Any]) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        counts = [row["passes"].get(f"{w} {t:g}", "-") for w, t in THRESHOLDS]
        return [
            row["workload"],
            f"{row['eps']:g}",
            row["method"],
            f"{row['hardness']:.2g}",
            *map(str, counts),
            f"{row['gradient_error_at_tol_1e-3']:.1e}",
        ]

    header = ["workload", "eps", "method", "h", *(f"{w} {t:g}" for w, t in THRESHOLDS)]
    return text_table([*header, "gradient error at tol 1e-3"], map(cells, result["rows"]))


def figure(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    key = "gradient 0.01"
    rows = [row for row in result["rows"] if key in row["passes"]][::-1]
    fig = Figure(figsize=(6.4, 0.35 * len(rows) + 1), layout="constrained")
    axes = fig.subplots()
    labels = [f"{row['workload']}, eps {row['eps']:g}, {row['method']}" for row in rows]
    bars = axes.barh(labels, [row["passes"][key] for row in rows], height=0.6)
    axes.bar_label(bars)
    axes.set(xlabel="passes to a gradient error of 1%")
    axes.margins(x=0.1)
    return fig
