"""Random problems against a float64 oracle that proves itself (tests/certified.py).

    python -m tests.fuzz --out results.jsonl --count 20000      resumes where the file ends
    python -m tests.fuzz --seed 1234 --count 1                  one problem again, in full
    python -m tests.fuzz --report results.jsonl                 the table

Every seed is one problem: clouds, weights, cost, eps, options and a call, drawn over the whole range
that is accepted. Of the answer the following is demanded. OT is the optimal value, known to lie in
[low, high]; J the value returned; m the plan's mass, R = max C - min C, G the largest gradient of the
cost between two points, u the machine epsilon of the dtype, e the marginal error of the potentials
returned, in float64. Rounding: r = 64 u (|J| + m max C), with the bound of C for max C, and in a plan
16 u k, k = 4 + (max|f| + max|g| + max C) / eps. delta is how far a dual value may be below OT.

check       | bound
refused     | ValueError only for eps < 4 u max C (where costs are not stored: their upper bound); any
            | other exception, a warning beside ConvergenceWarning, NaN or infinity is a failure
flag        | a ConvergenceWarning exactly where `converged` is False
converged   | if `converged`, e <= 1.1 tol, and 8 u max C / eps more where costs are made from points
error       | |marginal_error - e| <= 0.1 e + 16 u k
above       | J <= high + r: it is a dual value, converged or not
value       | if converged, J >= low - delta - r, with delta the smaller of 2 tol m (R + eps) (the dual
            | is concave, potentials differ by R at most) and, balanced, 20 tol |J| (docs/solver.md)
gap         | |J - OT| <= duality_gap, but for rounding in float64
transport   | R (|P - P*| + e m) + r, where |P - P*| <= sqrt(2 m delta / eps) in L1 (Pinsker), delta that
            | of the potentials returned, or if they are not the one of "value"
plan        | gradient in C: that L1 distance + 16 u k m
points      | gradient in x and y, norms summed over points: G times the former
implicit    | the same for transport values: times the conditioning of the linear system
weights     | as dual potentials, the gradients are within delta + r of OT; <a, da> + <b, db> is the
            | derivative of a value whose weights grow together
empty bins  | the gradient in a weight of 0 is the softmin of the other potential, within eps tol m
            | times the largest density of the plan there, and rounding
padding     | gradient 0 at points of weight 0 whose coordinates are NaN
unrolled    | L iterations: 16 u L m max C in the value; in gradients relative L times k / m more

Where the oracle's interval is wider than 1e-6 of its value the problem is "unproven": the bounds are
wider by the interval.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import certified
import oracle
from certified import Array, Proof

import otloss

Rng = np.random.Generator
U64 = 2.0**-52
PROVEN = 1e-6
UNIT = {torch.float32: 2.0**-23, torch.float64: U64}

# ------------------------------------------------------------------------------------ the problem


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
    def C(self) -> Tensor:
        """(B, n, m), what ``solve`` is given."""
        cost = self.cost if callable(self.cost) else functools.partial(oracle.cost, name=self.cost)
        both = zip(self.x.nan_to_num(), self.y.nan_to_num(), strict=True)
        return torch.stack([cost(x, y) for x, y in both])

    def kept(self, C: Tensor, k: int) -> Tensor:
        """Without rows and columns of weight 0."""
        return _kept(_kept(C, self.a, k).mT, self.b, k).mT

    @property
    def balanced(self) -> bool:
        return math.isinf(self.rho[0]) and math.isinf(self.rho[1])

    @property
    def transport(self) -> bool:
        return self.options["objective"] == "transport"

    def rounded(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Totals that differ from 1 or from one another by the rounding of weights are equal."""

        def alike(one: Tensor, other: Any) -> bool:
            return abs(float(one / other) - 1) <= 8 * UNIT[self.x.dtype]

        a, b = (w / w.sum() if alike(w.sum(), 1.0) else w for w in (a, b))
        return a, b * (a.sum() / b.sum()) if alike(a.sum(), b.sum()) else b

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """C of a pair (n, d), (m, d) in float64, differentiable."""
        if isinstance(self.cost, str):
            return oracle.cost(x.double(), y.double(), self.cost)
        return self.cost(x, y).double()  # what it returns in its own dtype is the problem

    def pairs(self, k: int) -> list[tuple[float, Tensor, Tensor, Tensor, Tensor, float, float]]:
        """(coefficient, x, y, a, b, rho_x, rho_y) of problem k, without points of weight 0."""
        x, y = self.x[k], self.y[k]
        a, b = (_weights(w, t, k) for w, t in ((self.a, x), (self.b, y)))
        x, a, y, b = x[a > 0], a[a > 0], y[b > 0], b[b > 0]
        if self.balanced:
            b = b * (a.sum() / b.sum())
        p, q = self.rho
        between = [(1.0, x, y, a, b, p, q)]
        own = [(-0.5, x, x, a, a, p, p), (-0.5, y, y, b, b, q, q)]
        return between + (own if self.call == "sinkhorn_divergence" else [])


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
        case.rho = (rho[0], rho[0]) if rng.random() < 0.4 and max(rho) < math.inf else tuple(rho)
    case.options = _draw_options(rng, case, method, dtype)
    names = ("C", "a", "b") if call == "solve" else ("x", "y", "a", "b")
    given = {"a": case.a, "b": case.b, "x": x, "y": y, "C": x}
    case.leaves = tuple(k for k in names if given[k] is not None and rng.random() < 0.8)
    if call in CALLS[2:] and case.options["n_iters"] is None and rng.random() < 0.1:
        case.init = 10 ** rng.uniform(-2, 3)
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
        given = {"C": case.C, "a": case.a, "b": case.b}
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


# ------------------------------------------------------------------------------------ the judgement


@dataclass
class Term:
    """One of the problems of a call, solved by the oracle."""

    coefficient: float
    x: Tensor
    y: Tensor
    C: Array
    proof: Proof
    exactly: Proof  # with the totals that the weights have, not what they were rounded from
    steepest: float  # G
    unit: float
    largest: float  # bound of |C| and of potentials to start from, for rounding

    @property
    def spread(self) -> float:
        return float(self.C.max() - self.C.min())

    @property
    def mass(self) -> float:
        p = self.proof.problem
        return max(self.proof.mass, float(p.a.sum()) if p.balanced else 0.0)

    @property
    def rounding(self) -> float:
        return 64 * self.unit * (abs(self.proof.low) + self.mass * self.largest)

    def promise(self, tol: float) -> float:
        """How far below OT a converged dual value may be."""
        first = 2 * tol * self.mass * (self.spread + self.proof.problem.eps)
        return min(first, 20 * tol * abs(self.proof.high)) if self.proof.problem.balanced else first

    def apart(self, delta: float) -> float:
        """The L1 distance of a plan whose dual value is delta below OT from the oracle's."""
        eps, width = self.proof.problem.eps, self.proof.width
        return math.sqrt(3 * self.mass * max(delta, 0) / eps) + math.sqrt(
            3 * self.mass * width / eps
        )

    def noise(self, f: Array, g: Array) -> float:
        """Relative rounding of the entries of a plan."""
        size = float(np.abs(f).max() + np.abs(g).max()) + self.largest
        return self.unit * (64 + 16 * size / self.proof.problem.eps)


def make_term(case: Case, pair: tuple[Any, ...], k: int) -> Term:
    coefficient, x, y, a, b, p, q = pair
    with torch.no_grad():
        C = case.matrix(x, y).numpy()
        if case.call == "solve":
            C = case.kept(case.C[k], k).double().numpy()
    problem = certified.Problem(C, a.numpy(), b.numpy(), case.eps, p, q)
    a, b = case.rounded(a, b)
    proof = certified.solve(certified.Problem(C, a.numpy(), b.numpy(), case.eps, p, q))
    exactly = certified.prove(problem, proof.f, proof.g)
    if problem.balanced and not case.balanced:  # a self problem, with the KL of the others
        mass = float(a.sum())
        proof.low, proof.high = (v + case.eps * mass * (mass - 1) for v in (proof.low, proof.high))
    largest = float(np.abs(C).max())
    if isinstance(case.cost, str) and case.call != "solve":
        largest = {"sqeuclidean": largest, "euclidean": largest, "cosine": 2.0}[case.cost]
    largest += 4 * case.init * case.eps
    return Term(
        coefficient, x, y, C, proof, exactly, _steepest(case, x, y, C), UNIT[case.x.dtype], largest
    )


def _steepest(case: Case, x: Tensor, y: Tensor, C: Array) -> float:
    if case.cost == "sqeuclidean":
        return 2 * math.sqrt(C.max())
    if case.cost == "euclidean":
        return 1.0
    if case.cost == "cosine":
        norms = torch.cat([x, y]).double().norm(dim=-1)
        return float(1 / norms[norms > 0].min()) if bool((norms > 0).any()) else 0.0
    n, m = len(x), len(y)
    u = x.double().repeat_interleave(m, 0)[:, None].requires_grad_()
    v = y.double().repeat(n, 1)[:, None].requires_grad_()
    grads = torch.autograd.grad(case.cost(u, v).sum(), (u, v))
    return max(float(t.norm(dim=-1).max()) for t in grads)


class Judge:
    """Collects the ratio of each deviation to its bound; more than 1 is a failure."""

    def __init__(self, case: Case, answer: Answer) -> None:
        self.case, self.answer = case, answer
        self.ratios: dict[str, float] = {}
        self.notes: list[str] = []
        self.proven = True

    def check(self, name: str, deviation: float, bound: float) -> None:
        ratio = deviation / max(bound, 1e-300) if deviation > 0 else 0.0
        ratio = math.inf if math.isnan(deviation) or math.isnan(bound) else ratio
        if ratio > 1:
            self.notes.append(f"{name}: {deviation:.3g}, allowed {bound:.3g}")
        self.ratios[name] = max(self.ratios.get(name, 0.0), ratio)

    def demand(self, name: str, right: bool, note: str) -> None:
        self.check(name, 0.0 if right else math.inf, 1.0)
        if not right:
            self.notes.append(note)

    # ------------------------------------------------------------------------------ the whole call

    def judge(self) -> str:
        case, answer = self.case, self.answer
        if answer.raised is not None:
            return self.refusal(answer.raised)
        self.demand("warnings", not answer.other, f"{answer.other}")
        tensors = [answer.value, *answer.grads.values()]
        finite = all(bool(t.isfinite().all()) for t in tensors)
        self.demand("finite", finite, "NaN or infinity in the value or a gradient")
        if case.options["n_iters"] is None:
            right = answer.warned != all(answer.converged)
            self.demand("flag", right, f"converged {answer.converged}, warned {answer.warned}")
        if finite:
            for k in range(len(case.x)):
                self.problem(k)
        if case.options["n_iters"] is not None:
            return "iterations"
        return "converged" if all(answer.converged) else "not converged"

    def refusal(self, error: Exception) -> str:
        case = self.case
        unit, bound, largest = UNIT[case.x.dtype], 0.0, 0.0
        for k in range(len(case.x)):
            for _, x, y, *_ in case.pairs(k):
                with torch.no_grad():
                    largest = max(largest, float(case.matrix(x, y).abs().max()))
                norms = [float(t.double().norm(dim=-1).max()) for t in (x, y)]
                power = {"sqeuclidean": 2, "euclidean": 1, "cosine": 0}.get(case.cost)
                bound = max(bound, 0.0 if power is None else sum(norms) ** power)
        stored = case.options["method"] == "dense" and case.cost != "cosine"
        limit = 4 * unit * (largest if stored else max(largest, bound))
        right = isinstance(error, ValueError) and "can resolve" in str(error)
        right &= case.eps < 1.01 * limit
        if isinstance(error, ValueError) and "overflow" in str(error):
            right = any(self.overflows(k) for k in range(len(case.x)))
        self.demand("refused", right, self.answer.trace[-1500:])
        return "refused"

    def overflows(self, k: int) -> bool:
        """Negative costs and a weak penalty make plans of any mass."""
        terms = [make_term(self.case, pair, k) for pair in self.case.pairs(k)]
        most = 1e-3 * torch.finfo(self.case.x.dtype).max
        return not all(t.mass * t.largest < most and abs(t.proof.low) < most for t in terms)

    # ---------------------------------------------------------------------- problem k of the batch

    def problem(self, k: int) -> None:
        case = self.case
        if case.options["n_iters"] is not None:
            self.iterations(k)
            return
        terms = [make_term(case, pair, k) for pair in case.pairs(k)]
        widths = [t.proof.width / max(abs(t.proof.low), t.mass * t.spread, 1e-300) for t in terms]
        self.proven &= all(w <= PROVEN for w in widths)
        value = float(self.answer.value[k])
        converged = self.answer.converged[k]
        tol = case.options["tol"]
        deltas: list[float] | None = [t.promise(tol) for t in terms] if converged else None
        if self.answer.f is not None:
            deltas = [self.potentials(k, terms[0])]
        if not case.transport:
            self.value(k, terms, value, converged)
        if not self.proven:
            return
        if deltas is None:
            if len(terms) > 1 or case.transport:
                return
            deltas = [max(0.0, terms[0].proof.high - value) + terms[0].rounding]
        self.gradients(k, terms, value, deltas)

    def value(self, k: int, terms: list[Term], value: float, converged: bool) -> None:
        tol, eps = self.case.options["tol"], self.case.eps
        low = sum(
            t.coefficient * (t.proof.low if t.coefficient > 0 else t.proof.high) for t in terms
        )
        high = sum(
            t.coefficient * (t.proof.high if t.coefficient > 0 else t.proof.low) for t in terms
        )
        if len(terms) > 1 and not self.case.balanced:
            p = terms[0].proof.problem
            low += eps / 2 * (p.a.sum() - p.b.sum()) ** 2
            high += eps / 2 * (p.a.sum() - p.b.sum()) ** 2
        r = sum(t.rounding for t in terms)
        if len(terms) > 1:  # eps times masses cancels on paper
            r = 64 * terms[0].unit * (abs(low) + sum(t.mass * t.largest for t in terms))
            r += 64 * 2.0**-63 * sum(abs(t.proof.low) for t in terms)
        up = sum(t.promise(tol) for t in terms if t.coefficient < 0) / 2
        down = sum(t.promise(tol) for t in terms if t.coefficient > 0)
        if converged or len(terms) == 1:
            self.check("above", value - high, up + r)
        if converged:
            self.check("value", low - value, down + r)
        if self.answer.gap is not None:
            exactly, p = terms[0].exactly, terms[0].exactly.problem
            masses = terms[0].mass + float(p.a.sum() * p.b.sum())
            gap = self.answer.gap[k] + r * U64 / terms[0].unit + 16 * U64 * eps * masses
            self.check("gap", max(value - exactly.high, exactly.low - value), gap)

    def potentials(self, k: int, term: Term) -> float:
        """Checks of the potentials returned; how far their dual value is below OT."""
        case, answer, p = self.case, self.answer, term.proof.problem
        f, g = (self.kept(v[k], w, k) for v, w in ((answer.f, case.a), (answer.g, case.b)))
        with np.errstate(all="ignore"):
            P = certified.plan(p, f, g)
            A, B = certified.wanted(p.a, f, p.rho_x), certified.wanted(p.b, g, p.rho_y)
            rows, columns = np.abs(P.sum(1) - A).sum(), np.abs(P.sum(0) - B).sum()
            e = float(max(rows / max(A.sum(), 1e-300), columns / max(B.sum(), 1e-300)))
            delta = certified.gap_of(p, term.proof.P, f, g)
        self.check("error", abs(answer.error[k] - e), 0.1 * e + term.noise(f, g))
        if answer.converged[k]:  # costs made from points have a rounding of their own
            made = 8 * term.unit * term.largest / case.eps if case.call == "solve_sample" else 0.0
            if made < 1:
                self.check("converged", e, 1.1 * case.options["tol"] + 64 * U64 + made)
        return delta if math.isfinite(delta) else math.inf

    def kept(self, v: Tensor, w: Tensor | None, k: int) -> Array:
        return (v if w is None else v[w[k] > 0]).numpy()

    # -------------------------------------------------------------------------------- its gradients

    def gradients(self, k: int, terms: list[Term], value: float, deltas: list[float]) -> None:
        case = self.case
        implicit = case.transport and case.options["backward"] != "envelope"
        weights, bounds = [], []  # of the gradients in the cost matrices
        for term, delta in zip(terms, deltas, strict=True):
            apart = term.apart(delta)
            noise = term.noise(term.proof.f, term.proof.g)
            if noise > 0.5:
                return
            W, factor = term.proof.P, 1.0
            if implicit:
                if term.C.size > 10_000:
                    return
                W, factor = implicit_gradient(term)
                if not factor < 1e30:
                    return
                noise += 1e-12 if term.unit == U64 else 1e-7  # what conjugate gradients leave
            weights.append(term.coefficient * W)
            # Points are sums that cancel where a cloud is small beside the other.
            noise *= max(t.steepest for t in terms) / max(term.steepest, 1e-300)
            bounds.append(abs(term.coefficient) * factor * (apart + noise * term.mass))
            if case.transport and len(terms) == 1:
                e = 2 * certified_error(term, self.answer, self, k)
                bound = term.spread * (apart + e * term.mass)
                off = abs(value - term.proof.transport())
                self.check(
                    "transport", off, bound + noise * term.mass * term.largest + term.rounding
                )
        name = "implicit" if implicit else "plan"
        self.in_costs(k, terms, weights, bounds, name)
        if not case.transport:
            self.in_weights(k, terms, value, deltas)

    def in_costs(
        self, k: int, terms: list[Term], W: list[Array], bounds: list[float], name: str
    ) -> None:
        """Gradients in C or in the points against sum W dC."""
        case, grads = self.case, self.answer.grads
        if "C" in grads:
            got = grads["C"][k]
            self.check(name, float(np.abs(case.kept(got, k).numpy() - W[0]).sum()), bounds[0])
        own = {"x": (case.x, case.a), "y": (case.y, case.b)}
        leaves = {s: _kept(t[k], w, k).double().requires_grad_() for s, (t, w) in own.items()}
        chosen = [("x", "y"), ("x", "x"), ("y", "y")][: len(terms)]
        total = sum(
            (torch.from_numpy(V) * self.double_matrix(leaves[i], leaves[j])).sum()
            for V, (i, j) in zip(W, chosen, strict=True)
        )
        expected = dict(zip("xy", torch.autograd.grad(total, list(leaves.values())), strict=True))
        for side in {"x", "y"} & set(grads):
            bound = sum(
                b * t.steepest * (i == side) + b * t.steepest * (j == side)
                for b, t, (i, j) in zip(bounds, terms, chosen, strict=True)
            )
            got = grads[side][k]
            off = (_kept(got, own[side][1], k) - expected[side]).norm(dim=-1).sum()
            label = "points" if name == "plan" else name
            self.check(label, float(off), bound)
            if own[side][1] is not None:
                padding = got[own[side][1][k] == 0]
                self.demand("padding", not bool(padding.any()), "a gradient at a point of weight 0")

    def double_matrix(self, x: Tensor, y: Tensor) -> Tensor:
        cost = self.case.cost
        return oracle.cost(x, y, cost) if isinstance(cost, str) else cost(x, y)

    def in_weights(self, k: int, terms: list[Term], value: float, deltas: list[float]) -> None:
        case, grads = self.case, self.answer.grads
        p, eps, unit = terms[0].proof.problem, case.eps, terms[0].unit
        r = sum(t.rounding + t.proof.width for t in terms)
        allowed = sum(deltas) * (1 if len(terms) == 1 else 8) + r
        sides = [("a", case.a, p, 0), ("b", case.b, p.transposed(), 1)]
        both = []
        for name, w, q, own in sides:
            if name not in grads:
                continue
            grad = _kept(grads[name][k], w, k).numpy()
            both.append(float((q.a * grad).sum()))
            if len(terms) > 1:
                grad = grad + self.weight_gradient(terms[1 + own].proof) / 2
            if not case.balanced:  # what the total of the weights itself adds
                grad = grad - eps * (q.b.sum() - 1)
                grad = grad - (eps * (q.a.sum() - q.b.sum()) if len(terms) > 1 else 0.0)
            proof = terms[0].proof
            f, P = (proof.f, proof.P) if own == 0 else (proof.g, proof.P.T)
            if math.isinf(q.rho_x):  # a potential: with the best other one nearly optimal
                g = certified.damping(q.rho_y, eps) * certified.softmin(q.C.T, grad, q.a, eps)
                size = float(np.abs(q.a * grad).sum() + np.abs(q.b * g).sum())
                if w is not None:
                    self.empty_bins(k, terms, own, grads[name][k], g)
                if terms[0].noise(grad, g) < 0.1:
                    off = certified.gap_of(q, P, grad, g)
                    self.check("weights", off, allowed + 64 * unit * size)
            else:
                scale, target = q.rho_x + eps, certified.wanted(q.a, f, q.rho_x)
                off = float((q.a * np.abs(grad + scale * np.expm1(-f / q.rho_x))).sum())
                parts = [q.a.sum(), target.sum(), *(t.mass for t in terms)]
                bound = scale * (
                    math.sqrt(3 * max(parts) * allowed / q.rho_x) + 64 * unit * sum(parts)
                )
                self.check("weights", off, bound + 64 * unit * eps * float(q.a.sum() * q.b.sum()))
        if case.balanced and len(both) == 2:
            mass = float(p.a.sum()) if len(terms) == 1 else 0.0
            middle = sum(t.coefficient * (t.proof.low + t.proof.high) / 2 for t in terms)
            right = middle - eps * mass
            self.check("together", abs(sum(both) - right), allowed + 64 * unit * eps * mass)

    def empty_bins(self, k: int, terms: list[Term], own: int, grad: Tensor, g: Array) -> None:
        """The gradient at points of weight 0 that are somewhere: the softmin of the best other
        potential ``g``, which changes by no more than the density of the plan times its error."""
        case, eps, unit = self.case, self.case.eps, terms[0].unit
        clouds, weights = [(case.x, case.y), (case.a, case.b)]
        if own:
            clouds, weights = clouds[::-1], weights[::-1]
        points, empty = clouds[0][k], weights[0][k] == 0
        if case.call == "solve":
            C = (case.C[k].mT if own else case.C[k])[empty]
            C = _kept(C.mT, weights[1], k).mT.double().numpy()
        else:
            empty &= points.isfinite().all(-1)
            other = _kept(clouds[1][k], weights[1], k)
            with torch.no_grad():
                pair = (other, points[empty]) if own else (points[empty], other)
                C = case.matrix(*pair).numpy()
                C = C.T if own else C
        if not bool(empty.any()):
            return
        q = terms[0].proof.problem.transposed() if own else terms[0].proof.problem
        f = certified.softmin(C, g, q.b, eps)
        if not case.balanced:
            f += eps * (q.b.sum() - 1)
        slack = case.options["tol"] * terms[0].mass * density(f, g, C, eps)
        if len(terms) > 1:
            self_term = terms[1 + own].proof
            with torch.no_grad():
                C = case.matrix(points[empty], _kept(points, weights[0], k)).numpy()
            v = (self_term.f + self_term.g) / 2
            v_empty = certified.softmin(C, v, q.a, eps)
            slack += case.options["tol"] * terms[0].mass * density(v_empty, v, C, eps)
            f += eps * (q.a.sum() - q.b.sum()) * (not case.balanced)
            f -= v_empty + eps * (q.a.sum() - 1) * (not case.balanced)
        if slack < 0.1:
            noise = 4 * eps * terms[0].noise(f, g)
            off = float(np.abs(grad[empty].numpy() - f).max())
            self.check("empty bins", off, 4 * eps * slack + noise)

    def weight_gradient(self, proof: Proof) -> Array:
        """Of OT(w, w) in w, exact up to a constant where it is balanced."""
        p = proof.problem
        f = (proof.f + proof.g) / 2
        if math.isinf(p.rho_x):
            one = f + (0.0 if self.case.balanced else p.eps * (p.b.sum() - 1))
        else:
            one = -(p.rho_x + p.eps) * np.expm1(-f / p.rho_x) + p.eps * (p.b.sum() - 1)
        return 2 * one

    # ------------------------------------------------------------------------- a fixed number of them

    def iterations(self, k: int) -> None:
        case = self.case
        L, objective = case.options["n_iters"], case.options["objective"]
        fixed = case.options["backward"] == "envelope"
        own = {"x": (case.x, case.a), "y": (case.y, case.b)}
        leaves = {s: _kept(t[k], w, k).double().requires_grad_() for s, (t, w) in own.items()}
        if case.call == "solve":
            leaves["C"] = case.kept(case.C[k], k).double().requires_grad_()
        chosen = [("x", "y"), ("x", "x"), ("y", "y")]
        rho = None if case.balanced else case.rho
        pairs = case.pairs(k)
        total, scale, noise, steepest = torch.zeros(()).double(), 0.0, 0.0, 0.0
        value = 0.0
        for (coefficient, x, y, a, b, p, q), (i, j) in zip(pairs, chosen, strict=False):
            a, b = case.rounded(a, b)
            C = leaves["C"] if "C" in leaves else self.double_matrix(leaves[i], leaves[j])
            strength = None if rho is None else (p, q)
            found = oracle.unrolled_term(C, a, b, case.eps, objective, L, strength)
            f, g = oracle.iterate(C.detach(), a, b, case.eps, L, (p, q))[-1]
            P = oracle.plan(C.detach(), f, g, a, b, case.eps)
            term = (P * C).sum() if fixed else found.surrogate
            total = total + coefficient * term
            value += coefficient * float(found.value)
            hard = [float(w.sum()) for w, rho_w in ((a, p), (b, q)) if math.isinf(rho_w)]
            mass = max([float(P.sum()), *hard])
            largest = float(C.detach().abs().max()) if case.cost != "cosine" else 2.0
            scale += mass * largest + float((a * f).abs().sum() + (b * g).abs().sum())
            kappa = (float(f.abs().max() + g.abs().max()) + largest) / case.eps
            stretch = 1.0 if fixed else L
            if objective == "transport" and not fixed:
                stretch *= 1 + 2 * largest / case.eps
            unit = UNIT[case.x.dtype]
            noise += 16 * unit * L * (4 + kappa) * stretch * mass
            steepest = max(steepest, _steepest(case, x, y, C.detach().numpy()))
            if objective == "transport":
                scale += 16 * kappa * mass * largest
        if len(pairs) > 1 and not case.balanced and objective == "regularized":
            value += case.eps / 2 * float(pairs[0][3].sum() - pairs[0][4].sum()) ** 2
        mass = max(mass, *(float(pair[3].sum() * pair[4].sum()) for pair in pairs))
        r = 16 * UNIT[case.x.dtype] * L * scale + 64 * U64 * case.eps * mass
        self.check("iterations", abs(float(self.answer.value[k]) - value), r)
        wanted = [s for s in leaves if s in self.answer.grads]
        for side, right in (
            zip(wanted, torch.autograd.grad(total, [leaves[s] for s in wanted])) if wanted else ()
        ):
            got = self.answer.grads[side][k]
            if side == "C":
                self.check("unrolled", float((case.kept(got, k) - right).abs().sum()), 2 * noise)
                continue
            off = float((_kept(got, own[side][1], k) - right).norm(dim=-1).sum())
            self.check("unrolled", off, 2 * noise * steepest)


def _kept(t: Tensor, w: Tensor | None, k: int) -> Tensor:
    return t if w is None else t[w[k] > 0]


def certified_error(term: Term, answer: Answer, judge: Judge, k: int) -> float:
    return answer.error[k] if answer.error is not None else judge.case.options["tol"]


def density(f: Array, g: Array, C: Array, eps: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp((f[:, None] + g - C) / eps).max())


def implicit_gradient(term: Term) -> tuple[Array, float]:
    """d<P, C>/dC at the optimum, and what it multiplies an error of the plan with."""
    proof, C, p = term.proof, term.C, term.proof.problem
    P = certified.plan(p, proof.f, proof.g)
    r, c = P.sum(1), P.sum(0)
    diagonal = np.concatenate([r * (1 + p.eps / p.rho_x), c * (1 + p.eps / p.rho_y)])
    n = len(r)
    M = np.diag(diagonal)
    M[:n, n:], M[n:, :n] = P, P.T
    root = np.sqrt(np.maximum(diagonal, 1e-300))
    values, vectors = np.linalg.eigh(M / root[:, None] / root)
    right = np.concatenate([(P * C).sum(1), (P * C).sum(0)]) / root
    counted = values > (1e-12 if not p.balanced else max(1e-12, 1.5 * values[0]))
    least = float(values[counted].min()) if counted.any() else 1.0
    z = (vectors[:, counted] * (1 / values[counted])) @ (vectors[:, counted].T @ right) / root
    inside = (C - z[:n, None] - z[n:]) / p.eps
    q = float(np.abs(inside).max())
    share = float(min(r.min(), c.min())) / term.mass
    factor = 1 + q + 2 * q / (least * math.sqrt(max(share, 1e-300)))
    return P * (1 - inside), factor


# --------------------------------------------------------------------------------------- the runs


def examine(seed: int) -> dict[str, Any]:
    """All that is to be known of one seed, as a line of the results."""
    start = time.process_time()
    case = draw(seed)
    answer = run(case)
    used = time.process_time() - start
    judge = Judge(case, answer)
    outcome = judge.judge()
    failed = [name for name, ratio in judge.ratios.items() if ratio > 1]
    return {
        "seed": seed, "outcome": outcome, "proven": judge.proven, "failed": failed,
        "ratios": {k: float(f"{v:.3g}") for k, v in judge.ratios.items()}, "notes": judge.notes,
        "case": case.kind, "seconds": round(used, 3),
        "all_seconds": round(time.process_time() - start, 3),
    }  # fmt: skip


def replay(seed: int) -> str:
    return f"python -m tests.fuzz --seed {seed} --count 1"


def seeds_left(out: Path | None, first: int, count: int) -> Iterator[int]:
    done = set()
    if out is not None and out.exists():
        done = {json.loads(line)["seed"] for line in out.read_text().splitlines()}
    return (seed for seed in range(first, first + count) if seed not in done)


def report(lines: list[dict[str, Any]]) -> str:
    """The table of results, in Markdown."""
    outcomes = collections.Counter(line["outcome"] for line in lines)
    text = [f"{len(lines)} problems: " + ", ".join(f"{n} {k}" for k, n in outcomes.most_common())]
    unproven = sum(not line["proven"] for line in lines)
    text += [f"{unproven} that the oracle does not prove to {PROVEN:g}.", ""]
    text += [
        "| check | problems | outside | worst ratio to the bound | 99% |",
        "|---|---:|---:|---:|---:|",
    ]
    names = sorted({name for line in lines for name in line["ratios"]})
    for name in names:
        ratios = sorted(line["ratios"][name] for line in lines if name in line["ratios"])
        outside = sum(ratio > 1 for ratio in ratios)
        high = ratios[int(0.99 * (len(ratios) - 1))]
        text.append(f"| {name} | {len(ratios)} | {outside} | {ratios[-1]:.2g} | {high:.2g} |")
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--out", type=Path, help="JSON lines; seeds in it are not run again")
    parser.add_argument("--report", type=Path, help="only print the table of such a file")
    args = parser.parse_args()
    if args.report is not None:
        print(report([json.loads(line) for line in args.report.read_text().splitlines()]))
        return 0
    torch.set_num_threads(1)
    end, failures, lines = time.monotonic() + args.seconds, 0, []
    for seed in seeds_left(args.out, args.seed, args.count):
        if time.monotonic() > end:
            break
        line = examine(seed)
        lines.append(line)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if line["failed"] or args.count == 1:
            failures += bool(line["failed"])
            print(replay(seed), json.dumps(line, indent=1) if args.count == 1 else line["notes"])
            sys.stdout.flush()
    print(report(lines))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
