"""Random clouds, weights and layouts, and comparisons with the oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otloss import ops

COSTS = ("sqeuclidean", "euclidean", "cosine")
DTYPES = (torch.float32, torch.float64)
METHODS = ("dense", "streamed", "reference")
WEIGHTS = ("uniform", "random", "wide", "padded")
LAYOUTS = ("contiguous", "strided", "transposed", "expanded")
# unbalanced=: soft, of different strength, and with a constraint on either side.
STRENGTHS = (0.3, (2.0, 0.1), (None, 0.5), (0.5, None))

Strength = float | tuple[float | None, float | None]


def name(value: object) -> str:
    """Readable test ids for dtypes."""
    return str(value).removeprefix("torch.")


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
        return [t for t in (self.x, self.y, self.a, self.b) if t is not None]

    def require_grad(self) -> Clouds:
        for t in self.inputs():
            t.requires_grad_()
        return self

    def double(self) -> Clouds:
        """The same numbers for the oracle: new float64 leaves."""
        copies = [None if t is None else t.detach().double().clone() for t in vars(self).values()]
        return Clouds(*copies)

    def item(self, index: int) -> Clouds:
        """One problem of a batch, as new leaves."""
        return Clouds(*[None if t is None else t.detach()[index] for t in vars(self).values()])


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
    return Clouds(*[None if t is None else t.to(dtype) for t in (x, y, a, b)])


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


def unequal(c: Clouds, ratio: float) -> Clouds:
    """The same with `ratio` times as much weight on y."""
    n, m = c.x.shape[-2], c.y.shape[-2]
    a = torch.full_like(c.x[..., 0], 1 / n) if c.a is None else c.a
    b = torch.full_like(c.y[..., 0], 1 / m) if c.b is None else c.b
    return Clouds(c.x, c.y, a, ratio * b)


def close(got: Tensor, expected: Tensor, tol: float, scale: float | Tensor | None = None) -> None:
    """|got - expected| <= tol * scale in the Euclidean norm; scale is |expected| by default."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape, (got.shape, expected.shape)
    size = float(expected.norm() if scale is None else scale)
    error = float((got - expected).norm())
    assert error <= tol * size, f"error {error:.3g}, allowed {tol:.3g} * {size:.3g}"


def simplex(logits: Tensor) -> Tensor:
    """Weights of total 1 from free parameters: perturbing these keeps the problem balanced."""
    return logits.softmax(-1)


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
