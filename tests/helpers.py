"""Random clouds, weights and layouts, and comparisons with the oracle."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from backends import EMULATED
from torch import Tensor

import otloss
from otloss import costs, ops

COSTS = tuple(costs.COSTS)
DTYPES = (torch.float32, torch.float64)
METHODS = ("dense", "streamed", "reference")
WEIGHTS = ("uniform", "random", "wide", "padded")
LAYOUTS = ("contiguous", "strided", "transposed", "expanded")
# unbalanced=: soft, of different strength, and with a constraint on either side.
STRENGTHS = (0.3, (2.0, 0.1), (None, 0.5), (0.5, None))

Strength = float | tuple[float | None, float | None]


def name(value: Any) -> str:
    """Readable test ids for dtypes and functions."""
    return value.__name__ if callable(value) else str(value).removeprefix("torch.")


def randn(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def rand(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=rng, dtype=torch.float64).to(dtype)


def pick(rng: torch.Generator, low: int, high: int) -> int:
    """A whole number in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=rng))


@dataclass
class Clouds:
    x: Tensor
    y: Tensor
    a: Tensor | None
    b: Tensor | None

    def inputs(self) -> list[Tensor]:
        return [t for t in vars(self).values() if t is not None]

    def weights(self) -> tuple[Tensor, Tensor]:
        """Uniform ones too, as tensors without a gradient."""
        uniform = (torch.full_like(t[..., 0], 1 / t.shape[-2]).detach() for t in (self.x, self.y))
        a, b = (u if w is None else w for u, w in zip(uniform, (self.a, self.b), strict=True))
        return a, b

    def require_grad(self) -> Clouds:
        for t in self.inputs():
            t.requires_grad_()
        return self

    def each(self, function: Callable[[Tensor], Tensor]) -> Clouds:
        return Clouds(*[None if t is None else function(t) for t in vars(self).values()])

    def double(self) -> Clouds:
        """The same numbers for the oracle: new float64 leaves."""
        return self.each(lambda t: t.detach().cpu().double().clone())

    def to(self, where: str | torch.dtype) -> Clouds:
        return self.each(lambda t: t.to(where))

    def item(self, index: int) -> Clouds:
        """One problem of a batch, as new leaves."""
        return self.each(lambda t: t.detach()[index])

    def swapped(self) -> Clouds:
        return Clouds(self.y, self.x, self.b, self.a)

    def loss(self, eps: float, *, debiased: bool = True, **options: Any) -> Tensor:
        function = otloss.sinkhorn_divergence if debiased else otloss.sinkhorn_loss
        return function(self.x, self.y, eps, a=self.a, b=self.b, **options)

    def energy(self, **options: Any) -> Tensor:
        return otloss.energy_distance(self.x, self.y, a=self.a, b=self.b, **options)

    def solve(self, eps: float, **options: Any) -> otloss.OTResult:
        return otloss.solve_sample(self.x, self.y, eps, a=self.a, b=self.b, **options)

    def grads(self, value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value.sum(), self.inputs())


def clouds(
    rng: torch.Generator,
    n: int,
    m: int,
    d: int,
    *,
    weights: str = "uniform",
    batch: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Clouds:
    """Two clouds that overlap without being alike, of any kind of weights."""
    lead = () if batch is None else (batch,)
    x = randn(rng, *lead, n, d)
    y = 0.7 * randn(rng, *lead, m, d) + 0.5
    a, b = (make_weights(rng, (*lead, size), weights) for size in (n, m))
    if weights == "padded":
        assert a is not None
        assert b is not None
        x = torch.where(a[..., None] > 0, x, 1e6 * randn(rng, *x.shape))
        y = torch.where(b[..., None] > 0, y, 1e6 * randn(rng, *y.shape))
    return Clouds(x, y, a, b).to(dtype)


def make_weights(rng: torch.Generator, shape: tuple[int, ...], kind: str) -> Tensor | None:
    """Weights that sum to 1 over the last dimension."""
    if kind == "uniform":
        return None
    w = 0.1 + rand(rng, *shape)
    if kind == "wide":
        w = 10 ** (-8 * rand(rng, *shape))
    if kind == "padded" and shape[-1] > 1:
        w = w * (rand(rng, *shape) < 0.7)
        w[..., pick(rng, 0, shape[-1] - 1)] = 1.0  # never all 0
    return w / w.sum(-1, keepdim=True)


def relaid(t: Tensor, layout: str) -> Tensor:
    """The same shape in another layout; only ``expanded`` changes the numbers (all rows alike)."""
    if layout == "contiguous":
        return t
    if layout == "strided":
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if layout == "transposed":
        return t.mT.contiguous().mT if t.dim() > 1 else relaid(t, "strided")
    return t[:1].expand(t.shape)


def scaled(strength: Strength, unit: float) -> Strength:
    """unbalanced= in other units of cost."""
    if isinstance(strength, tuple):
        x, y = (None if rho is None else unit * rho for rho in strength)
        return x, y
    return unit * strength


def rho(strength: Strength) -> tuple[float, float]:
    """(rho_x, rho_y), infinite for a constraint."""
    pair = strength if isinstance(strength, tuple) else (strength, strength)
    x, y = (math.inf if value is None else value for value in pair)
    return x, y


def unequal(c: Clouds, ratio: float, strength: Strength | None = 0.0) -> Clouds:
    """With `ratio` times as much weight on y as on x; as it was for no strength."""
    a, b = c.weights()
    return c if strength is None else Clouds(c.x, c.y, a, ratio * b)


def close(
    got: Any, expected: Any, tol: float, scale: float | Tensor | None = None, floor: float = 0.0
) -> None:
    """|got - expected| <= tol * scale in the Euclidean norm, of each of several tensors; scale is
    |expected| + floor by default."""
    if not isinstance(got, Tensor):
        for one, other in zip(got, expected, strict=True):
            close(one, other, tol, scale, floor)
        return
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    assert got.shape == expected.shape, (got.shape, expected.shape)
    size = float(expected.norm() + floor if scale is None else scale)
    error = float((got - expected).norm())
    assert error <= tol * size, f"error {error:.3g}, allowed {tol:.3g} * {size:.3g}"


def agree(one: Any, other: Any) -> None:
    """The values of two results of one problem, within what their certificates allow."""
    apart = float(one.value) - float(other.value)
    gaps = one.duality_gap + other.duality_gap
    size = abs(float(one.value)) + abs(float(other.value)) + gaps
    allowed = gaps + 64 * torch.finfo(one.value.dtype).eps * size
    assert abs(apart) <= allowed, f"apart by {apart:.3g}, allowed {allowed:.3g}"


def simplex(logits: Tensor) -> Tensor:
    """Weights of total 1 from free parameters: perturbing these keeps the problem balanced."""
    return logits.softmax(-1)


def covering(size: int, *values: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Some of the product of the values, in which every combination of `size` factors occurs.

    Greedy, in a fixed order: first the cases that bring many combinations that are new."""
    places = list(itertools.combinations(range(len(values)), min(size, len(values))))
    cases = list(itertools.product(*(range(len(v)) for v in values)))
    random.Random(0).shuffle(cases)
    left = [(case, {(k, *(case[i] for i in k)) for k in places}) for case in cases]
    seen: set[tuple[Any, ...]] = set()
    chosen, least = [], len(places)
    while least:
        waiting = []
        for case, combinations in left:
            new = len(combinations - seen)
            if new >= least:
                seen |= combinations
                chosen.append(case)
            elif new:
                waiting.append((case, combinations))
        left, least = waiting, least // 2
    return [tuple(v[k] for v, k in zip(values, case, strict=True)) for case in sorted(chosen)]


def some_of(names: str, *values: Sequence[Any], quick: int = 2, whole: int = 2) -> Any:
    """parametrize: cases in which all combinations of `quick` factors occur and, marked as slow,
    of `whole` factors. `backend` is served by the fixture of that name."""
    chosen = covering(quick, *values)
    cases = [pytest.param(*case) for case in chosen]
    slow = (
        [case for case in covering(whole, *values) if case not in chosen] if whole > quick else []
    )
    fixtures = ["backend"] if names.startswith("backend") else []
    if fixtures:
        slow += covering(2, EMULATED, *values[1:])
    cases += [pytest.param(*case, marks=pytest.mark.slow) for case in slow]
    return pytest.mark.parametrize(names, cases, ids=name, indirect=fixtures)


def slow_but(names: Iterable[str], *quick: str) -> list[Any]:
    """All of them as parameters, few in the quick suite."""
    slow = pytest.mark.slow
    return [name if name in quick else pytest.param(name, marks=slow) for name in names]


def solved(
    problem: Any,
    init: list[Tensor] | None = None,
    *,
    module: Any = ops,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int = -1,
    trace: bool = False,
    dense: bool = False,
) -> tuple[Any, ...]:
    """Loss, status, f, g, traces and costs of ``ops.problems(...)``."""
    limits = (ops.number(tol), max_iters, n_iters, trace, dense)
    return module.solve(*problem, init or [], *limits)
