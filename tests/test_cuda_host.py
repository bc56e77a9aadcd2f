"""The CUDA kernels on the host: csrc/cuda compiled by g++ under an emulation of a GPU.

What runs here is the code that nvcc compiles, launchers included, with fewer threads per block.
See tests/cuda_host/emulation.h for what the emulation does and does not show.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import DTYPES, Strength, name, rand, randn, scaled
from helpers import STRENGTHS as SOFT
from helpers import rho as rho_pair
from torch import Tensor

import otloss
from otloss import ops, reference

ROOT = Path(__file__).parent.parent
REGIMES = ["block", "cluster", "grid", "dense"]
ORDERS = range(5)  # in which threads run, see emulation.h
DIVERGENCE = [0, 1, 0, 0, 1, 1]
HARD = (math.inf, math.inf)  # rho_x, rho_y
STRENGTHS = [HARD, (0.7, 0.3), (math.inf, 0.5), (0.02, math.inf)]
MODES = ["unrolled", "implicit"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Call(ctypes.Structure):
    """A C struct filled by keyword; tensors become their data pointers."""

    def __init__(self, **values: object) -> None:
        pointers = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in values.items()}
        super().__init__(**pointers)
        self.kept = values


def _fields(integers: str, pointers: str) -> list[tuple[str, type]]:
    return [
        *((name, ctypes.c_int64) for name in integers.split()),
        *((name, ctypes.c_void_p) for name in pointers.split()),
    ]


class Rho(ctypes.Structure):
    """How the plan is held to its weights: what csrc/kernels.h calls Strength."""

    _fields_ = [
        ("x", ctypes.c_double),
        ("y", ctypes.c_double),
        ("balanced", ctypes.c_int64),
    ]


def rho_of(rho: tuple[float, float], i: int, j: int) -> Rho:
    """Of the pair (i, j), as in csrc/bindings.cpp."""
    return Rho(rho[i > 0], rho[j > 0], rho == HARD)


class SolveCall(Call):
    _fields_ = [
        ("rho", Rho),
        *_fields("batch n m symmetric", "C a b f g trace value status"),
        *_fields("kind d", "zx zy hx hy"),
    ]


class CostCall(Call):
    _fields_ = _fields(
        "batch n m d symmetric kind",
        "x y a b zx zy hx hy product W V row_sum col_sum Vy grad",
    )


class EnvelopeCall(Call):
    _fields_ = [
        ("rho", Rho),
        *_fields("batch n m", ""),
        ("coefficient", ctypes.c_double),
        *_fields("", "C a b f g grad grad_C grad_a grad_b"),
    ]


class GradientCall(Call):
    _fields_ = [
        *_fields("batch n m L symmetric balanced", ""),
        *((name, ctypes.c_double) for name in ("coefficient", "rho_x", "rho_y")),
        *_fields("", "C a b f g grad grad_f grad_g trace start grad_C grad_a grad_b P status"),
        *_fields("kind d", "zx zy hx hy sum_x product_x sum_y product_y"),
    ]


class Problem(NamedTuple):
    """What a gradient takes, solved on the CPU."""

    costs: list[Tensor]
    weights: list[Tensor]
    pairs: list[int]
    eps: float
    objective: int
    rho: tuple[float, float]
    n_iters: int
    coefficients: list[float]
    init: list[Tensor]
    grad: Tensor
    grad_f: list[Tensor]
    grad_g: list[Tensor]
    f: list[Tensor]
    g: list[Tensor]
    traces: list[Tensor]

    def on_cpu(
        self, *, implicit: bool, costs: bool = True, potentials: bool = True
    ) -> list[Tensor]:
        """As Engine.gradient."""
        seeds = (self.grad_f, self.grad_g) if potentials else ([], [])
        head = (self.grad, *seeds, self.costs, self.weights, self.pairs, self.coefficients)
        tail = (self.eps, *self.rho, self.objective, [int(costs)] * len(self.costs), True)
        if implicit:
            *grads, status = ops.implicit_backward(*head, self.f, self.g, *tail)
        else:
            grads, status = ops.unrolled_backward(*head, self.init, self.traces, *tail), None
        per_pair = [grad for pair in zip(*grads, strict=True) for grad in pair if grad.numel()]
        return per_pair if status is None else [*per_pair, status]


def solved(
    costs: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    eps: float,
    *,
    n_iters: int = -1,
    objective: int = 0,
    rho: tuple[float, float] = HARD,
    init: list[Tensor] | None = None,
) -> Problem:
    like, count, init = costs[0], len(costs), init or []
    generator = torch.Generator().manual_seed(like.shape[-1])

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=like.dtype)

    coefficients = [1.0, -0.5, -0.5, *[0.25] * count][:count]
    _, _, f, g, traces = ops.solve(
        costs, weights, pairs, coefficients, init, eps, *rho, 1e-6, 500, n_iters, objective,
        n_iters > 0,
    )  # fmt: skip
    return Problem(
        costs, weights, pairs, eps, objective, rho, n_iters, coefficients, init,
        random(like.shape[0]),
        [0.1 * random(*v.shape) for v in f],
        [0.1 * random(*v.shape) for v in g],
        f, g, traces,
    )  # fmt: skip


class PointGradientCall(Call):
    _fields_ = [
        *_fields("batch n m symmetric kind d", ""),
        ("coefficient", ctypes.c_double),
        *_fields("", "zx zy hx hy a b f g grad sum product"),
    ]


class Cloud:
    """Points made ready, as csrc/cuda/cost does: centred, or of norm 1. Those of weight 0 are
    padding, if weights are given."""

    def __init__(
        self, points: list[Tensor], kind: int, weights: list[Tensor] | None = None
    ) -> None:
        self.kind = kind
        if weights:
            points = [
                torch.where(w.unsqueeze(-1) > 0, x, 0.0)
                for x, w in zip(points, weights, strict=True)
            ]
        if kind == 2:
            self.norm = [x.norm(dim=-1) for x in points]
            self.z = [torch.nn.functional.normalize(x, dim=-1) for x in points]
        else:
            centre = torch.cat(points, 1).mean(1, keepdim=True)
            self.z = [(x - centre).contiguous() for x in points]
            self.norm = [z.square().sum(-1) for z in self.z]

    def pair(self, i: int, j: int) -> dict[str, object]:
        z, norm = self.z, self.norm
        sides = {"zx": z[i], "zy": z[j], "hx": norm[i], "hy": norm[j]}
        return {"kind": self.kind, "d": z[0].shape[-1], **sides}

    def sums(self, i: int, j: int) -> dict[str, Tensor]:
        """For V 1 and V y of both sides; a cloud against itself has one."""
        out = {}
        for side, c in (("x", i), ("y", j))[: 1 + (i != j)]:
            out[f"sum_{side}"] = torch.full_like(self.norm[c], math.nan)
            out[f"product_{side}"] = torch.full_like(self.z[c], math.nan)
        return out

    def sums_of(self, i: int, j: int, C: Tensor, grad_C: Tensor) -> list[Tensor]:
        """The same from a gradient of the costs."""
        V = 2 * grad_C if self.kind == 0 else grad_C
        if self.kind == 1:
            V = torch.where(C > 0, grad_C / C, 0.0)
        if i == j:
            V = V + V.mT
            return [V.sum(-1), V @ self.z[i]]
        return [V.sum(-1), V @ self.z[j], V.sum(-2), V.mT @ self.z[i]]


class Engine:
    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.engine_error.restype = ctypes.c_char_p

    def configure(
        self, multiprocessors: int = 8, capability: int = 90, shared: int = 232448, order: int = 0
    ) -> None:
        self.library.engine_configure(multiprocessors, capability, ctypes.c_int64(shared), order)

    def check(self, failed: int) -> None:
        if failed:
            raise RuntimeError(self.library.engine_error().decode())

    def solve(
        self,
        costs: list[Tensor] | Cloud,
        weights: list[Tensor],
        pairs: list[int],
        eps: float,
        *,
        tol: float = 1e-3,
        max_iters: int = 1000,
        n_iters: int = -1,
        objective: int = 0,
        init: list[Tensor] | None = None,
        trace: bool = False,
        rho: tuple[float, float] = HARD,
        start: Cloud | None = None,
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Of cost matrices per pair, or of points, without matrices. ``start``: the points of the
        matrices, for a start."""
        P, B, like = len(pairs) // 2, weights[0].shape[0], weights[0]
        values = like.new_full((P, B), math.nan)
        status = torch.full((P, B, 4), math.nan, dtype=torch.float64)
        calls, all_f, all_g, traces = [], [], [], []
        made = costs if isinstance(costs, Cloud) else start
        for p, (i, j) in enumerate(reference.as_pairs(pairs)):
            n, m = weights[i].shape[1], weights[j].shape[1]
            f, g = init[2 * p : 2 * p + 2] if init else (weights[i], weights[j])
            all_f.append(f.clone() if init else torch.full_like(f, math.nan))
            all_g.append(g.clone() if init else torch.full_like(g, math.nan))
            if trace:
                traces.append(like.new_full((B, n_iters, n + m), math.nan))
            calls.append(
                SolveCall(
                    rho=rho_of(rho, i, j),
                    batch=B,
                    n=n,
                    m=m,
                    symmetric=int(i == j),
                    C=None if isinstance(costs, Cloud) else costs[p],
                    **(made.pair(i, j) if made else {}),
                    a=weights[i],
                    b=weights[j],
                    f=all_f[p],
                    g=all_g[p],
                    trace=traces[p] if trace else None,
                    value=values[p],
                    status=status[p],
                )
            )
        self.check(
            self.library.engine_solve(
                int(like.dtype == torch.float64),
                (SolveCall * P)(*calls),
                ctypes.c_int64(P),
                ctypes.c_double(eps),
                ctypes.c_double(tol),
                ctypes.c_int64(max_iters),
                ctypes.c_int64(n_iters),
                objective,
                int(init is not None),
            )
        )
        return values, status, all_f, all_g, traces

    def gradient(
        self,
        p: Problem,
        *,
        implicit: bool,
        costs: bool = True,
        potentials: bool = True,
        made: Cloud | None = None,
    ) -> list[Tensor]:
        """Per pair the gradients of C, a, b, then the status of all pairs if implicit. ``made``:
        points in place of the costs, and of each side V 1 and V y in place of the gradient of C."""
        count, B, like = len(p.costs), p.costs[0].shape[0], p.costs[0]
        status = torch.full((count, B, 2), math.nan, dtype=torch.float64)
        calls, results = [], []
        for q, (i, j) in enumerate(reference.as_pairs(p.pairs)):
            tensors = (p.costs[q], p.weights[i], p.weights[j])
            grads = [torch.full_like(t, math.nan) for t in tensors]
            sums = made.sums(i, j) if made and costs else {}
            calls.append(
                GradientCall(
                    batch=B,
                    n=tensors[1].shape[1],
                    m=tensors[2].shape[1],
                    L=p.n_iters,
                    symmetric=int(i == j),
                    balanced=int(p.rho == HARD),
                    coefficient=p.coefficients[q],
                    rho_x=p.rho[i > 0],
                    rho_y=p.rho[j > 0],
                    C=None if made else tensors[0],
                    a=tensors[1],
                    b=tensors[2],
                    f=p.f[q],
                    g=p.g[q],
                    grad=p.grad,
                    grad_f=p.grad_f[q] if potentials else None,
                    grad_g=p.grad_g[q] if potentials else None,
                    trace=p.traces[q] if p.traces else None,
                    start=p.init[2 * q + 1] if p.init else None,
                    grad_C=grads[0] if costs and not made else None,
                    grad_a=grads[1],
                    grad_b=grads[2],
                    P=None if made else grads[0],
                    status=status[q] if implicit else None,
                    **(made.pair(i, j) if made else {}),
                    **sums,
                )
            )
            results += [*sums.values(), *grads[1:]] if made or not costs else grads
        self.check(
            self.library.engine_gradient(
                int(like.dtype == torch.float64),
                (GradientCall * count)(*calls),
                ctypes.c_int64(count),
                ctypes.c_double(p.eps),
                p.objective,
            )
        )
        return [*results, status] if implicit else results

    def point_sums(
        self,
        cloud: Cloud,
        pair: tuple[int, int],
        weights: tuple[Tensor, Tensor],
        potentials: tuple[Tensor, Tensor],
        grad: Tensor,
        eps: float,
        coefficient: float = -0.5,
    ) -> list[Tensor]:
        """V 1 (B, n) and V y (B, n, d) for the gradient of the first points of a pair."""
        (a, b), (f, g), (i, j) = weights, potentials, pair
        B, n = a.shape
        found = [a.new_full((B, n), math.nan), a.new_full(cloud.z[i].shape, math.nan)]
        call = PointGradientCall(
            batch=B,
            n=n,
            m=b.shape[1],
            symmetric=int(i == j),
            coefficient=coefficient,
            a=a,
            b=b,
            f=f,
            g=g,
            grad=grad,
            sum=found[0],
            product=found[1],
            **cloud.pair(i, j),
        )
        self.check(
            self.library.engine_point_gradients(
                int(a.dtype == torch.float64),
                ctypes.byref(call),
                ctypes.c_int64(1),
                ctypes.c_double(eps),
            )
        )
        return found


def compiled(target: Path, *macros: str) -> Path:
    command = ["g++", "-O1", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    # Barriers jump between stacks, which the checked longjmp of fortified builds refuses.
    command += ["-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DOTLOSS_SOLVE_THREADS=128"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda_host'}"]
    command += [*macros, str(ROOT / "tests/cuda_host/engine.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("cuda_host") / "engine.so")


@pytest.fixture(scope="session")
def long_memory(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """With as many L-BFGS pairs as the CPU, and a start between Gaussians whatever it takes."""
    target = tmp_path_factory.mktemp("cuda_host") / "long_memory.so"
    return Engine(compiled(target, "-DOTLOSS_LBFGS_PAIRS=8", "-DOTLOSS_START_PASSES=1e9"))


@pytest.fixture
def engine(library: Path) -> Engine:
    engine = Engine(library)
    engine.configure()
    return engine


@pytest.fixture(params=REGIMES)
def regime(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces a regime, through the environment of the C library."""
    os.environ["OTLOSS_CUDA_REGIME"] = request.param
    yield request.param
    del os.environ["OTLOSS_CUDA_REGIME"]


def clouds(
    dtype: torch.dtype, B: int = 2, n: int = 40, m: int = 33, d: int = 3
) -> tuple[list[Tensor], list[Tensor]]:
    """Two clouds with uneven weights, one of them 0 in each."""
    generator = torch.Generator().manual_seed(n * m + d)
    x = torch.randn(B, n, d, generator=generator, dtype=dtype)
    y = torch.randn(B, m, d, generator=generator, dtype=dtype) + 0.5
    weights = []
    for size in (n, m):
        w = torch.rand(B, size, generator=generator, dtype=dtype) + 0.1
        if size > 2:
            w[:, size // 3] = 0
        weights.append(w / w.sum(-1, keepdim=True))
    return [x, y], weights


def truth(
    costs: list[Tensor], weights: list[Tensor], pairs: list[int], eps: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Values and potentials from the CPU kernels in float64, far below the tolerances here."""
    values, all_f, all_g = [], [], []
    for C, (i, j) in zip(costs, reference.as_pairs(pairs), strict=True):
        a, b = weights[i].double(), weights[j].double()
        b = b * (a.sum(-1, True) / b.sum(-1, True))
        result = otloss.solve(C.double(), eps, a=a, b=b, tol=1e-8, max_iters=20000)
        f, g = result.potentials
        if i == j:  # an outlier settles slowly between f and g, not in their sum
            f = g = 0.5 * (f + g)
        values.append(result.value)
        all_f.append(f)
        all_g.append(g)
    return values, all_f, all_g


def on_the_cpu(
    costs: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    eps: float,
    *,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int = -1,
    objective: int = 0,
    rho: tuple[float, float] = HARD,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Values per pair, status and potentials of the CPU kernels, which take the same steps."""
    settings = (eps, *rho, tol, max_iters, n_iters, objective, False)
    P = len(costs)
    values = []
    for p in range(P):
        only = [float(p == other) for other in range(P)]
        loss, status, f, g, _ = ops.solve(costs, weights, pairs, only, [], *settings)
        values.append(loss)
    return torch.stack(values), status, f, g


def spread(x: Tensor, y: Tensor, w: Tensor) -> float:
    """Largest difference over points of positive weight, up to a constant."""
    difference = x.double() - y
    shift = (difference * w.double()).sum(-1, True) / w.double().sum(-1, True)
    return float(torch.where(w > 0, difference - shift, 0.0).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1.0, 0.1])
def test_solves_a_divergence(engine: Engine, regime: str, dtype: torch.dtype, eps: float) -> None:
    points, weights = clouds(dtype)
    costs = reference.cost(points, [], DIVERGENCE, 0)
    values, status, f, g, _ = engine.solve(costs, weights, DIVERGENCE, eps, tol=1e-5)
    expected, true_f, true_g = truth(costs, weights, DIVERGENCE, eps)
    assert bool((status[..., 2] == 1).all())
    assert float(status[..., 1].max()) <= 1e-5
    for p, (i, j) in enumerate(reference.as_pairs(DIVERGENCE)):
        torch.testing.assert_close(values[p].double(), expected[p], rtol=1e-5, atol=1e-5)
        assert spread(f[p], true_f[p], weights[i]) < 2e-3
        assert spread(g[p], true_g[p], weights[j]) < 2e-3
        assert bool((f[p][weights[i] == 0] == 0).all() and (g[p][weights[j] == 0] == 0).all())
        largest = torch.where(
            (weights[i][:, :, None] > 0) & (weights[j][:, None] > 0), costs[p], 0.0
        )
        torch.testing.assert_close(status[p, :, 3], largest.amax((1, 2)).double())


@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (1, 9), (9, 1), (3, 70), (70, 3), (64, 64), (17, 600), (130, 129)]
)
def test_shapes(engine: Engine, regime: str, n: int, m: int) -> None:
    points, weights = clouds(torch.float32, 1, n, m)
    costs = reference.cost(points, [], [0, 1], 1)
    values, status, *_ = engine.solve(costs, weights, [0, 1], 0.3, tol=1e-5)
    expected, *_ = truth(costs, weights, [0, 1], 0.3)
    assert bool((status[..., 2] == 1).all())
    torch.testing.assert_close(values[0].double(), expected[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_columns_than_registers_hold(engine: Engine, dtype: torch.dtype) -> None:
    points, weights = clouds(dtype, 1, 3, 4200)
    costs = reference.cost(points, [], [0, 1], 0)
    values, status, *_ = engine.solve(costs, weights, [0, 1], 1.0, tol=1e-5)
    expected, *_ = truth(costs, weights, [0, 1], 1.0)
    assert bool((status[..., 2] == 1).all())
    torch.testing.assert_close(values[0].double(), expected[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1.0, 0.02])
def test_fixed_iterations(engine: Engine, regime: str, dtype: torch.dtype, eps: float) -> None:
    points, weights = clouds(dtype)
    costs = reference.cost(points, [], DIVERGENCE, 0)
    _, status, f, g, traces = engine.solve(costs, weights, DIVERGENCE, eps, n_iters=4, trace=True)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    for p, (i, j) in enumerate(reference.as_pairs(DIVERGENCE)):
        C, a, b = costs[p], weights[i], weights[j]
        true_g = torch.zeros_like(b)
        for step in range(4):
            true_f = torch.where(a > 0, reference.softmin(eps, C, true_g, b), 0.0)
            true_g = torch.where(b > 0, reference.softmin(eps, C.mT, true_f, a), 0.0)
            torch.testing.assert_close(
                traces[p][:, step], torch.cat([true_f, true_g], -1), **tolerance
            )
        torch.testing.assert_close(f[p], true_f, **tolerance)
        torch.testing.assert_close(g[p], true_g, **tolerance)
    assert bool((status[..., 0] == 4).all())


def test_small_eps_from_a_cold_start(engine: Engine, regime: str) -> None:
    """Row and column sums overflow and vanish: the guarded sums take over, stages help."""
    points, weights = clouds(torch.float32, 1, 50, 45)
    costs = reference.cost([100 * x for x in points], [], DIVERGENCE, 1)
    values, status, *_ = engine.solve(costs, weights, DIVERGENCE, 2.0, tol=1e-3, max_iters=3000)
    expected, *_ = truth(costs, weights, DIVERGENCE, 2.0)
    assert bool((status[..., 2] == 1).all())
    for p in range(3):
        torch.testing.assert_close(values[p].double(), expected[p], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("objective", [0, 1])
def test_objectives(engine: Engine, regime: str, objective: int) -> None:
    points, weights = clouds(torch.float64)
    costs = reference.cost(points, [], DIVERGENCE, 2)
    values, _, f, g, _ = engine.solve(
        costs, weights, DIVERGENCE, 0.1, tol=1e-6, objective=objective
    )
    for p, (i, j) in enumerate(reference.as_pairs(DIVERGENCE)):
        a, b = weights[i], weights[j]
        if objective == 0:
            expected = (a * f[p]).sum(-1) + (b * g[p]).sum(-1)
        else:
            P = reference.plan(0.1, costs[p], f[p], g[p], a, b)
            expected = (P * costs[p]).sum((1, 2))
        torch.testing.assert_close(values[p], expected, rtol=1e-9, atol=1e-9)


def test_what_is_not_finite(engine: Engine, regime: str) -> None:
    points, weights = clouds(torch.float32)
    (C,) = reference.cost(points, [], [0, 1], 0)
    C[1, 4, 4] = math.nan
    values, status, f, _, _ = engine.solve([C], weights, [0, 1], 1.0)
    assert bool(values[0, 0].isfinite() and values[0, 1].isnan())
    assert status[0, :, 2].tolist() == [1, 0]
    assert bool(f[0][1].isnan().all() and status[0, 1, 3].isnan())
    *_, (trace,) = engine.solve([C], weights, [0, 1], 1.0, n_iters=2, trace=True)
    assert bool(trace[0].isfinite().all() and trace[1].isnan().all())


@pytest.mark.parametrize("content", [0.0, 3.0, 1e30])
def test_padding_changes_nothing(engine: Engine, regime: str, content: float) -> None:
    points, weights = clouds(torch.float32)
    (C,) = reference.cost(points, [], [0, 1], 0)
    padded = C.clone()
    padded[:, 40 // 3] = content
    padded[:, :, 33 // 3] = content
    for a, b in zip(
        engine.solve([C], weights, [0, 1], 0.5)[:2],
        engine.solve([padded], weights, [0, 1], 0.5)[:2],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_warm_start_needs_few_iterations(engine: Engine, regime: str) -> None:
    points, weights = clouds(torch.float64)
    costs = reference.cost(points, [], DIVERGENCE, 0)
    _, cold, f, g, _ = engine.solve(costs, weights, DIVERGENCE, 0.3, tol=1e-6)
    init = [v for pair in zip(f, g, strict=True) for v in pair]
    _, warm, *_ = engine.solve(costs, weights, DIVERGENCE, 0.3, tol=1e-5, init=init)
    assert float(warm[..., 0].max()) <= 2
    assert float(cold[..., 0].min()) > 2


def test_max_iters_is_kept(engine: Engine, regime: str) -> None:
    points, weights = clouds(torch.float32)
    costs = reference.cost(points, [], [0, 1], 0)
    _, status, *_ = engine.solve(costs, weights, [0, 1], 0.01, tol=1e-7, max_iters=13)
    assert bool((status[..., 0] <= 13).all() and (status[..., 2] == 0).all())


def test_order_of_threads_does_not_matter(engine: Engine, regime: str) -> None:
    """Bitwise: a difference would be a race, or a sum without a fixed order."""
    points, weights = clouds(torch.float32, 2, 37, 150)
    costs = reference.cost(points, [], DIVERGENCE, 0)
    results = []
    for order in ORDERS:
        engine.configure(order=order)
        values, status, f, g, _ = engine.solve(costs, weights, DIVERGENCE, 0.2, tol=1e-4)
        results.append([values, status, *f, *g])
    for other in results[1:]:
        assert all(bool((x == y).all()) for x, y in zip(results[0], other, strict=True))


def test_many_problems_on_few_multiprocessors(engine: Engine, regime: str) -> None:
    engine.configure(multiprocessors=3)
    points, weights = clouds(torch.float32, 7, 12, 10)
    costs = reference.cost(points, [], [0, 1], 0)
    values, status, *_ = engine.solve(costs, weights, [0, 1], 0.5, tol=1e-5)
    expected, *_ = truth(costs, weights, [0, 1], 0.5)
    assert bool((status[..., 2] == 1).all())
    torch.testing.assert_close(values[0].double(), expected[0], rtol=1e-5, atol=1e-5)


def test_more_pairs_than_a_launch_takes(engine: Engine) -> None:
    points, weights = clouds(torch.float32, 1, 6, 5)
    costs = reference.cost(points, [], [0, 1] * 11, 0)
    values, *_ = engine.solve(costs, weights, [0, 1] * 11, 0.5)
    assert bool((values == values[0]).all() and values.isfinite().all())


@pytest.mark.parametrize(
    ("problems", "n", "d", "plan"),
    [
        (1, 60, 0, "block, 1 block per problem, 1 at once, cost tile in shared memory"),
        (200, 150, 0, "block, 1 block per problem, 132 at once, cost tile in shared memory"),
        (1, 600, 0, "cluster, 16 blocks per problem, 1 at once, cost tile in shared memory"),
        (1, 9000, 0, "dense, 132 blocks per problem, 1 at once, cost tile in global memory"),
        (200, 20000, 0, "dense, 2 blocks per problem, 66 at once, cost tile in global memory"),
        (1, 9000, 3, "streamed, 132 blocks per problem, 1 at once, costs made on the way"),
    ],
)
def test_the_plan_in_words(engine: Engine, problems: int, n: int, d: int, plan: str) -> None:
    """As OTResult.explain and show_config say it, on 132 multiprocessors."""
    engine.configure(multiprocessors=132)
    engine.library.engine_plan.restype = ctypes.c_char_p
    sizes = [ctypes.c_int64(size) for size in (problems, n, n, d)]
    assert engine.library.engine_plan(0, *sizes).decode().startswith(plan)


def test_old_devices_use_no_clusters(engine: Engine) -> None:
    engine.configure(capability=80, shared=163 * 1024)
    points, weights = clouds(torch.float32, 1, 260, 250)
    costs = reference.cost(points, [], [0, 1], 0)
    _, status, *_ = engine.solve(costs, weights, [0, 1], 1.0)
    assert bool((status[..., 2] == 1).all())
    os.environ["OTLOSS_CUDA_REGIME"] = "cluster"
    try:
        with pytest.raises(RuntimeError, match="OTLOSS_CUDA_REGIME=cluster"):
            engine.solve(costs, weights, [0, 1], 1.0)
    finally:
        del os.environ["OTLOSS_CUDA_REGIME"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("d", [1, 3, 40])
@pytest.mark.parametrize("same", [False, True])
def test_costs_and_their_gradients(
    engine: Engine, dtype: torch.dtype, kind: int, d: int, same: bool
) -> None:
    (x, y), (a, b) = clouds(dtype, 2, 35, 270, d)
    x, y = x + 10, y + 10
    y[:, 0] = x[:, 1]  # coincident points
    if kind == 2:
        x[:, 2] = 0  # no direction
    padding = (a == 0).unsqueeze(-1)
    x_given = torch.where(padding, math.nan, x)
    x = torch.where(padding, 0.0, x)
    if same:
        y, b = x, a
    n, m = x.shape[1], y.shape[1]
    new = x.new_zeros
    call = CostCall(
        batch=2,
        n=n,
        m=m,
        d=d,
        symmetric=int(same),
        kind=kind,
        x=x_given,
        y=y,
        a=a,
        b=b,
        zx=(zx := torch.full_like(x, math.nan)),
        hx=new(2, n),
        zy=(zy := zx if same else torch.full_like(y, math.nan)),
        hy=new(2, m),
        product=(C := new(2, n, m)),
        W=(W := torch.randn(2, n, m, dtype=dtype)),
        V=(V := new(2, n, m)),
        row_sum=(row := new(2, n)),
        col_sum=(column := new(2, m)),
        Vy=(Vy := new(2, n, d)),
        grad=(grad := new(2, n, d)),
    )
    if same:
        call.hy = call.hx

    def run(step: int) -> None:
        double = int(dtype == torch.float64)
        engine.check(engine.library.engine_cost(double, ctypes.byref(call), step))

    run(0)
    C.copy_(zx @ zy.mT)
    run(1)
    counted = (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2)
    pairs = [0, 0] if same else [0, 1]
    (expected,) = reference.cost([x.double(), y.double()], [], pairs, kind)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(
        torch.where(counted, C, 0.0).double(),
        torch.where(counted, expected, 0.0),
        rtol=10 * tolerance,
        atol=10 * tolerance,
    )
    if same:
        assert float(torch.where(counted, C, 0.0).diagonal(dim1=1, dim2=2)[:, 3:].abs().max()) == 0
    W.copy_(torch.where(counted, W, 0.0))
    run(2)
    torch.testing.assert_close(row, V.sum(-1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(column, V.sum(-2), rtol=1e-3, atol=1e-3)
    Vy.copy_(V @ zy)
    run(3)
    (true_grad,) = reference.cost_backward(
        [W.double()], [expected], [x.double(), y.double()], [], pairs, kind, [0]
    )
    torch.testing.assert_close(
        torch.where(padding, 0.0, grad).double(),
        torch.where(padding, 0.0, true_grad),
        rtol=100 * tolerance,
        atol=100 * tolerance * max(1.0, float(true_grad.abs().max())),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("objective", [0, 1])
@pytest.mark.parametrize("strength", [None, *SOFT], ids=str)
def test_envelope_gradients(
    engine: Engine, objective: int, strength: Strength | None, dtype: torch.dtype
) -> None:
    points, weights = clouds(dtype)
    rho = HARD if strength is None else rho_pair(strength)
    if strength is not None:
        weights[1] = 1.7 * weights[1]
    (C,) = reference.cost(points, [], [0, 1], 0)
    _, _, (f,), (g,), _ = engine.solve([C], weights, [0, 1], 0.5, rho=rho)
    grad = torch.tensor([2.0, -0.5], dtype=dtype)
    grads = [torch.full_like(t, math.nan) for t in (C, *weights)]
    calls = (EnvelopeCall * 1)(
        EnvelopeCall(
            rho=rho_of(rho, 0, 1),
            batch=2,
            n=40,
            m=33,
            coefficient=-0.5,
            C=C,
            a=weights[0],
            b=weights[1],
            f=f,
            g=g,
            grad=grad,
            grad_C=grads[0],
            grad_a=grads[1],
            grad_b=grads[2],
        )
    )
    engine.check(
        engine.library.engine_envelope(
            int(dtype == torch.float64), calls, ctypes.c_int64(1), ctypes.c_double(0.5), objective
        )
    )
    expected = reference.envelope_backward(
        grad, [C], weights, [0, 1], [-0.5], [f], [g], 0.5, *rho, objective, [1], True
    )
    for got, (true,) in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------- unrolled, implicit gradients


def assert_gradients_agree(
    found: list[Tensor], expected: list[Tensor], dtype: torch.dtype, *, looser: float = 1.0
) -> None:
    tolerance = looser * (2e-5 if dtype == torch.float32 else 1e-10)
    for x, y in zip(found, expected, strict=True):
        # Gradients of weights are differences of larger terms.
        scale = max(float(other.abs().max()) for other in expected if other.dim() == y.dim())
        torch.testing.assert_close(x / scale, y / scale, rtol=0, atol=tolerance)


def soft(weights: list[Tensor], rho: tuple[float, float]) -> list[Tensor]:
    """Totals that differ, where nothing ties them."""
    return [weights[0], weights[1] if rho == HARD else 2.5 * weights[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", [0, 1])
@pytest.mark.parametrize("rho", STRENGTHS, ids=str)
def test_unrolled(
    engine: Engine, regime: str, dtype: torch.dtype, objective: int, rho: tuple[float, float]
) -> None:
    points, weights = clouds(dtype)
    costs = reference.cost(points, [], DIVERGENCE, 0)
    problem = solved(
        costs, soft(weights, rho), DIVERGENCE, 0.5, n_iters=11, objective=objective, rho=rho
    )
    found = engine.gradient(problem, implicit=False)
    assert_gradients_agree(found, problem.on_cpu(implicit=False), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", [0, 1])
@pytest.mark.parametrize("rho", STRENGTHS, ids=str)
def test_implicit(
    engine: Engine, regime: str, dtype: torch.dtype, objective: int, rho: tuple[float, float]
) -> None:
    points, weights = clouds(dtype)
    costs = reference.cost(points, [], DIVERGENCE, 0)
    problem = solved(costs, soft(weights, rho), DIVERGENCE, 0.5, objective=objective, rho=rho)
    *found, status = engine.gradient(problem, implicit=True)
    *expected, true_status = problem.on_cpu(implicit=True)
    assert_gradients_agree(found, expected, dtype)
    assert bool(((status[..., 0] - true_status[..., 0]).abs() <= 1).all())
    assert float(status[..., 1].max()) < (1e-8 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("implicit", [False, True], ids=["unrolled", "implicit"])
@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (1, 9), (9, 1), (3, 70), (70, 3), (64, 64), (17, 600), (130, 129)]
)
def test_gradients_at_every_shape(
    engine: Engine, regime: str, n: int, m: int, implicit: bool
) -> None:
    for dtype in DTYPES:
        points, weights = clouds(dtype, 1, n, m)
        costs = reference.cost(points, [], [0, 1], 1)
        problem = solved(costs, weights, [0, 1], 0.3, n_iters=-1 if implicit else 3, objective=1)
        found = engine.gradient(problem, implicit=implicit)
        expected = problem.on_cpu(implicit=implicit)
        assert_gradients_agree(found[:3], expected[:3], dtype, looser=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scale", "eps", "rho"),
    [(4.0, 0.05, HARD), (3.0, 0.02, (1e-2, 3.0)), (3.0, 0.5, (math.inf, 1e-3))],
    ids=str,
)
def test_unrolled_where_factors_overflow(
    engine: Engine,
    regime: str,
    dtype: torch.dtype,
    scale: float,
    eps: float,
    rho: tuple[float, float],
) -> None:
    """exp((g' - g) / eps) in a cold start, exp(f / rho) of points that are not transported."""
    points, weights = clouds(dtype, 2, 30, 26)
    costs = [scale * C for C in reference.cost(points, [], DIVERGENCE, 0)]
    problem = solved(costs, soft(weights, rho), DIVERGENCE, eps, n_iters=3, rho=rho)
    found = engine.gradient(problem, implicit=False)
    assert_gradients_agree(found, problem.on_cpu(implicit=False), dtype, looser=20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unrolled_from_given_potentials(engine: Engine, regime: str, dtype: torch.dtype) -> None:
    points, weights = clouds(dtype)
    costs = reference.cost(points, [], DIVERGENCE, 0)
    sides = [weights[c] for c in DIVERGENCE]
    init = [torch.where(w > 0, torch.linspace(-1, 1, w.shape[1]).to(w), 0.0) for w in sides]
    problem = solved(costs, weights, DIVERGENCE, 0.5, n_iters=2, init=init)
    found = engine.gradient(problem, implicit=False)
    assert_gradients_agree(found, problem.on_cpu(implicit=False), dtype)


@pytest.mark.parametrize("implicit", [False, True], ids=["unrolled", "implicit"])
@pytest.mark.parametrize("costs", [False, True])
@pytest.mark.parametrize("potentials", [False, True])
def test_gradients_of_what_is_wanted(
    engine: Engine, implicit: bool, costs: bool, potentials: bool
) -> None:
    points, weights = clouds(torch.float64)
    given = reference.cost(points, [], DIVERGENCE, 2)
    problem = solved(given, weights, DIVERGENCE, 0.2, n_iters=-1 if implicit else 4, objective=1)
    wanted = {"implicit": implicit, "costs": costs, "potentials": potentials}
    found, expected = engine.gradient(problem, **wanted), problem.on_cpu(**wanted)
    count = 3 * (2 + costs)
    assert_gradients_agree(found[:count], expected[:count], torch.float64)


@pytest.mark.parametrize("implicit", [False, True], ids=["unrolled", "implicit"])
@pytest.mark.parametrize("objective", [0, 1])
@pytest.mark.parametrize("rho", STRENGTHS[:2], ids=str)
def test_gradients_do_not_depend_on_the_order_of_threads(
    engine: Engine, regime: str, implicit: bool, objective: int, rho: tuple[float, float]
) -> None:
    points, weights = clouds(torch.float32, 2, 37, 150)
    costs = reference.cost(points, [], DIVERGENCE, 0)
    problem = solved(
        costs, weights, DIVERGENCE, 0.2, n_iters=-1 if implicit else 5, objective=objective, rho=rho
    )
    results = []
    for order in ORDERS:
        engine.configure(order=order)
        results.append(engine.gradient(problem, implicit=implicit))
    for other in results[1:]:
        assert all(bool((x == y).all()) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("implicit", [False, True], ids=["unrolled", "implicit"])
@pytest.mark.parametrize("content", [3.0, 1e30, math.nan])
def test_padding_receives_no_gradient(
    engine: Engine, regime: str, implicit: bool, content: float
) -> None:
    points, weights = clouds(torch.float32)
    (C,) = reference.cost(points, [], [0, 1], 0)
    problem = solved([C], weights, [0, 1], 0.5, n_iters=-1 if implicit else 4, objective=1)
    padded = C.clone()
    padded[:, 40 // 3] = content
    padded[:, :, 33 // 3] = content
    clean = engine.gradient(problem, implicit=implicit)
    found = engine.gradient(problem._replace(costs=[padded]), implicit=implicit)
    for x, y in zip(found, clean, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    grad_C, grad_a, grad_b = found[:3]
    assert not bool(grad_C[:, 40 // 3].any() or grad_C[:, :, 33 // 3].any())
    assert not bool(grad_a[:, 40 // 3].any() or grad_b[:, 33 // 3].any())


@pytest.mark.parametrize("implicit", [False, True], ids=["unrolled", "implicit"])
def test_gradients_of_many_problems(engine: Engine, regime: str, implicit: bool) -> None:
    """More than run at once, and more pairs than a launch takes."""
    engine.configure(multiprocessors=3)
    points, weights = clouds(torch.float64, 5, 12, 10)
    pairs = [0, 1] * 10
    costs = reference.cost(points, [], pairs, 0)
    problem = solved(costs, weights, pairs, 0.5, n_iters=-1 if implicit else 3, objective=1)
    count = 3 * len(costs)
    found = engine.gradient(problem, implicit=implicit)
    expected = problem.on_cpu(implicit=implicit)
    assert_gradients_agree(found[:count], expected[:count], torch.float64)


@pytest.mark.parametrize(("implicit", "launches"), [(False, 3), (True, 1)])
def test_gradients_are_few_launches(engine: Engine, implicit: bool, launches: int) -> None:
    """Whatever the number of pairs, problems and iterations."""
    points, weights = clouds(torch.float32)
    costs = reference.cost(points, [], DIVERGENCE, 0)
    problem = solved(costs, weights, DIVERGENCE, 0.5, n_iters=-1 if implicit else 20, objective=1)
    before = engine.library.engine_launches()
    engine.gradient(problem, implicit=implicit)
    assert engine.library.engine_launches() - before == launches


@pytest.mark.parametrize("implicit", [False, True], ids=["unrolled", "implicit"])
def test_gradients_of_what_is_not_finite(engine: Engine, regime: str, implicit: bool) -> None:
    points, weights = clouds(torch.float32)
    (C,) = reference.cost(points, [], [0, 1], 0)
    problem = solved([C], weights, [0, 1], 0.5, n_iters=-1 if implicit else 3, objective=1)
    for tensor in (*problem.f, *problem.g, *problem.traces):
        tensor[1] = math.nan
    counted = (weights[0] > 0).unsqueeze(-1) & (weights[1] > 0).unsqueeze(-2)
    grad_C, *rest = engine.gradient(problem, implicit=implicit)
    assert bool(all(t[0].isfinite().all() for t in (grad_C, *rest[:2])))
    assert bool(grad_C[1][counted[1]].isnan().all())
    if implicit:
        residual = rest[2][0, :, 1]
        assert bool(residual[0].isfinite() and residual[1].isnan())


# ---------------------------------------------------------------------------------- streamed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("d", [1, 3, 16, 17, 70])
@pytest.mark.parametrize("eps", [1.0, 0.1])
def test_solves_points(engine: Engine, dtype: torch.dtype, kind: int, d: int, eps: float) -> None:
    points, weights = clouds(dtype, d=d)
    points[1][:, 4] = points[0][:, 5]  # coincident points
    if kind != 2:  # far from the origin
        points = [x + 10 for x in points]
    costs = reference.cost(points, [], DIVERGENCE, kind)
    scale = float(costs[0].mean())
    values, status, f, g, _ = engine.solve(
        Cloud(points, kind), weights, DIVERGENCE, eps * scale, tol=1e-5
    )
    expected, true_f, true_g = truth(costs, weights, DIVERGENCE, eps * scale)
    assert bool((status[..., 2] == 1).all())
    for p, (i, j) in enumerate(reference.as_pairs(DIVERGENCE)):
        torch.testing.assert_close(values[p].double(), expected[p], rtol=2e-5, atol=2e-5 * scale)
        assert spread(f[p], true_f[p], weights[i]) < 1e-3 * scale
        assert spread(g[p], true_g[p], weights[j]) < 1e-3 * scale
        assert bool((f[p][weights[i] == 0] == 0).all() and (g[p][weights[j] == 0] == 0).all())
        assert bool((status[p, :, 3] >= costs[p].amax((1, 2)) * (1 - 1e-5)).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (1, 9), (9, 1), (3, 700), (700, 3), (64, 64), (17, 1100), (2500, 40)]
)
@pytest.mark.parametrize("d", [2, 50])
def test_shapes_of_points(engine: Engine, n: int, m: int, d: int, dtype: torch.dtype) -> None:
    points, weights = clouds(dtype, 1, n, m, d)
    costs = reference.cost(points, [], [0, 1], 1)
    values, status, *_ = engine.solve(Cloud(points, 1), weights, [0, 1], 1.0, tol=1e-5)
    expected, *_ = truth(costs, weights, [0, 1], 1.0)
    assert bool((status[..., 2] == 1).all())
    torch.testing.assert_close(values[0].double(), expected[0], rtol=2e-5, atol=2e-5)


def assert_iterations(
    trace: Tensor, count: int, C: Tensor, a: Tensor, b: Tensor, eps: float, tolerance: float
) -> None:
    """A trace (B, L, n + m) against ``count`` iterations of the reference from 0."""
    true_g = torch.zeros_like(b)
    for step in range(count):
        true_f = torch.where(a > 0, reference.softmin(eps, C, true_g, b), 0.0)
        true_g = torch.where(b > 0, reference.softmin(eps, C.mT, true_f, a), 0.0)
        expected = torch.cat([true_f, true_g], -1)
        scale = float(expected.abs().max())
        torch.testing.assert_close(trace[:, step], expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("fraction", [1.0, 1e-3])
def test_fixed_iterations_of_points(
    engine: Engine, dtype: torch.dtype, kind: int, fraction: float
) -> None:
    """From a cold start at small eps most sums underflow and are made again."""
    points, weights = clouds(dtype, d=5)
    costs = reference.cost(points, [], DIVERGENCE, kind)
    eps = fraction * float(costs[0].mean())
    _, status, f, _, traces = engine.solve(
        Cloud(points, kind), weights, DIVERGENCE, eps, n_iters=4, trace=True
    )
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    for p, (i, j) in enumerate(reference.as_pairs(DIVERGENCE)):
        assert_iterations(traces[p], 4, costs[p], weights[i], weights[j], eps, tolerance)
        assert bool((f[p] == traces[p][:, -1, : f[p].shape[1]]).all())
    assert bool((status[..., 0] == 4).all())


@pytest.mark.parametrize("d", [3, 30])
def test_small_eps_on_points(engine: Engine, d: int) -> None:
    points, weights = clouds(torch.float32, 1, 50, 45, d)
    points = [100 * x for x in points]
    costs = reference.cost(points, [], DIVERGENCE, 1)
    values, status, *_ = engine.solve(
        Cloud(points, 1), weights, DIVERGENCE, 2.0, tol=1e-3, max_iters=3000
    )
    expected, *_ = truth(costs, weights, DIVERGENCE, 2.0)
    assert bool((status[..., 2] == 1).all())
    for p in range(3):
        torch.testing.assert_close(values[p].double(), expected[p], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("d", [3, 30])
def test_transport_objective_of_points(engine: Engine, kind: int, d: int) -> None:
    points, weights = clouds(torch.float64, d=d)
    costs = reference.cost(points, [], DIVERGENCE, kind)
    eps = 0.1 * float(costs[0].mean())
    values, _, f, g, _ = engine.solve(
        Cloud(points, kind), weights, DIVERGENCE, eps, tol=1e-6, objective=1
    )
    for p, (i, j) in enumerate(reference.as_pairs(DIVERGENCE)):
        P = reference.plan(eps, costs[p], f[p], g[p], weights[i], weights[j])
        torch.testing.assert_close(values[p], (P * costs[p]).sum((1, 2)), rtol=1e-9, atol=1e-9)


def test_points_that_are_not_finite(engine: Engine) -> None:
    points, weights = clouds(torch.float32)
    points[0][1, 4, 1] = math.nan
    values, status, f, _, _ = engine.solve(Cloud(points, 0), weights, [0, 1], 1.0)
    assert bool(values[0, 0].isfinite() and values[0, 1].isnan())
    assert status[0, :, 2].tolist() == [1, 0]
    assert bool(f[0][1].isnan().all() and status[0, 1, 3].isnan())


@pytest.mark.parametrize("d", [3, 40])
def test_order_of_threads_does_not_matter_to_points(engine: Engine, d: int) -> None:
    points, weights = clouds(torch.float32, 2, 37, 350, d)
    results = []
    for order in ORDERS:
        engine.configure(order=order)
        values, status, f, g, _ = engine.solve(Cloud(points, 0), weights, DIVERGENCE, 2.0, tol=1e-4)
        results.append([values, status, *f, *g])
    for other in results[1:]:
        assert all(bool((x == y).all()) for x, y in zip(results[0], other, strict=True))


def test_many_problems_of_points(engine: Engine) -> None:
    """More than there are multiprocessors: a block each, several one after the other."""
    engine.configure(multiprocessors=3, capability=80, shared=163 * 1024)
    points, weights = clouds(torch.float32, 7, 12, 10)
    costs = reference.cost(points, [], [0, 1], 0)
    values, status, *_ = engine.solve(Cloud(points, 0), weights, [0, 1], 0.5, tol=1e-5)
    expected, *_ = truth(costs, weights, [0, 1], 0.5)
    assert bool((status[..., 2] == 1).all())
    torch.testing.assert_close(values[0].double(), expected[0], rtol=1e-5, atol=1e-5)


def test_coordinates_in_chunks(engine: Engine) -> None:
    """More coordinates than a stage of shared memory holds."""
    engine.configure(shared=48 * 1024)
    points, weights = clouds(torch.float32, 1, 150, 140, 130)
    costs = reference.cost(points, [], [0, 1], 0)
    values, status, *_ = engine.solve(Cloud(points, 0), weights, [0, 1], 30.0, tol=1e-5)
    expected, *_ = truth(costs, weights, [0, 1], 30.0)
    assert bool((status[..., 2] == 1).all())
    torch.testing.assert_close(values[0].double(), expected[0], rtol=1e-5, atol=1e-5)


def test_a_regime_that_stores_costs_is_refused_for_points(engine: Engine, regime: str) -> None:
    points, weights = clouds(torch.float32)
    with pytest.raises(RuntimeError, match=f"OTLOSS_CUDA_REGIME={regime} stores costs"):
        engine.solve(Cloud(points, 0), weights, [0, 1], 0.5)


def gradient_sums(
    engine: Engine, points: list[Tensor], weights: list[Tensor], kind: int
) -> tuple[list[Tensor], list[float]]:
    """V 1 and V y of a pair, or of one cloud, and their errors over the largest."""
    cloud, other, (a, b) = Cloud(points, kind), len(points) - 1, (weights[0], weights[-1])
    # Of the rounded points: the reciprocal of a small distance magnifies their rounding.
    z = [z.double() for z in cloud.z]
    (C,) = reference.cost(z, [], [0, other], kind)
    eps = 0.3 * float(C.mean()) + 0.01
    generator = torch.Generator().manual_seed(a.numel() + b.numel())
    f, g = (eps * torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in (a, b))
    grad = torch.tensor([2.0, -0.5], dtype=a.dtype)[: a.shape[0]]
    found = engine.point_sums(cloud, (0, other), (a, b), (f, g), grad, eps)
    P = reference.plan(eps, C, f.double(), g.double(), a.double(), b.double())
    V = -0.5 * grad.double()[:, None, None] * P
    if kind == 0:
        V = 2 * V
    elif kind == 1:
        V = torch.where(C > 0, V / C, 0.0)
    expected = (V.sum(-1), V @ z[other])
    return found, [
        float((got.double() - e).abs().max() / (e.abs().max() + 1e-30))
        for got, e in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("d", [1, 3, 16, 40, 70])
@pytest.mark.parametrize(("n", "m", "same"), [(40, 33, False), (35, 700, False), (150, 150, True)])
def test_gradient_sums_of_points(
    engine: Engine, dtype: torch.dtype, kind: int, d: int, n: int, m: int, same: bool
) -> None:
    points, weights = clouds(dtype, 2, n, m, d)
    _, errors = gradient_sums(engine, points[: 2 - same], weights[: 2 - same], kind)
    assert max(errors) < (2e-5 if dtype == torch.float32 else 1e-11)


# ---------------------------------------------------------------- tensor cores, rows that are share


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets OTLOSS_CUDA_TILES, _TEAM, _PARTS by their last word."""

    def force(**values: object) -> None:
        for word, value in values.items():
            monkeypatch.setenv(f"OTLOSS_CUDA_{word.upper()}", str(value))

    return force


def errors_on_points(
    engine: Engine, points: list[Tensor], weights: list[Tensor], kind: int, fraction: float
) -> tuple[float, float]:
    """Of values and potentials of a divergence in float32, over the mean cost."""
    costs = reference.cost(points, [], DIVERGENCE, kind)
    scale = float(costs[0].mean())
    values, status, f, g, _ = engine.solve(
        Cloud([x.float() for x in points], kind),
        [w.float() for w in weights],
        DIVERGENCE,
        fraction * scale,
        tol=1e-5,
    )
    assert bool((status[..., 2] == 1).all())
    expected, true_f, true_g = truth(costs, weights, DIVERGENCE, fraction * scale)
    of_value = float((values.double() - torch.stack(expected)).abs().max())
    of_potential = max(
        max(spread(f[p], true_f[p], weights[i]), spread(g[p], true_g[p], weights[j]))
        for p, (i, j) in enumerate(reference.as_pairs(DIVERGENCE))
    )
    return of_value / scale, of_potential / scale


def assert_as_accurate_as_multiply_adds(
    engine: Engine,
    forced: Callable[..., None],
    points: list[Tensor],
    weights: list[Tensor],
    kind: int,
) -> None:
    errors = {}
    for tiles in ("fma", "tensor"):
        forced(tiles=tiles)
        errors[tiles] = errors_on_points(engine, points, weights, kind, 0.1)
    for fma, tensor in zip(errors["fma"], errors["tensor"], strict=True):
        assert tensor <= 2 * fma + 3e-7


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize(("n", "m", "d"), [(65, 131, 17), (70, 64, 100), (129, 3, 33)])
def test_tensor_cores_are_as_accurate_as_multiply_adds(
    engine: Engine, forced: Callable[..., None], kind: int, n: int, m: int, d: int
) -> None:
    points, weights = clouds(torch.float64, 1, n, m, d)
    assert_as_accurate_as_multiply_adds(engine, forced, points, weights, kind)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_one_product_is_less_accurate(
    engine: Engine, forced: Callable[..., None], kind: int
) -> None:
    """What precision="tf32" allows: 11 bits, here forced."""
    points, weights = clouds(torch.float64, 1, 65, 131, 100)
    errors = {}
    for tiles in ("tensor", "high"):
        forced(tiles=tiles)
        _, errors[tiles] = errors_on_points(engine, points, weights, kind, 0.1)
        sums = gradient_sums(
            engine, [x.float() for x in points], [w.float() for w in weights], kind
        )
        errors[tiles] = max(errors[tiles], *sums[1])
    assert errors["tensor"] < 3e-6
    assert 3e-5 < errors["high"] < 5e-3


@pytest.mark.parametrize("kind", [0, 1])
def test_tensor_cores_with_outliers(engine: Engine, forced: Callable[..., None], kind: int) -> None:
    """They set the scale of the halves; the distances of all others keep their digits."""
    points, weights = clouds(torch.float64, 1, 60, 50, 24)
    points[0][:, ::20] *= 100
    assert_as_accurate_as_multiply_adds(engine, forced, points, weights, kind)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_tensor_cores_at_any_scale(engine: Engine, scale: float) -> None:
    points, weights = clouds(torch.float64, 1, 40, 70, 24)
    value, potential = errors_on_points(engine, [scale * x for x in points], weights, 0, 0.1)
    assert value < 1e-6
    assert potential < 3e-6


@pytest.mark.parametrize("shared", [232448, 64 * 1024])
def test_tensor_cores_with_many_coordinates(engine: Engine, shared: int) -> None:
    """Chunks of coordinates, with the rows' points resident and not."""
    engine.configure(shared=shared)
    points, weights = clouds(torch.float64, 1, 70, 90, 300)
    value, potential = errors_on_points(engine, points, weights, 0, 0.05)
    assert value < 1e-6
    assert potential < 3e-6


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize(
    ("n", "m", "d", "shared"),
    [
        (65, 130, 17, 232448),
        (1, 70, 90, 232448),
        (70, 1, 33, 232448),
        (70, 150, 300, 232448),
        (70, 150, 300, 40 * 1024),
    ],
)
def test_gradient_sums_by_tensor_cores(
    engine: Engine, kind: int, n: int, m: int, d: int, shared: int
) -> None:
    """A bar that single half-precision products miss by a factor of a hundred."""
    engine.configure(shared=shared)
    points, weights = clouds(torch.float32, 2, n, m, d)
    _, errors = gradient_sums(engine, points, weights, kind)
    assert max(errors) < 2e-6


def test_order_of_threads_does_not_matter_to_gradient_sums(engine: Engine) -> None:
    points, weights = clouds(torch.float32, 2, 70, 300, 90)
    results = []
    for order in ORDERS:
        engine.configure(order=order)
        results.append(gradient_sums(engine, points, weights, 1)[0])
    for other in results[1:]:
        assert all(bool((x == y).all()) for x, y in zip(results[0], other, strict=True))


SHARED = [(4, 1), (4, 2), (4, 4), (6, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize(("team", "parts"), SHARED)
def test_blocks_that_share_rows(
    engine: Engine, forced: Callable[..., None], team: int, parts: int, d: int, dtype: torch.dtype
) -> None:
    forced(team=team, parts=parts)
    points, weights = clouds(dtype, 2, 70, 133, d)
    costs = reference.cost(points, [], DIVERGENCE, 0)
    eps = 0.1 * float(costs[0].mean())
    values, status, f, g, _ = engine.solve(Cloud(points, 0), weights, DIVERGENCE, eps, tol=1e-5)
    expected, true_f, true_g = truth(costs, weights, DIVERGENCE, eps)
    assert bool((status[..., 2] == 1).all())
    for p, (i, j) in enumerate(reference.as_pairs(DIVERGENCE)):
        torch.testing.assert_close(values[p].double(), expected[p], rtol=2e-5, atol=2e-5)
        assert spread(f[p], true_f[p], weights[i]) < 1e-3
        assert spread(g[p], true_g[p], weights[j]) < 1e-3
        assert bool((f[p][weights[i] == 0] == 0).all() and (g[p][weights[j] == 0] == 0).all())


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 300), (300, 1), (5, 700), (33, 31)])
@pytest.mark.parametrize(("team", "parts"), SHARED)
def test_shapes_of_shared_rows(
    engine: Engine, forced: Callable[..., None], n: int, m: int, team: int, parts: int
) -> None:
    forced(team=team, parts=parts)
    points, weights = clouds(torch.float32, 1, n, m, 20)
    costs = reference.cost(points, [], [0, 1], 1)
    values, status, *_ = engine.solve(Cloud(points, 1), weights, [0, 1], 1.0, tol=1e-5)
    expected, *_ = truth(costs, weights, [0, 1], 1.0)
    assert bool((status[..., 2] == 1).all())
    torch.testing.assert_close(values[0].double(), expected[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("d", [5, 40])
def test_shared_sums_that_underflow(
    engine: Engine, forced: Callable[..., None], kind: int, parts: int, d: int
) -> None:
    """From a cold start at small eps most sums are made again; all blocks must agree on that."""
    forced(team=4, parts=parts)
    points, weights = clouds(torch.float32, 2, 70, 75, d)
    costs = reference.cost(points, [], DIVERGENCE, kind)
    eps = 1e-3 * float(costs[0].mean())
    _, status, _, _, traces = engine.solve(
        Cloud(points, kind), weights, DIVERGENCE, eps, n_iters=3, trace=True
    )
    for p, (i, j) in enumerate(reference.as_pairs(DIVERGENCE)):
        assert_iterations(traces[p], 3, costs[p], weights[i], weights[j], eps, 1e-4)
    assert bool((status[..., 0] == 3).all())


@pytest.mark.parametrize("d", [3, 40])
def test_order_of_threads_does_not_matter_to_shared_rows(
    engine: Engine, forced: Callable[..., None], d: int
) -> None:
    forced(team=4, parts=2)
    points, weights = clouds(torch.float32, 2, 37, 350, d)
    points = [20 * x for x in points]  # sums that are made again, too
    results = []
    for order in ORDERS:
        engine.configure(order=order)
        values, status, f, g, _ = engine.solve(
            Cloud(points, 0), weights, DIVERGENCE, 300.0, tol=1e-4, objective=1
        )
        results.append([values, status, *f, *g])
    for other in results[1:]:
        assert all(bool((x == y).all()) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("strength", SOFT, ids=str)
def test_soft_marginals_of_shared_rows(
    engine: Engine, forced: Callable[..., None], strength: Strength
) -> None:
    forced(team=4, parts=2)
    rho = rho_pair(strength)
    points, weights = clouds(torch.float32, 2, 45, 70, 30)
    weights[1] = 1.7 * weights[1]
    costs = reference.cost(points, [], DIVERGENCE, 0)
    eps = 0.1 * float(costs[0].mean())
    rho = (rho[0] * eps * 10, rho[1] * eps * 10)
    found = engine.solve(Cloud(points, 0), weights, DIVERGENCE, eps, tol=1e-5, rho=rho)
    expected = on_the_cpu(costs, weights, DIVERGENCE, eps, tol=1e-5, rho=rho)
    assert bool((found[1][..., 2] == 1).all())
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4 * eps)


def test_what_is_forced_must_exist(engine: Engine, forced: Callable[..., None]) -> None:
    points, weights = clouds(torch.float32, d=20)
    forced(team=4, parts=3)
    with pytest.raises(RuntimeError, match="OTLOSS_CUDA_PARTS=3 must divide the 4 blocks"):
        engine.solve(Cloud(points, 0), weights, [0, 1], 1.0)
    forced(tiles="wmma", parts=1)
    with pytest.raises(RuntimeError, match="TILES must be auto, fma, tensor or high, got wmma"):
        engine.solve(Cloud(points, 0), weights, [0, 1], 1.0)


def assert_made_gradients_agree(
    engine: Engine,
    cloud: Cloud,
    problem: Problem,
    *,
    implicit: bool,
    looser: float = 1.0,
) -> None:
    """With those of the CPU from the matrices, per pair, sums and weights."""
    status: list[Tensor] = []
    *found, last = engine.gradient(problem, implicit=implicit, made=cloud)
    *expected, true_last = problem.on_cpu(implicit=implicit)
    if implicit:
        status = [last, true_last]
    else:
        found, expected = [*found, last], [*expected, true_last]
    wanted = []
    for q, (i, j) in enumerate(reference.as_pairs(problem.pairs)):
        grad_C, *weights = expected[3 * q : 3 * q + 3]
        wanted += [*cloud.sums_of(i, j, problem.costs[q], grad_C), *weights]
    assert len(found) == len(wanted)
    dtype = problem.grad.dtype
    assert_gradients_agree(found, wanted, dtype, looser=looser)
    if implicit:
        iterations = [s[..., 0] for s in status]
        assert bool(((iterations[0] - iterations[1]).abs() <= 2).all())
        assert float(status[0][..., 1].max()) < (1e-8 if dtype == torch.float32 else 1e-13)


def made_problem(
    dtype: torch.dtype, kind: int, d: int, eps: float, **kw: Any
) -> tuple[Cloud, Problem]:
    sizes = kw.pop("sizes", (40, 33))
    pairs = kw.pop("pairs", DIVERGENCE)
    points, weights = clouds(dtype, kw.pop("batch", 2), *sizes, d)
    cloud = Cloud(points, kind)
    # Of the rounded points: the reciprocal of a small distance magnifies their rounding.
    costs = [C.to(dtype) for C in reference.cost([z.double() for z in cloud.z], [], pairs, kind)]
    unit = float(costs[0].mean()) + 0.01
    rho = tuple(strength * unit for strength in kw.pop("rho", HARD))
    weights = soft(weights, rho)
    return cloud, solved(costs, weights, pairs, eps * unit, rho=rho, **kw)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("objective", [0, 1])
@pytest.mark.parametrize("rho", STRENGTHS, ids=str)
@pytest.mark.parametrize(("kind", "d"), [(0, 1), (0, 3), (1, 3), (2, 3), (0, 20), (1, 20), (2, 40)])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_points(
    engine: Engine,
    mode: str,
    kind: int,
    d: int,
    rho: tuple[float, float],
    objective: int,
    dtype: torch.dtype,
) -> None:
    n_iters = -1 if mode == "implicit" else 7
    cloud, problem = made_problem(
        dtype, kind, d, 0.3, objective=objective, rho=rho, n_iters=n_iters
    )
    assert_made_gradients_agree(engine, cloud, problem, implicit=mode == "implicit", looser=10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "sizes", [(1, 1), (1, 9), (9, 1), (3, 700), (700, 3), (64, 64), (17, 1100)], ids=str
)
def test_gradients_of_points_at_every_shape(
    engine: Engine, sizes: tuple[int, int], mode: str
) -> None:
    for dtype, d in ((torch.float32, 3), (torch.float64, 18)):
        cloud, problem = made_problem(
            dtype, 1, d, 0.3, sizes=sizes, pairs=[0, 1], batch=1, objective=1,
            n_iters=-1 if mode == "implicit" else 3,
        )  # fmt: skip
        assert_made_gradients_agree(engine, cloud, problem, implicit=mode == "implicit", looser=30)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(
    ("rho", "eps", "level"),
    [((1e-3, 0.3), 4e-3, 0.0), ((0.7, math.inf), 0.1, 1.0), ((0.7, math.inf), 0.1, 400.0)],
    ids=str,
)
def test_unrolled_of_points_from_given_potentials(
    engine: Engine, rho: tuple[float, float], eps: float, level: float, dtype: torch.dtype
) -> None:
    """The two softmaxes of an iteration are far apart by a factor of a row in the first case, of a
    column in the last: both take an exponential."""
    sizes = (30, 26)
    _, weights = clouds(dtype, 2, *sizes)
    init = [torch.where(weights[c] > 0, level, 0.0).to(dtype) for c in DIVERGENCE]
    cloud, problem = made_problem(
        dtype, 0, 3, eps, rho=rho, sizes=sizes, n_iters=3, init=init if level else []
    )
    f, g = problem.traces[0].double().split(sizes, -1)
    factors = f / problem.rho[0]
    if level:
        change = (init[1].double() - g[:, 0]) / problem.eps
        factors = torch.where(problem.weights[1] > 0, change, 0.0)
    assert bool(factors.max() > 60 * math.log(2)) == (level != 1.0)  # kTrusted
    assert_made_gradients_agree(engine, cloud, problem, implicit=False, looser=100)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_points_do_not_depend_on_the_order_of_threads(
    engine: Engine, mode: str
) -> None:
    n_iters = -1 if mode == "implicit" else 5
    for d in (3, 40):
        cloud, problem = made_problem(
            torch.float32, 0, d, 0.2, sizes=(37, 350), objective=1, n_iters=n_iters
        )
        results = []
        for order in ORDERS:
            engine.configure(order=order)
            results.append(engine.gradient(problem, implicit=mode == "implicit", made=cloud))
        for other in results[1:]:
            assert all(bool((x == y).all()) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_many_problems_of_points(engine: Engine, mode: str) -> None:
    """More than run at once, and more pairs than a launch takes."""
    engine.configure(multiprocessors=3, capability=80, shared=163 * 1024)
    cloud, problem = made_problem(
        torch.float64, 0, 2, 0.3, sizes=(12, 10), pairs=[0, 1] * 10, batch=5, objective=1,
        n_iters=-1 if mode == "implicit" else 3,
    )  # fmt: skip
    assert_made_gradients_agree(engine, cloud, problem, implicit=mode == "implicit")


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_points_that_are_not_wanted(engine: Engine, mode: str) -> None:
    n_iters = -1 if mode == "implicit" else 4
    cloud, problem = made_problem(torch.float64, 2, 3, 0.3, objective=1, n_iters=n_iters)
    found = engine.gradient(
        problem, implicit=mode == "implicit", costs=False, potentials=False, made=cloud
    )
    expected = problem.on_cpu(implicit=mode == "implicit", costs=False, potentials=False)
    assert_gradients_agree(found[:6], expected[:6], torch.float64)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_points_that_are_not_finite(engine: Engine, mode: str) -> None:
    n_iters = -1 if mode == "implicit" else 3
    cloud, problem = made_problem(
        torch.float32, 0, 3, 0.3, objective=1, pairs=[0, 1], n_iters=n_iters
    )
    for tensor in (*problem.f, *problem.g, *problem.traces):
        tensor[1] = math.nan
    sum_x, product_x, sum_y, product_y, *rest = engine.gradient(
        problem, implicit=mode == "implicit", made=cloud
    )
    for t, w in ((sum_x, 0), (product_x, 0), (sum_y, 1), (product_y, 1)):
        assert bool(t[0].isfinite().all())
        assert bool(t[1][problem.weights[w][1] > 0].isnan().all())
    if mode == "implicit":
        residual = rest[2][0, :, 1]
        assert bool(residual[0].isfinite() and residual[1].isnan())


# --------------------------------------------------------------------------- soft marginals, steps


def soft_problem(
    rng: torch.Generator, dtype: torch.dtype, n: int = 23, m: int = 19
) -> tuple[list[Tensor], list[Tensor], float]:
    """Costs of a divergence between clouds of unequal totals, weights, and a unit for rho."""
    x, y = randn(rng, 2, n, 3, dtype=dtype), 0.7 * randn(rng, 2, m, 3, dtype=dtype) + 0.5
    a, b = (rand(rng, 2, size, dtype=dtype) + 0.1 for size in (n, m))
    a[:, 3] = b[:, 5] = 0
    weights = [a / a.sum(-1, keepdim=True), 1.7 * b / b.sum(-1, keepdim=True)]
    costs = reference.cost([x, y], [], DIVERGENCE, 0)
    return costs, weights, float(costs[0].mean())


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("strength", [*SOFT, 1e-3, 1e3], ids=str)
def test_soft_marginals(
    engine: Engine, regime: str, strength: Strength, dtype: torch.dtype, rng: torch.Generator
) -> None:
    costs, weights, unit = soft_problem(rng, dtype)
    rho = rho_pair(scaled(strength, unit))
    tol = 1e-8 if dtype == torch.float64 else 3e-5
    if dtype == torch.float32 and strength == 1e3:
        tol = 1e-2  # potentials of some 1000 cannot resolve more of eps
    values, status, f, g, _ = engine.solve(costs, weights, DIVERGENCE, 0.2, tol=tol, rho=rho)
    double = [w.double() for w in weights]
    exact, _, true_f, true_g = on_the_cpu(
        [C.double() for C in costs], double, DIVERGENCE, 0.2, tol=1e-10, rho=rho
    )
    assert bool((status[..., 2] == 1).all())
    assert float(status[..., 1].max()) <= tol
    scale = float(exact.abs().max())
    torch.testing.assert_close(values.double() / scale, exact / scale, rtol=0, atol=tol)
    for p, (i, j) in enumerate(reference.as_pairs(DIVERGENCE)):
        for got, true, w in ((f[p], true_f[p], weights[i]), (g[p], true_g[p], weights[j])):
            assert bool((got[w == 0] == 0).all())
            digits = 1e-4 if dtype == torch.float32 else 1e-10
            torch.testing.assert_close(got.double(), true, rtol=digits, atol=100 * tol)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("strength", [*SOFT, 1e-3], ids=str)
@pytest.mark.parametrize("eps", [0.5, 0.02])
def test_soft_fixed_iterations(
    engine: Engine,
    regime: str,
    eps: float,
    strength: Strength,
    dtype: torch.dtype,
    rng: torch.Generator,
) -> None:
    costs, weights, unit = soft_problem(rng, dtype)
    rho = rho_pair(scaled(strength, unit))
    _, status, f, g, traces = engine.solve(
        costs, weights, DIVERGENCE, eps, n_iters=3, trace=True, rho=rho
    )
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for p, (i, j) in enumerate(reference.as_pairs(DIVERGENCE)):
        C, a, b = (t.double() for t in (costs[p], weights[i], weights[j]))
        marginals = reference.marginals_of(*rho, i, j)
        true_f, true_g, error, steps = reference.fixed_iterations(
            C, a, b, torch.zeros_like(b), eps, 3, marginals
        )
        expected = torch.stack(steps, dim=1)
        size = float(expected.abs().max())
        got = torch.cat([f[p], g[p]], -1).double()
        torch.testing.assert_close(
            traces[p].double() / size, expected / size, rtol=0, atol=tolerance
        )
        torch.testing.assert_close(
            got / size, torch.cat([true_f, true_g], -1) / size, rtol=0, atol=tolerance
        )
        torch.testing.assert_close(status[p, :, 1], error, rtol=3e2 * tolerance, atol=tolerance)
    assert bool((status[..., 0] == 3).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("strength", [*SOFT, 1e-3, 10.0], ids=str)
def test_soft_marginals_of_points(
    engine: Engine, strength: Strength, dtype: torch.dtype, rng: torch.Generator
) -> None:
    points = [randn(rng, 2, 23, 3, dtype=dtype), 0.7 * randn(rng, 2, 19, 3, dtype=dtype) + 0.5]
    weights = [rand(rng, 2, size, dtype=dtype) + 0.1 for size in (23, 19)]
    weights[0][:, 3] = weights[1][:, 5] = 0
    costs = [C.double() for C in reference.cost(points, [], DIVERGENCE, 0)]
    rho = rho_pair(scaled(strength, float(costs[0].mean())))
    tol = 1e-8 if dtype == torch.float64 else 3e-5
    call = (Cloud(points, 0), weights, DIVERGENCE, 0.2)
    double = [w.double() for w in weights]
    values, status, *_ = engine.solve(*call, tol=tol, rho=rho)
    exact, *_ = on_the_cpu(costs, double, DIVERGENCE, 0.2, tol=1e-10, rho=rho)
    assert bool((status[..., 2] == 1).all())
    scale = float(exact.abs().max())
    torch.testing.assert_close(values.double() / scale, exact / scale, rtol=0, atol=tol)
    _, _, f, g, _ = engine.solve(*call, n_iters=3, rho=rho)
    _, _, true_f, true_g = on_the_cpu(costs, double, DIVERGENCE, 0.2, n_iters=3, rho=rho)
    for got, true in zip([*f, *g], [*true_f, *true_g], strict=True):
        size = float(true.abs().max())
        torch.testing.assert_close(got.double() / size, true / size, rtol=0, atol=tol)


@pytest.mark.parametrize("strength", [0.3, (None, 0.5)], ids=str)
def test_soft_transport_objective(
    engine: Engine, regime: str, strength: Strength, rng: torch.Generator
) -> None:
    costs, weights, unit = soft_problem(rng, torch.float64)
    rho = rho_pair(scaled(strength, unit))
    values, _, f, g, _ = engine.solve(
        costs, weights, DIVERGENCE, 0.2, tol=1e-6, objective=1, rho=rho
    )
    for p, (i, j) in enumerate(reference.as_pairs(DIVERGENCE)):
        P = reference.plan(0.2, costs[p], f[p], g[p], weights[i], weights[j])
        torch.testing.assert_close(values[p], (P * costs[p]).sum((1, 2)), rtol=1e-9, atol=1e-12)


def test_soft_columns_beyond_the_registers(engine: Engine, rng: torch.Generator) -> None:
    C = rand(rng, 1, 3, 4200, dtype=torch.float32)
    weights = [torch.full((1, n), 1 / n) for n in (3, 4200)]
    values, status, *_ = engine.solve([C], weights, [0, 1], 0.1, tol=1e-5, rho=(2.0, 0.5))
    exact, *_ = on_the_cpu(
        [C.double()], [w.double() for w in weights], [0, 1], 0.1, tol=1e-9, rho=(2.0, 0.5)
    )
    assert bool((status[..., 2] == 1).all())
    torch.testing.assert_close(values.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("strength", [(1e-2, 1e-3), (None, 1e-2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_soft_factors_that_overflow(
    engine: Engine, regime: str, dtype: torch.dtype, strength: Strength, rng: torch.Generator
) -> None:
    """exp(-f / rho) is beyond any number where C is far below 0: all columns take the guard."""
    C = 3 * randn(rng, 1, 14, 11, dtype=dtype)
    weights = [torch.full((1, n), 1 / n, dtype=dtype) for n in (14, 11)]
    rho = rho_pair(strength)
    _, _, f, g, _ = engine.solve([C], weights, [0, 1], 0.05, n_iters=2, rho=rho)
    marginals = reference.marginals_of(*rho, 0, 1)
    true_f, true_g, *_ = reference.fixed_iterations(
        C.double(), *(w.double() for w in weights), torch.zeros(1, 11).double(), 0.05, 2, marginals
    )
    torch.testing.assert_close(f[0].double(), true_f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(g[0].double(), true_g, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.5, (None, 0.5)], ids=str)
def test_soft_warm_start(
    engine: Engine, regime: str, strength: Strength, rng: torch.Generator
) -> None:
    costs, weights, unit = soft_problem(rng, torch.float64)
    call = {"rho": rho_pair(scaled(strength, unit))}
    _, cold, f, g, _ = engine.solve(costs, weights, DIVERGENCE, 0.1, tol=1e-6, **call)
    init = [v for pair in zip(f, g, strict=True) for v in pair]
    _, warm, *_ = engine.solve(costs, weights, DIVERGENCE, 0.1, tol=1e-5, init=init, **call)
    assert float(warm[..., 0].max()) <= 2
    assert float(cold[..., 0].min()) > 2


@pytest.mark.parametrize(("n", "m"), [(23, 19), (45, 300)])  # many row teams, and one
def test_soft_order_of_threads(
    engine: Engine, regime: str, rng: torch.Generator, n: int, m: int
) -> None:
    costs, weights, unit = soft_problem(rng, torch.float64, n, m)
    costs = costs[:2]  # a matrix of (m, m) does not fit into every regime
    results = []
    for order in ORDERS:
        engine.configure(order=order)
        values, status, f, g, _ = engine.solve(
            costs, weights, DIVERGENCE[: 2 * len(costs)], 0.1, tol=1e-4, rho=(unit, math.inf)
        )
        results.append([values, status, *f, *g])
    for other in results[1:]:
        assert all(bool((x == y).all()) for x, y in zip(results[0], other, strict=True))


# Problems that trip the solver: (x, y, a, b) and eps.
HARD_PROBLEMS = ["near", "far clusters", "outliers", "wide weights"]


def hard_problem(kind: str, rng: torch.Generator) -> tuple[Tensor, list[Tensor], float]:
    n, m = 30, 26
    x, y = randn(rng, 1, n, 3), 0.7 * randn(rng, 1, m, 3) + 0.5
    weights = [torch.full((1, size), 1 / size, dtype=torch.float64) for size in (n, m)]
    eps = 0.03
    if kind == "far clusters":  # the semidual is flat until they exchange mass
        x[:, : n // 2] += 20
        y[:, : m // 3] += 20
        eps = 0.2
    elif kind == "outliers":
        y[:, :2] *= 20
        eps = 0.2
    elif kind == "wide weights":
        weights = [10 ** (-6 * rand(rng, 1, size)) for size in (n, m)]
        weights = [w / w.sum(-1, keepdim=True) for w in weights]
    (C,) = reference.cost([x, y], [], [0, 1], 0)
    return C, weights, eps


@pytest.mark.parametrize("kind", HARD_PROBLEMS)
@pytest.mark.parametrize("strength", [None, 1e-2, 1e3, (None, 0.1)], ids=str)
def test_takes_the_steps_of_the_cpu(
    engine: Engine,
    long_memory: Engine,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    strength: Strength | None,
    rng: torch.Generator,
) -> None:
    """With one memory the passes agree, but for what rounding makes of a long way; with less memory
    they are some more."""
    monkeypatch.setenv("OTLOSS_CUDA_REGIME", "block")
    monkeypatch.setenv("OTLOSS_NEWTON", "0")
    long_memory.configure()
    C, weights, eps = hard_problem(kind, rng)
    unit = float(C.mean())
    rho = HARD if strength is None else rho_pair(scaled(strength, unit))
    call = {"tol": 1e-3, "max_iters": 2000, "rho": rho}
    expected, cpu, *_ = on_the_cpu([C], weights, [0, 1], eps, **call)
    passes = float(cpu[0, 0, 0])
    assert bool(cpu[0, 0, 2])
    for solver, few, share in ((long_memory, 2, 0.15), (engine, 4, 0.5)):
        values, status, *_ = solver.solve([C], weights, [0, 1], eps, **call)
        assert bool(status[0, 0, 2])
        assert abs(float(status[0, 0, 0]) - passes) <= few + share * passes
        torch.testing.assert_close(values, expected, rtol=1e-2, atol=1e-3 * unit)


@pytest.mark.parametrize("kind", HARD_PROBLEMS)
def test_hard_problems_in_float32(
    engine: Engine, regime: str, kind: str, rng: torch.Generator
) -> None:
    C, weights, eps = hard_problem(kind, rng)
    call = {"tol": 1e-2, "max_iters": 2000}
    expected, *_ = on_the_cpu([C], weights, [0, 1], eps, tol=1e-6, max_iters=20000)
    values, status, *_ = engine.solve(
        [C.float()], [w.float() for w in weights], [0, 1], eps, **call
    )
    assert bool((status[..., 2] == 1).all())
    torch.testing.assert_close(values.double(), expected, rtol=3e-2, atol=1e-2 * eps)


# ------------------------------------------------------------------- the start between Gaussians


def startable(d: int, same_spread: bool, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Clouds large enough for the CPU to try the start first, x in a plane if d > 2."""
    points, weights = clouds(dtype, 1, 175, 165, d)
    if d > 2:
        points[0][..., -1] = points[0][..., 0]
    if not same_spread:
        points[1] = 3 * points[1] + 4
    return points, weights


@pytest.mark.parametrize("method", ["dense", "streamed"])
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("same_spread", [False, True])
@pytest.mark.parametrize("rho", [HARD, (5.0, 8.0), (math.inf, 3.0)], ids=str)
def test_starts_as_the_cpu(
    long_memory: Engine,
    monkeypatch: pytest.MonkeyPatch,
    rho: tuple[float, float],
    same_spread: bool,
    d: int,
    method: str,
) -> None:
    """At the potential between Gaussians: near at large eps, given up or not at small eps."""
    monkeypatch.setenv("OTLOSS_NEWTON", "0")
    long_memory.configure()
    points, weights = startable(d, same_spread, torch.float64)
    cloud, costs = Cloud(points, 0), reference.cost(points, [], [0, 1], 0)
    given = {"costs": cloud} if method == "streamed" else {"costs": costs, "start": cloud}
    unit = float(costs[0].mean())
    for fraction in (1.0, 0.05, 1e-3):
        options = (fraction * unit, *rho, 1e-2, 300, -1, 0, False)
        loss, cpu, *_ = ops.solve_points(
            points, weights, [0, 1], [1.0], [], 0, method == "dense", *options
        )
        values, status, *_ = long_memory.solve(
            weights=weights, pairs=[0, 1], eps=options[0], tol=1e-2, max_iters=300, rho=rho, **given
        )
        passes = float(cpu[0, 0, 0])
        assert abs(float(status[0, 0, 0]) - passes) <= 1 + 0.15 * passes
        assert bool(status[0, 0, 2] == cpu[0, 0, 2])
        torch.testing.assert_close(values[0], loss, rtol=1e-2, atol=1e-2 * options[0])


def gaussian_potential(x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: float) -> Tensor:
    """The formula of csrc/core/gaussian_potential.h, by eigenvalues, at eps of |x - y|^2."""
    e = eps / 2

    def root(S: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(S)
        return vectors @ (values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT)

    def moments(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        w = w / w.sum()
        mean = w @ z
        return mean, (z - mean).mT @ (w.unsqueeze(-1) * (z - mean))

    (mx, A), (my, B) = moments(x, a), moments(y, b)
    identity = torch.eye(x.shape[-1], dtype=x.dtype)
    inner = root(root(A) @ B @ root(A) + e**2 / 4 * identity) + e / 2 * identity
    M = identity - root(A) @ torch.linalg.inv(inner) @ root(A)
    z = y - my
    return torch.where(b > 0, ((z @ M) * z).sum(-1) + 2 * z @ (my - mx), 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("d", [1, 2, 5, 16, 33, 64])
def test_the_start_between_gaussians(
    long_memory: Engine, d: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """One pass from it shows where it was: f is its softmin."""
    long_memory.configure()
    points = [randn(rng, 2, 41, d, dtype=dtype), randn(rng, 2, 37, d, dtype=dtype)]
    points[0] = points[0] @ randn(rng, d, d, dtype=dtype) / d**0.5
    weights = [rand(rng, 2, size, dtype=dtype) + 0.1 for size in (41, 37)]
    weights[0][:, 3] = weights[1][:, 5] = 0
    points[0][:, 3] = points[1][:, 5] = math.nan  # padding
    weights = [w / w.sum(-1, keepdim=True) for w in weights]
    clean = [torch.where(w.unsqueeze(-1) > 0, x, 0.0) for x, w in zip(points, weights, strict=True)]
    (C,) = reference.cost(clean, [], [0, 1], 0)
    eps = 0.3 * float(C.mean())
    _, status, f, _, _ = long_memory.solve(
        [C], weights, [0, 1], eps, max_iters=1, start=Cloud(points, 0, weights)
    )
    assert bool((status[..., 0] == 1).all())
    for k in range(2):
        (x, y), (a, b) = ([t[k].double() for t in side] for side in (clean, weights))
        g = gaussian_potential(x, y, a, b, eps)
        expected = reference.softmin(eps, C[k].double(), g, b)
        digits = 1e-5 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(
            f[0][k].double()[a > 0], expected[a > 0], rtol=0, atol=digits * float(C.mean())
        )


def test_the_start_is_left_out_where_it_takes_longer_than_it_saves(engine: Engine) -> None:
    points, weights = clouds(torch.float32, 1, 60, 50)
    costs = reference.cost(points, [], [0, 1], 0)
    before = engine.library.engine_launches()
    engine.solve(costs, weights, [0, 1], 1.0, start=Cloud(points, 0))
    assert engine.library.engine_launches() - before == 1


def test_the_start_is_left_out_where_its_matrices_do_not_fit(long_memory: Engine) -> None:
    points, weights = clouds(torch.float32, 1, 60, 50, 64)
    costs = reference.cost(points, [], [0, 1], 0)
    launches = []
    for kilobytes in (163, 99):
        long_memory.configure(shared=kilobytes * 1024)
        before = long_memory.library.engine_launches()
        _, status, *_ = long_memory.solve(costs, weights, [0, 1], 60.0, start=Cloud(points, 0))
        assert bool((status[..., 2] == 1).all())
        launches.append(long_memory.library.engine_launches() - before)
    assert launches == [4, 1]


@pytest.mark.parametrize("d", [2, 20])
def test_the_start_does_not_depend_on_the_order_of_threads(long_memory: Engine, d: int) -> None:
    points, weights = clouds(torch.float32, 2, 130, 120, d)
    results = []
    for order in ORDERS:
        long_memory.configure(order=order)
        values, status, f, g, _ = long_memory.solve(
            Cloud(points, 0), weights, DIVERGENCE, 0.5, tol=1e-3
        )
        results.append([values, status, *f, *g])
    for other in results[1:]:
        assert all(bool((x == y).all()) for x, y in zip(results[0], other, strict=True))
