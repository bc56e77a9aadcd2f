"""The problems of tests/fuzz: how one is drawn from its seed, and otloss's answer to it."""

from __future__ import annotations

import functools
import math
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import oracle
import torch
from certified import Array
from torch import Tensor

import otloss

Rng = np.random.Generator
UNIT = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def _smooth(x: Tensor, y: Tensor) -> Tensor:
    return ((x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1) + 0.01) ** 0.75


def _bounded(x: Tensor, y: Tensor) -> Tensor:
    return 1 - torch.exp(-(x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1))


def _sheared(x: Tensor, y: Tensor) -> Tensor:
    return (x.unsqueeze(-2) - 0.5 * y.roll(1, -1).unsqueeze(-3)).square().sum(-1)


def _bilinear(x: Tensor, y: Tensor) -> Tensor:
    return -(x.unsqueeze(-2) * y.roll(1, -1).unsqueeze(-3)).sum(-1)


Cost = str | Callable[[Tensor, Tensor], Tensor]
NAMED = ("sqeuclidean", "euclidean", "cosine")
CALLABLE = (_smooth, _bounded, _sheared, _bilinear)
CALLS = ("sinkhorn_loss", "sinkhorn_divergence", "solve", "solve_sample")
CLOUDS = ("normal", "uniform", "clusters", "line", "lattice", "repeated", "same", "some zero")
WEIGHTS = ("none", "uniform", "random", "wide", "zeros", "padded")


@dataclass
class Case:
    seed: int
    call: str
    x: Tensor  # (B, n, d)
    y: Tensor
    a: Tensor | None  # (B, n)
    b: Tensor | None
    cost: Cost
    eps: float
    rho: tuple[float, float]
    options: dict[str, Any]
    batched: bool
    leaves: tuple[str, ...]  # what wants a gradient
    init: float  # size of random potentials to start from, over eps
    kind: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def costs(self) -> Tensor:
        """(B, n, m), what ``solve`` is given."""
        cost = self.cost if callable(self.cost) else functools.partial(oracle.cost, name=self.cost)
        both = zip(self.x.nan_to_num(), self.y.nan_to_num(), strict=True)
        return torch.stack([cost(x, y) for x, y in both])

    def kept(self, C: Tensor, k: int) -> Tensor:
        """Without rows and columns of weight 0."""
        return kept(kept(C, self.a, k).mT, self.b, k).mT

    @property
    def balanced(self) -> bool:
        return math.isinf(self.rho[0]) and math.isinf(self.rho[1])

    @property
    def symmetric(self) -> bool:
        return self.cost not in (_sheared, _bilinear)

    @property
    def transport(self) -> bool:
        return self.options["objective"] == "transport"

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """C of a pair (n, d), (m, d) in float64, differentiable."""
        if isinstance(self.cost, str):
            return oracle.cost(x.double(), y.double(), self.cost)
        return self.cost(x, y).double()  # what it returns in its own dtype is the problem

    def pairs(self, k: int, *, exactly: bool = False) -> list[Pair]:
        """Of problem k, without points of weight 0. Totals that differ from 1 or from one another
        by the rounding of weights are equal, unless those are to be taken ``exactly``."""
        x, y = self.x[k], self.y[k]
        a, b = (_weights(w, t, k) for w, t in ((self.a, x), (self.b, y)))
        x, a, y, b = x[a > 0], a[a > 0], y[b > 0], b[b > 0]

        def alike(one: Tensor, other: float) -> bool:
            return not exactly and abs(float(one) / other - 1) <= 8 * UNIT[self.x.dtype]

        a, b = (w / w.sum() if alike(w.sum(), 1.0) else w for w in (a, b))
        if self.balanced or alike(a.sum(), float(b.sum())):
            b = b * (a.sum() / b.sum())
        p, q = self.rho
        pairs = [Pair(1.0, x, y, a, b, p, q)]
        if self.call == "sinkhorn_divergence":
            pairs += [Pair(-0.5, x, x, a, a, p, p), Pair(-0.5, y, y, b, b, q, q)]
        return pairs


class Pair(NamedTuple):
    """One OT problem of a call."""

    coefficient: float
    x: Tensor
    y: Tensor
    a: Tensor  # float64, positive
    b: Tensor
    rho_x: float
    rho_y: float


def kept(t: Tensor, w: Tensor | None, k: int) -> Tensor:
    """Rows of positive weight."""
    return t if w is None else t[w[k] > 0]


def _weights(w: Tensor | None, x: Tensor, k: int) -> Tensor:
    uniform = torch.full_like(x[:, 0], 1 / x.shape[0])
    return (uniform if w is None else w[k]).double()


def _size(rng: Rng, largest: int) -> int:
    return int(np.exp(rng.uniform(0, np.log(largest + 1))))


def _cloud(rng: Rng, kind: str, centres: Array, *shape: int) -> Array:
    z = rng.normal(size=shape)
    if kind == "uniform":
        return rng.uniform(size=shape)
    if kind == "clusters":
        return z + centres[rng.integers(len(centres), size=shape[:-1])]
    if kind == "line":
        return rng.uniform(size=(*shape[:-1], 1)) * centres[0]
    if kind == "lattice":
        return np.round(2 * z)
    if kind == "repeated":
        return z[:, rng.integers(max(1, shape[1] // 4), size=shape[1])]
    if kind == "some zero":
        return z * (rng.random((*shape[:-1], 1)) < 0.7)
    return z


def _draw_weights(rng: Rng, kind: str, *shape: int) -> Array:
    if kind == "uniform":
        return np.ones(shape)
    w = rng.uniform(0.1, 1, size=shape)
    if kind == "wide":
        w = 10 ** rng.uniform(-12, 0, size=shape)
    if kind in ("zeros", "padded"):
        w = w * (rng.random(shape) < 0.7)
        w[..., rng.integers(shape[-1])] = 1.0
    return w


def draw(seed: int) -> Case:
    """The problem of a seed."""
    rng = np.random.default_rng(seed)
    call = rng.choice(CALLS, p=(0.2, 0.4, 0.2, 0.2))
    dtype = torch.float32 if rng.random() < 0.5 else torch.float64
    n, m = _size(rng, 300), _size(rng, 300)
    if rng.random() < 0.01:
        n = _size(rng, 2000)
    d = _size(rng, 100 if n * m < 10_000 else 10)
    B = 1 if rng.random() < 0.7 else int(rng.integers(1, 4))
    batched = B > 1 or rng.random() < 0.2
    method = str(rng.choice(("auto", "dense", "streamed", "reference"), p=(0.4, 0.2, 0.25, 0.15)))
    if method == "reference" and n * m > 2500:
        method = "auto"
    if call == "solve" and method == "streamed":
        method = "dense"
    cost: Cost = str(rng.choice(NAMED))
    if method != "streamed" and rng.random() < 0.25:
        cost, d = CALLABLE[rng.integers(len(CALLABLE))], min(d, 5)

    clouds = str(rng.choice(CLOUDS))
    centres = rng.normal(size=(rng.integers(1, 6), d)) * 10 ** rng.uniform(0, 3)
    scale = 10 ** rng.uniform(-3, 3) if isinstance(cost, str) and rng.random() < 0.5 else 1.0
    offset = rng.normal(size=d) * 10 ** rng.uniform(-2, 3) * (rng.random() < 0.3)
    x = scale * (_cloud(rng, clouds, centres, B, n, d) + offset)
    y = scale * (_cloud(rng, clouds, centres, B, m, d) + offset + rng.normal() * 0.3)
    if clouds == "same":
        y[:, : min(n, m)] = x[:, : min(n, m)]

    kinds = [str(rng.choice(WEIGHTS)) for _ in range(2)]
    balanced = rng.random() < 0.65
    total = 10 ** rng.uniform(-3, 6) if rng.random() < 0.4 and "none" not in kinds else 1.0
    tensors: list[Tensor | None] = []
    for kind, t in zip(kinds, (x, y), strict=True):
        w = None if kind == "none" else _draw_weights(rng, kind, *t.shape[:2])
        if w is not None:
            own = total if balanced or rng.random() < 0.5 else 10 ** rng.uniform(-3, 6)
            w *= own / w.sum(-1, keepdims=True)
            t[w == 0] = np.nan if kind == "padded" else t[w == 0]
        tensors.append(None if w is None else torch.tensor(w).to(dtype))
    case = Case(
        seed, str(call), torch.tensor(x).to(dtype), torch.tensor(y).to(dtype), *tensors, cost,
        1.0, (math.inf, math.inf), {}, batched, (), 0.0,
    )  # fmt: skip

    (_, u, v, *_), *_ = case.pairs(0)
    mean = float(case.matrix(u, v).abs().mean()) or 1.0
    case.eps = mean * 10 ** (rng.uniform(-8, 8) if rng.random() < 0.4 else rng.uniform(-3, 1))
    if not balanced:
        rho = [mean * 10 ** rng.uniform(-3, 4) for _ in range(2)]
        if rng.random() < 0.4:
            rho[rng.integers(2)] = math.inf
        if cost is _bilinear:  # weaker penalties on negative costs give numbers beyond any float
            rho = [max(r, 0.1 * mean) for r in rho]
        case.rho = (rho[0], rho[0]) if rng.random() < 0.4 and max(rho) < math.inf else tuple(rho)
    case.options = _draw_options(rng, case, method, dtype)
    names = ("C", "a", "b") if call == "solve" else ("x", "y", "a", "b")
    given = {"a": case.a, "b": case.b, "x": x, "y": y, "C": x}
    case.leaves = tuple(k for k in names if given[k] is not None and rng.random() < 0.8)
    if call in CALLS[2:] and case.options["n_iters"] is None and rng.random() < 0.1:
        case.init = min(10 ** rng.uniform(-2, 3), 30 * min(case.rho) / case.eps)
    case.kind = {
        "call": case.call, "n": n, "m": m, "d": d, "B": B, "dtype": str(dtype)[6:],
        "method": method, "cost": cost if isinstance(cost, str) else cost.__name__[1:],
        "clouds": clouds, "weights": "/".join(kinds), "eps/C": case.eps / mean,
        "rho/C": [r / mean for r in case.rho], "objective": case.options["objective"],
        "backward": case.options["backward"], "n_iters": case.options["n_iters"],
        "tol": case.options["tol"], "init": case.init, "max_iters": case.options["max_iters"],
    }  # fmt: skip
    return case


def _draw_options(rng: Rng, case: Case, method: str, dtype: torch.dtype) -> dict[str, Any]:
    n_iters = int(rng.integers(1, 20)) if rng.random() < 0.15 else None
    objective = "transport" if rng.random() < 0.3 else "regularized"
    backward = str(rng.choice(("auto", "envelope", "implicit" if n_iters is None else "unrolled")))
    tol = 10 ** rng.uniform(-6 if dtype == torch.float32 else -10, -2)
    most = 200 if method == "reference" else int(rng.choice((1000, 1000, 1000, 20, 5000)))
    pair = tuple(None if math.isinf(r) else r for r in case.rho)
    return {
        "objective": objective, "backward": backward, "n_iters": n_iters, "method": method,
        "tol": float(tol) if rng.random() < 0.7 else 1e-3, "max_iters": most,
        "unbalanced": None if case.balanced else pair,
    }  # fmt: skip


# ------------------------------------------------------------------------------------- the answer


@dataclass
class Answer:
    """One call, with leading batch dimensions everywhere; or its exception."""

    value: Tensor | None = None  # (B,)
    grads: dict[str, Tensor] = field(default_factory=dict)
    converged: list[bool] = field(default_factory=list)
    error: list[float] | None = None  # of results
    gap: list[float] | None = None
    f: Tensor | None = None
    g: Tensor | None = None
    warned: bool = False
    raised: Exception | None = None
    other: list[str] = field(default_factory=list)  # warnings that nobody expects
    trace: str = ""


def run(case: Case) -> Answer:
    answer = Answer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _call(case, answer)
        except Exception as error:  # judged, like everything else
            answer.raised, answer.trace = error, traceback.format_exc()
    for w in caught:
        if issubclass(w.category, otloss.ConvergenceWarning) and "linear system" in str(w.message):
            continue
        if issubclass(w.category, otloss.ConvergenceWarning):
            answer.warned = True
        else:
            answer.other.append(f"{w.category.__name__}: {w.message}")
    return answer


def _call(case: Case, answer: Answer) -> None:
    given = {"x": case.x, "y": case.y, "a": case.a, "b": case.b}
    if case.call == "solve":
        given = {"C": case.costs, "a": case.a, "b": case.b}
    tensors = {k: None if t is None else t.detach().clone() for k, t in given.items()}
    if not case.batched:
        tensors = {k: None if t is None else t[0] for k, t in tensors.items()}
    for k in case.leaves:
        tensors[k].requires_grad_()
    clouds = [tensors[k] for k in (("C",) if case.call == "solve" else ("x", "y"))]
    options = dict(case.options, a=tensors["a"], b=tensors["b"])
    if case.call != "solve":
        options["cost"] = case.cost
    if case.init:
        rng = torch.Generator().manual_seed(case.seed)
        size = case.init * case.eps
        shapes = [(*t.shape[:-2], t.shape[-2]) for t in (case.x, case.y)]
        start = [size * torch.randn(s, generator=rng, dtype=case.x.dtype) for s in shapes]
        options["init"] = tuple(v if case.batched else v[0] for v in start)
    result = getattr(otloss, case.call)(*clouds, case.eps, **options)
    value = result.value if case.call in CALLS[2:] else result
    status = otloss.last_status()
    if case.leaves:
        grads = torch.autograd.grad(value.sum(), [tensors[k] for k in case.leaves])
        batches = [t if case.batched else t[None] for t in grads]
        answer.grads = {k: t.double() for k, t in zip(case.leaves, batches, strict=True)}
    B = len(case.x)
    answer.converged = [status.converged] * B
    if case.call in CALLS[2:]:
        items = (result.converged, result.marginal_error, result.duality_gap)
        lists = [t.tolist() if case.batched else [t] for t in items]
        answer.converged, answer.error, answer.gap = lists
        f, g = result.potentials
        answer.f, answer.g = (t.detach().double().reshape(B, -1) for t in (f, g))
    answer.value = value.detach().reshape(B)
