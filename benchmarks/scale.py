"""Worst relative errors in float32, by eps over the mean cost: ``python -m benchmarks.scale``.

Values and gradients against float64, over totals and penalties. Printed as a table of
``docs/totals.md`` and kept in ``benchmarks/results/scale.json``.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks.alone import markdown, run

EPS = (1e-2, 1e-1, 1.0, 10.0, 1e3, 1e6, 1e9, 1e12)  # over the mean cost
RHO = (1e-1, 1.0, 1e3, 1e6, math.inf)  # likewise
EQUAL = ((1.0, 1.0), (1e-3, 1e-3), (1e6, 1e6))
UNEQUAL = ((1e-3, 1.0), (1e6, 1e5), (1e3, 1e-3))
Row = dict[str, float]
NAMES = ("OT", "S", "gradient of S in x", "in a")


def clouds() -> tuple[Tensor, ...]:
    """60 and 50 points, weights of total 1, all numbers of float32."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 3, generator=rng), torch.randn(50, 3, generator=rng) + 0.5
    a, b = (torch.rand(n, generator=rng) + 0.2 for n in (60, 50))
    return x, y, a / a.sum(), b / b.sum()


def cases() -> Iterator[tuple[float, float, float, float]]:
    for eps, rho in itertools.product(EPS, RHO):
        for totals in EQUAL + (() if math.isinf(rho) else UNEQUAL):
            yield eps, rho, *totals


def measure(eps: float, rho: float, m_a: float, m_b: float, dtype: torch.dtype) -> list[Any]:
    """OT, S and the gradients of S; those in a without a constant where it is free."""
    x, y, a, b = clouds()
    unit = float(torch.cdist(x.double(), y.double()).square().mean())
    x, y, a, b = (t.to(dtype) for t in (x, y, m_a * a, m_b * b))
    if dtype == torch.float64:  # totals that float32 takes as 1, or as equal, are
        a, b = (w / w.sum() if m == 1 else w for w, m in ((a, m_a), (b, m_b)))
        b = b * (a.sum() / b.sum()) if m_a == m_b else b
    leaves = [t.requires_grad_() for t in (x, a)]
    strength = None if math.isinf(rho) else rho * unit
    call = {"a": a, "b": b, "unbalanced": strength, "max_iters": 3000}
    call["tol"] = 1e-6 if dtype == torch.float32 else 1e-12
    loss = otloss.sinkhorn_loss(x, y, eps * unit, **call)
    S = otloss.sinkhorn_divergence(x, y, eps * unit, **call)
    of_x, of_a = (g.double() for g in torch.autograd.grad(S, leaves))
    if math.isinf(rho):
        of_a = of_a - (a * of_a).sum() / a.sum()
    return [loss.item(), S.item(), of_x.tolist(), of_a.tolist()]


def error(found: Any, true: Any) -> float:
    p, q = (torch.tensor(v, dtype=torch.float64) for v in (found, true))
    return float((p - q).norm() / q.norm()) if bool(p.isfinite().all()) else math.inf


def solutions() -> list[list[Any]]:
    """In float64: from the file of $OTLOSS_SCALE_TRUTH, written if it does not exist, so that
    another checkout is measured against this one's."""
    path = os.environ.get("OTLOSS_SCALE_TRUTH")
    if path and Path(path).exists():
        return list(json.loads(Path(path).read_text()))
    true = [measure(*case, torch.float64) for case in cases()]
    if path:
        Path(path).write_text(json.dumps(true))
    return true


def worst_errors() -> list[Row]:
    rows: dict[float, Row] = {eps: {"eps": eps} | dict.fromkeys(NAMES, 0.0) for eps in EPS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otloss.ConvergenceWarning)
        for case, true in zip(cases(), solutions(), strict=True):
            found, row = measure(*case, torch.float32), rows[case[0]]
            for name, p, q in zip(NAMES, found, true, strict=True):
                row[name] = max(row[name], error(p, q))
    return list(rows.values())


def table(rows: list[Row]) -> str:
    lines = [[f"{row['eps']:g}", *(f"{row[name]:.0e}" for name in NAMES)] for row in rows]
    return markdown(["eps", *NAMES], lines)


if __name__ == "__main__":
    run("scale", __doc__, worst_errors, table)
