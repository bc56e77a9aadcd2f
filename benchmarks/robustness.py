"""Whether what a solve reports is true: ``python -m benchmarks.robustness``.

Three sets of problems, each solved with default options unless it says otherwise:

- *clusters*: random clusters far apart, whose masses differ a little between the two clouds, in
  float64, against values that the duality gap proves;
- *ordinary*: the workloads of the other benchmarks, in float64;
- *float32*: those, and problems near what float32 resolves, at five tolerances, with the marginal
  error of the potentials returned measured in float64.

Printed as the tables of ``docs/solver-measurements.md`` and kept in
``benchmarks/results/robustness.json``.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import otloss
from benchmarks import workloads
from benchmarks.alone import markdown, run
from benchmarks.reference import cost_matrix

SEEDS = range(300, 500)
CAP = 1000  # sweeps
Row = dict[str, Any]


class Problem(NamedTuple):
    name: str
    C: Tensor  # (n, m), float64
    a: Tensor
    b: Tensor
    eps: float


# ------------------------------------------------------------------------------ clusters far apart


def cluster_masses(a: np.ndarray, k: int, gap: float, r: np.random.Generator) -> np.ndarray:
    """What the clusters of y hold: half of the L1 distance to what those of x hold is ``gap``."""
    off = r.standard_normal(k)
    off = np.array([1.0, -1.0]) if k == 2 else off - off.mean()
    off *= 2 * gap / np.abs(off).sum()
    if (a + off <= 0).any():
        wanted = np.maximum(a * (1 + np.clip(off / a, -0.9, None)), 1e-12)
        return wanted / wanted.sum()
    return a + off


def cluster_centres(
    k: int, d: int, distance: float, nested: float, r: np.random.Generator
) -> np.ndarray:
    """k centres; nested > 0: in groups, within which they are nearer by that factor."""
    if nested:
        groups = max(2, round(np.sqrt(k)))
        of_groups = r.standard_normal((groups, d)) * distance / np.sqrt(d)
        return of_groups[np.arange(k) % groups] + r.standard_normal((k, d)) * 3 * distance / nested
    if k == 2:
        return np.array([np.zeros(d), distance * np.eye(d)[0]])
    return r.standard_normal((k, d)) * distance


def clusters(seed: int) -> Problem:
    """2 to 20 clusters of size 0.1 at distances of 1 to 1000, weights over up to four decades."""
    size, r = 0.1, np.random.default_rng(1000 + seed)
    k, apart = int(r.choice([2, 2, 3, 5, 8, 13, 20])), float(r.choice([10, 30, 100, 1e3, 1e4]))
    gap = float(r.choice([1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 0.1, 0.3]))
    squared = str(r.choice(["sq", "sq", "euc"])) == "sq"
    eps = (size**2 if squared else size) * float(r.choice([0.1, 1.0, 10.0, 100.0]))
    d, decades = int(r.choice([2, 2, 3, 10])), float(r.choice([0, 0, 0, 2, 4]))
    nested = bool(r.choice([0, 0, 1])) and k > 3
    n, m = (int(r.integers(max(60, 4 * k), 160)) for _ in range(2))
    r = np.random.default_rng(seed)
    centres = cluster_centres(k, d, apart * size, np.sqrt(apart) if nested else 0.0, r)
    of_x, of_y = np.arange(n) % k, np.arange(m) % k
    x = centres[of_x] + size * r.standard_normal((n, d))
    y = centres[of_y] + size * r.standard_normal((m, d))
    a, b = (10 ** (decades * (r.random(count) - 1)) for count in (n, m))
    a /= a.sum()
    b *= (cluster_masses(np.bincount(of_x, a, k), k, gap, r) / np.bincount(of_y, b, k))[of_y]
    C = ((x[:, None] - y) ** 2).sum(-1)
    name = f"{k} clusters, distance {apart * size:g}, gap {gap:g}, eps {eps:g}, seed {seed}"
    tensors = (torch.from_numpy(v) for v in (C if squared else np.sqrt(C), a, b / b.sum()))
    return Problem(name, *tensors, eps)


def proven_value(p: Problem) -> float | None:
    """By eps from the largest cost down by halves; None where the duality gap does not prove it."""
    result, eps = None, float(p.C.max())
    while True:
        eps = max(p.eps, eps / 2)
        tol = 1e-11 if eps == p.eps else 1e-7
        result = otloss.solve(p.C, eps, a=p.a, b=p.b, init=result, tol=tol, max_iters=3000)
        if eps == p.eps:
            value = float(result.value)
            return value if result.duality_gap <= 1e-4 * abs(value) else None


def measure_clusters() -> list[Row]:
    rows = []
    for p in map(clusters, SEEDS):
        value = proven_value(p)
        if value is None:
            continue
        result = otloss.solve(p.C, p.eps, a=p.a, b=p.b, max_iters=CAP)
        off = abs(float(result.value) / value - 1)
        rows.append(
            {"name": p.name, "sweeps": result.n_iters, "converged": result.converged, "off": off}
        )
    return rows


def table_of_clusters(rows: list[Row]) -> str:
    sweeps = [row["sweeps"] for row in rows]
    wrong = [row for row in rows if row["converged"] and row["off"] > 0.01]
    head = ["problems", "not converged", "converged, value off by more than 1%"]
    head += ["sweeps, median", "sweeps, mean"]
    numbers = [len(rows), sum(not row["converged"] for row in rows), len(wrong)]
    numbers += [statistics.median(sweeps), round(statistics.mean(sweeps))]
    return markdown(head, [[f"{number:g}" for number in numbers]], words=0)


# ------------------------------------------------------------------------------- ordinary problems

ORDINARY = (
    ("random_images", 256, 100.0),
    ("random_images", 256, 10.0),
    ("fashion_blurred", 200, 1.0),
    ("fashion_blurred", 200, 10.0),
    ("fashion_blurred_euclidean", 200, 1.0),
    ("fashion_minibatches", 200, 1.0),
    ("fashion_minibatches", 200, 10.0),
    ("fashion_minibatches", 200, 100.0),
    ("shapes_3d", 500, 5e-3),
    ("shapes_3d", 500, 2e-4),
    ("shapes_3d", 2000, 2e-4),
    ("solids_3d", 500, 5e-3),
    ("solids_3d", 500, 2e-4),
    ("cosine_features", 256, 0.002),
    ("perturbed_digits", 256, 10.0),
    ("perturbed_digits", 256, 1.0),
    ("perturbed_digits_euclidean", 256, 1.0),
    ("gaussians_64d", 1000, 5.0),
    ("gaussians_64d_weighted", 512, 5.0),
    ("outliers", 512, 0.2),
    ("outliers", 1000, 0.08),
    ("outliers_apart", 512, 0.165),
    ("low_dimensional", 32, 8.0),
)


def measure_ordinary() -> list[Row]:
    rows = []
    for name, n, eps in ORDINARY:
        p = workloads.make(name, n, eps).to(torch.float64)
        b = p.b * (p.a.sum() / p.b.sum())
        result = otloss.solve_sample(p.x, p.y, eps, a=p.a, b=b, cost=p.cost, max_iters=CAP)
        row = {"name": f"{name}, {n}, {eps:g}", "sweeps": result.n_iters}
        rows.append({**row, "converged": result.converged})
    return rows


def table_of_ordinary(rows: list[Row]) -> str:
    lines = [[row["name"], str(row["sweeps"])] for row in rows]
    return markdown(["workload, n, eps", "sweeps"], lines)


# ------------------------------------------------------------------------------------- float32

TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def float32_problems() -> Iterator[Problem]:
    for name, n, eps in ORDINARY:
        if n <= 512:
            yield from_workload(name, n, eps)
    for seed in range(2):
        r = np.random.default_rng(seed)
        x, y = (torch.from_numpy(r.random((100, 784))) for _ in range(2))
        C = cost_matrix(x, y, "sqeuclidean")
        for eps in (8e-5, 1.5e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0):
            yield uniform(f"random, d=784, {eps:g}", C, eps)
        for eps in (1e-2, 1e-1):
            yield from_workload("fashion_minibatches", 200, eps, seed)
        for eps in (1e-6, 1e-5, 1e-4):
            yield from_workload("shapes_3d", 300, eps, seed)
        for eps in (1e-4, 1e-3, 1e-2, 1e-1):
            yield uniform(f"random costs, {eps:g}", torch.from_numpy(r.random((50, 50))), eps)
        yield uniform("random costs, large", 20 * torch.from_numpy(r.random((12, 12))), 4e-3)


def uniform(name: str, C: Tensor, eps: float) -> Problem:
    return Problem(name, C, *(torch.full_like(C[:, 0], 1 / n)[:1].expand(n) for n in C.shape), eps)


def from_workload(name: str, n: int, eps: float, seed: int = 0) -> Problem:
    p = workloads.make(name, n, eps, seed).to(torch.float64)
    C = cost_matrix(p.x, p.y, p.cost)
    return Problem(f"{name}, {n}, {eps:g}", C, p.a, p.b * (p.a.sum() / p.b.sum()), eps)


def true_error(p: Problem, f: Tensor, g: Tensor) -> float:
    """The marginal error of float32 potentials, whose plan is computed in float64."""
    a, b, C = (t.float().double() for t in (p.a, p.b, p.C))
    b = b * (a.sum() / b.sum())
    P = a[:, None] * b * ((f.double()[:, None] + g.double() - C) / p.eps).exp()
    errors = (P.sum(1) - a).abs().sum(), (P.sum(0) - b).abs().sum()
    return float(max(errors)) / float(a.sum())


def measure_float32() -> list[Row]:
    rows = []
    for p in float32_problems():
        C, a, b = (t.float().contiguous() for t in (p.C, p.a, p.b))
        for tol in TOLERANCES:
            try:
                result = otloss.solve(C, p.eps, a=a, b=b, tol=tol, max_iters=CAP)
            except ValueError:  # below what float32 resolves
                continue
            error = true_error(p, *result.potentials)
            row = {"name": p.name, "tol": tol, "sweeps": result.n_iters, "error": error}
            rows.append({**row, "converged": result.converged})
    return rows


def table_of_float32(rows: list[Row]) -> str:
    head = ["tol", "solves", "converged", "of these with an error above 1.1 tol"]
    head += ["not converged, error within tol", "sweeps in all"]
    lines = []
    for tol in TOLERANCES:
        of_tol = [row for row in rows if row["tol"] == tol]
        converged = [row for row in of_tol if row["converged"]]
        numbers = [len(of_tol), len(converged), sum(row["error"] > 1.1 * tol for row in converged)]
        numbers.append(sum(not row["converged"] and row["error"] <= tol for row in of_tol))
        numbers.append(sum(row["sweeps"] for row in of_tol))
        lines.append([f"{tol:g}", *map(str, numbers)])
    return markdown(head, lines, words=0)


# ------------------------------------------------------------------------------------------- all

PARTS = {
    "clusters": (measure_clusters, table_of_clusters),
    "ordinary": (measure_ordinary, table_of_ordinary),
    "float32": (measure_float32, table_of_float32),
}


def measure() -> dict[str, list[Row]]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otloss.ConvergenceWarning)
        return {name: measured() for name, (measured, _) in PARTS.items()}


def table(result: dict[str, list[Row]]) -> str:
    return "\n\n".join(make(result[name]) for name, (_, make) in PARTS.items())


if __name__ == "__main__":
    run("robustness", __doc__ or "", measure, table)
