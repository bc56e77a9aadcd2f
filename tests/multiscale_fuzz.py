"""Random problems for the multiscale engine, against dense solves in float64 that prove themselves.

    python -m tests.multiscale_fuzz --out results.jsonl --count 300     resumes where the file ends
    python -m tests.multiscale_fuzz --seed 1234 --count 1               one problem again, in full
    python -m tests.multiscale_fuzz --large 10 --out large.jsonl       n = 20 000, minutes each
    python -m tests.multiscale_fuzz --report results.jsonl              the table

Those of 20 000 points are compared with "streamed" solves, and run in up to three dimensions:
above, both ways often come to the same passes over all pairs, hundreds of them at a small eps.

Every seed is one problem of 1500 to 3000 points: clusters, outliers, lines, planes, surfaces, far
clouds, repeated points, weights over six orders or 0, eps over six decades of the spread. OT lies
in [low, high], the value of the dense solve, which goes on from the engine's potentials, and its
duality gap; J is the value that is returned, e
the marginal error of the potentials returned, from all pairs in float64, R = max C; u the machine
epsilon of the dtype, r = 128 u max C the rounding of a value, w = 16 u (max|f| + max|g|) / eps that
of the plan's densities, 1e-6 at least: tiles are float32.

check      | bound
refused    | a ValueError only for eps < 4 u max C; no other exception
flag       | a ConvergenceWarning exactly where `converged` is False
error      | e <= the error that is reported + w
converged  | if `converged`, e <= tol + w
above      | J <= high + r + eps tol: what is left out makes potentials larger
value      | if converged, J >= low - delta - r, delta the smaller of 20 tol |J| and 2 tol (R + eps)
gap        | |J - OT| <= duality_gap
divergence | as "value", for the sum of its terms
gradient   | of the divergence in x, norms summed over points, if all converged: 2 sqrt(R) times the
           | L1 distance of plans, sqrt(3 delta / eps) + tol + w for each term
sums       | `marginals` and `apply` of the result: within e + w of those of all pairs
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

import otloss
from tests.fuzz.command import arguments, report, run

Rng = np.random.Generator
KINDS = ("clusters", "outliers", "line", "plane", "surface", "far", "cube", "normal", "repeated")
LARGE = 20_000
LARGE_DIMENSIONS = 3
PROVEN = 1e-6  # of the dense solve's gap over its value
BLOCK = 32  # rows of all pairs at a time


def cloud(rng: Rng, kind: str, n: int, d: int) -> np.ndarray:
    z = rng.normal(size=(n, d))
    if kind == "clusters":
        k = int(rng.integers(2, 12))
        of = rng.integers(k, size=n)
        return 4 * rng.normal(size=(k, d))[of] + 10 ** rng.uniform(-3, 0, size=(k, 1))[of] * z
    if kind == "outliers":
        z[:: int(rng.integers(20, 200))] *= 10 ** rng.uniform(0.5, 1.5)
    if kind in ("line", "plane"):
        own = min(d, 1 if kind == "line" else 2)
        return rng.uniform(size=(n, own)) @ rng.normal(size=(own, d))
    if kind == "surface":
        s, t = rng.uniform(size=(2, n, 1)) * 3
        phase = np.arange(d)
        return np.cos((1 + phase % 3) * s + phase) + np.sin((1 + phase % 2) * t)
    if kind == "cube":
        return rng.uniform(size=(n, d))
    if kind == "repeated":
        return z[rng.integers(n // 20, size=n)]
    return z


def weights(rng: Rng, kind: str, n: int) -> np.ndarray | None:
    if kind == "none":
        return None
    w = rng.uniform(0.1, 1, size=n) if kind == "random" else 10 ** rng.uniform(-6, 0, size=n)
    if kind == "zeros":
        w *= rng.random(n) < 0.7
    return w / w.sum()


class Case:
    """The problem of a seed."""

    def __init__(self, seed: int, n: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        kind = str(rng.choice(KINDS))
        d = int(rng.choice((1, 2, 3, 4, 5, 8), p=(0.1, 0.3, 0.35, 0.1, 0.1, 0.05)))
        sizes = [n or int(1500 * 2 ** rng.uniform()) for _ in range(2)]
        scale = 10 ** rng.uniform(-2, 2)
        x, y = (cloud(rng, kind, size, d) for size in sizes)
        y = y + rng.normal(size=d) * (3 if kind == "far" else 0.3)
        kinds = [str(rng.choice(("none", "random", "wide", "zeros"))) for _ in range(2)]
        w = [weights(rng, k, size) for k, size in zip(kinds, sizes, strict=True)]
        dtype = torch.float32 if rng.random() < 0.7 else torch.float64
        self.x, self.y = (torch.tensor(scale * z).to(dtype) for z in (x, y))
        self.a, self.b = (None if v is None else torch.tensor(v).to(dtype) for v in w)
        spread = float(self.x.double().var(0).sum() + self.y.double().var(0).sum())
        self.eps = spread * 10 ** rng.uniform(-5, 1)
        self.tol = 1e-3 if rng.random() < 0.6 else float(10 ** rng.uniform(-5, -2))
        self.kind = {
            "clouds": kind, "n": sizes[0], "m": sizes[1], "d": d, "weights": "/".join(kinds),
            "dtype": str(dtype)[6:], "eps/spread": self.eps / spread, "tol": self.tol,
        }  # fmt: skip

    def double(self) -> list[Tensor]:
        """x, y, a and b in float64, of equal totals."""
        x, y = self.x.double(), self.y.double()
        given = zip((self.a, self.b), (x, y), strict=True)
        a, b = (torch.full_like(z[:, 0], 1 / len(z)) if w is None else w.double() for w, z in given)
        return [x, y, a, b * (a.sum() / b.sum())]


class Answer:
    """Value, potentials, divergence and its gradient in x, by one method; from potentials of the
    three problems, or from nothing."""

    def __init__(
        self, case: Case, method: str, tensors: list[Any], tol: float, start: list[Tensor]
    ) -> None:
        x, y, a, b = tensors
        options: dict[str, Any] = {"method": method, "tol": tol, "max_iters": 1000}
        loss = otloss.SinkhornDivergence(case.eps, warm_start=True, **options)
        assert loss.memory is not None
        loss.memory.potentials = start
        init = (start[0][0], start[1][0]) if start else None
        begun = time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with torch.no_grad():
                self.result = otloss.solve_sample(x, y, case.eps, a=a, b=b, init=init, **options)
            warned = len(caught) > 0
            x = x.detach().clone().requires_grad_()
            S = loss(x, y, a, b)
            self.all_converged = otloss.last_status().converged and self.result.converged
            (self.grad,) = torch.autograd.grad(S, x)
        self.seconds = time.process_time() - begun
        self.flag = warned == (not self.result.converged)
        self.value, self.S = float(self.result.value), float(S.detach())
        self.potentials = loss.memory.potentials


def sums(case: Case, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, float]:
    """Row and column sums of the plan from all pairs in float64, and the largest cost."""
    x, y, a, b = case.double()
    F, G = (v.double() / case.eps + w.log() for v, w in ((f, a), (g, b)))
    rows, columns, largest = [], torch.zeros_like(b), 0.0
    for i in range(0, len(x), BLOCK):
        part = slice(i, i + BLOCK)
        C = torch.zeros(len(x[part]), len(y)).double()
        for u, v in zip(x[part].T, y.T, strict=True):
            C += (u[:, None] - v).square_()
        largest = max(largest, float(C.max()))
        P = C.div_(-case.eps).add_(F[part, None]).add_(G).exp_()
        rows.append(P.sum(1))
        columns += P.sum(0)
    return torch.cat(rows), columns, largest


def examine(seed: int, large: bool = False) -> dict[str, Any]:
    """All that is to be known of one seed, as a line of the results."""
    case = Case(seed, LARGE if large else None)
    line: dict[str, Any] = {
        "seed": seed,
        "case": case.kind,
        "ratios": {},
        "notes": [],
        "proven": True,
    }
    x, y, _, _ = case.double()
    if large and x.shape[1] > LARGE_DIMENSIONS:
        return line | {"outcome": f"not run: over {LARGE_DIMENSIONS} dimensions", "failed": []}
    most = float((torch.cat([x, y]).amax(0) - torch.cat([x, y]).amin(0)).square().sum())
    try:
        given = [case.x, case.y, case.a, case.b]
        got = Answer(case, "multiscale", given, case.tol, [])
    except ValueError as error:
        allowed = case.eps < 8 * torch.finfo(case.x.dtype).eps * most
        line |= {"outcome": "refused", "ratios": {"refused": 0.0 if allowed else 9.0}}
        line["notes"] = [str(error)]
    except Exception as error:  # judged, like everything else
        line |= {"outcome": "raised", "ratios": {"refused": 9.0}, "notes": [repr(error)]}
    else:
        line |= {"outcome": "converged" if got.all_converged else "not converged"}
        line["seconds"] = round(got.seconds, 3)
        judge(case, got, line, large)
    line["failed"] = [name for name, ratio in line["ratios"].items() if not ratio <= 1]
    return line


def judge(case: Case, got: Answer, line: dict[str, Any], large: bool) -> None:
    _, _, a, b = case.double()
    f, g = got.result.potentials
    rows, columns, R = sums(case, f, g)
    total = float(a.sum())
    e = float(max((rows - a).abs().sum(), (columns - b).abs().sum())) / total
    unit = torch.finfo(case.x.dtype).eps
    w = max(1e-6, 16 * unit * float(f.abs().max() + g.abs().max()) / case.eps)
    r = 128 * unit * R
    ratios = {"error": e / (got.result.marginal_error + w), "flag": 0.0 if got.flag else 9.0}
    converged = got.result.converged
    if converged:
        ratios["converged"] = e / (case.tol + w)
    apart = [
        (s - t).abs().sum() for s, t in zip(got.result.marginals, (rows, columns), strict=True)
    ]
    apart.append((got.result.apply(torch.ones_like(got.result.potentials[1])) - rows).abs().sum())
    ratios["sums"] = float(max(apart)) / total / (max(e, got.result.marginal_error) + w)
    method = "streamed" if large else "dense"
    start = [v.double() for v in got.potentials]
    right = Answer(case, method, case.double(), 1e-5 if large else 1e-7, start)
    line["seconds_other"] = round(right.seconds, 3)
    gap = right.result.duality_gap
    low, high = right.value - gap, right.value + gap
    line["proven"] = proven = gap <= PROVEN * abs(right.value) + r
    ratios["above"] = max(0.0, got.value - high) / (r + case.eps * case.tol)
    if proven and converged and got.all_converged:
        terms = [got.value, right.value - right.S]  # OT(a, a) / 2 + OT(b, b) / 2 is the difference
        deltas = [min(20 * case.tol * abs(t), 2 * case.tol * (R + case.eps)) for t in terms]
        ratios["value"] = max(0.0, low - got.value) / (deltas[0] + r)
        ratios["gap"] = abs(got.value - right.value) / (got.result.duality_gap + gap + r)
        ratios["divergence"] = abs(got.S - right.S) / (sum(deltas) + 2 * r)
        plans = sum(math.sqrt(3 * (d + r) / case.eps) + case.tol + w for d in deltas)
        error = float((got.grad.double() - right.grad).norm(dim=1).sum())
        ratios["gradient"] = error / (2 * math.sqrt(R) * plans)
        relative = (got.grad.double() - right.grad).norm() / right.grad.norm()
        line["gradient error"] = float(f"{float(relative):.2g}")
    line["ratios"] = {k: float(f"{v:.3g}") for k, v in ratios.items()}
    line["error"] = [float(f"{v:.3g}") for v in (e, got.result.marginal_error, w)]


def summary(lines: list[dict[str, Any]]) -> str:
    errors = sorted(line["gradient error"] for line in lines if "gradient error" in line)
    text = report(lines)
    if errors:
        high = errors[int(0.9 * (len(errors) - 1))]
        median = statistics.median(errors)
        text += f"\n\nRelative error of the divergence's gradient: median {median:.1g}"
        text += f", 90% {high:.1g}, largest {errors[-1]:.1g}."
    both = [ln for ln in lines if "seconds_other" in ln and "seconds" in ln]
    if both:
        own, other = (sum(ln[k] for ln in both) for k in ("seconds", "seconds_other"))
        text += f"\nCPU seconds: {own:.0f}, of the solves that they are compared with {other:.0f}."
    return text


def main() -> int:
    parser = arguments(__doc__, count=300)
    parser.add_argument("--large", type=int, default=0, help=f"problems of {LARGE} points in place")
    args = parser.parse_args()
    args.count = args.large or args.count
    judged = functools.partial(examine, large=args.large > 0)
    return run(args, "tests.multiscale_fuzz", judged, summary)


if __name__ == "__main__":
    sys.exit(main())
