"""What only a GPU has: launch regimes, orders of threads, few multiprocessors, rows shared by
blocks, tensor cores, launch layouts. On the emulated GPU of backends.py, and on a real one too if
there is one.

Losses, gradients and results run on it among the other backends: `pytest -k emulated`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from backends import HAS_COMPILER, HAS_GPU, emulated, serving
from helpers import DTYPES, STRENGTHS, covering, name, rand, randn, rho, scaled, solved
from torch import Tensor

import otloss
from otloss import ops, reference

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_COMPILER, reason="needs g++")]

SINGLE, DOUBLE = DTYPES
DIVERGENCE = (0, 1, 0, 0, 1, 1)
COEFFICIENTS = [1.0, -0.4, 0.7, *[0.25] * 20]  # no sum of two pairs hides an error
HARD = (math.inf, math.inf)  # rho_x, rho_y
SOFT = [HARD, (0.7, 0.3), (math.inf, 0.5), (0.02, math.inf)]
STORED = ["block", "cluster", "grid", "dense"]  # where the cost matrix is kept
# Rows of a streamed solve that several blocks share, in several parts.
SHARED = ["team 4 parts 1", "team 4 parts 2", "team 4 parts 4", "team 6 parts 3"]
STREAMED = ["streamed", *SHARED]
REGIMES = [*STORED, *STREAMED]
MODES = ["envelope", "unrolled", "implicit"]
SHAPES = [(1, 1), (1, 9), (9, 1), (3, 70), (70, 3), (64, 64), (17, 600), (130, 129), (700, 3)]
SHAPES += [(1, 300), (5, 700), (17, 1100)]


def moved(value: Any, device: str) -> Any:
    """Every tensor in a structure."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)([moved(v, device) for v in value])
    if is_dataclass(value):
        return replace(value, **{k: moved(v, device) for k, v in vars(value).items()})
    return value


@dataclass
class Gpu:
    module: ModuleType | None  # None: a real one
    dense: bool = True
    device: dict[str, int] = field(default_factory=dict)  # of an emulated one

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """On the GPU, with tensors of the CPU in and out."""
        if self.module is not None:
            with serving(self.module, **self.device):
                return function(*arguments)
        return moved(function(*moved(arguments, "cuda")), "cpu")

    def solve(self, p: Problem, init: Any = (), **options: Any) -> Solved:
        options = {"dense": self.dense, **options}
        return self.call(lambda p, init: solve(p, init=init, **options), p, init)

    def gradient(self, mode: str, p: Problem, s: Seeds, **options: Any) -> Any:
        options = {"dense": self.dense, **options}
        return self.call(lambda p, s: gradient(mode, p, s, **options), p, s)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets OTLOSS_CUDA_REGIME, _TILES, _TEAM, _PARTS by their last word."""

    def force(**values: object) -> None:
        for word, value in values.items():
            monkeypatch.setenv(f"OTLOSS_CUDA_{word.upper()}", str(value))

    return force


@pytest.fixture
def regime(request: pytest.FixtureRequest, force: Callable[..., None]) -> str:
    words = request.param.split()
    force(**dict(zip(words[::2], words[1::2], strict=True)) if words[1:] else {"regime": words[0]})
    return str(request.param)


def stores_costs(request: pytest.FixtureRequest) -> bool:
    return "regime" not in request.fixturenames or request.getfixturevalue("regime") in STORED


@pytest.fixture(params=["emulated", "cuda"] if HAS_GPU else None)
def gpu(request: pytest.FixtureRequest) -> Gpu:
    if not HAS_GPU or request.param == "emulated":
        return Gpu(emulated(), stores_costs(request))
    if "cluster" in request.node.name and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("thread-block clusters need compute capability 9.0")
    return Gpu(None, stores_costs(request))


@pytest.fixture
def emulator(request: pytest.FixtureRequest) -> Gpu:
    """Where the device itself is set, or launches are counted."""
    return Gpu(emulated(), stores_costs(request))


@pytest.fixture
def long_memory() -> Gpu:
    """As many L-BFGS pairs as the CPU, and a start between Gaussians whatever it takes."""
    return Gpu(emulated(OTLOSS_LBFGS_PAIRS="8", OTLOSS_START_PASSES="1e9"))


def some(names: str, *values: Any) -> Any:
    """parametrize: cases in which all combinations of any two factors occur."""
    fixtures = ["regime"] if names.startswith("regime") else []
    cases = [pytest.param(*case) for case in covering(2, *values)]
    return pytest.mark.parametrize(names, cases, indirect=fixtures, ids=name)


every_regime = some("regime", REGIMES)
where_stored = some("regime", STORED)


# ------------------------------------------------------------------------------------- problems


@dataclass
class Problem:
    """Pairs of clouds, and their cost matrices where these are given."""

    points: list[Tensor]
    weights: list[Tensor]
    kind: int = 0
    pairs: tuple[int, ...] = DIVERGENCE
    eps: float = 1.0
    rho: tuple[float, float] = HARD
    objective: int = 0
    costs: list[Tensor] | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        costs = None if self.costs is None else [t.to(dtype) for t in self.costs]
        points, weights = ([t.to(dtype) for t in side] for side in (self.points, self.weights))
        return replace(self, points=points, weights=weights, costs=costs)

    def clean(self) -> list[Tensor]:
        """Points in float64, 0 in place of padding."""
        pairs = zip(self.points, self.weights, strict=True)
        return [torch.where(w[..., None] > 0, x, 0.0).double() for x, w in pairs]

    def matrices(self) -> list[Tensor]:
        """In float64, by the reference."""
        if self.costs is not None:
            return [C.double() for C in self.costs]
        return reference.cost(self.clean(), [], list(self.pairs), self.kind)

    def unit(self) -> float:
        return float(self.matrices()[0].mean()) + 0.01

    def arguments(self) -> Any:
        """Of operations: costs alone where they are given."""
        pairs, points = list(self.pairs), [] if self.costs else self.points
        call = {"costs": self.costs, "points": points, "kind": self.kind, "rho": self.rho}
        coefficients = COEFFICIENTS[: len(pairs) // 2]
        call["objective"] = self.objective
        return ops.problems(self.weights, pairs, coefficients, self.eps, **call)

    def stored(self) -> Problem:
        return replace(self, costs=[C.to(self.weights[0].dtype) for C in self.matrices()])

    def sides(self) -> list[tuple[int, int]]:
        return list(zip(self.pairs[::2], self.pairs[1::2], strict=True))


def problem(
    dtype: torch.dtype, n: int = 40, m: int = 33, d: int = 3, *, batch: int = 2, eps: float = 1.0,
    kind: int = 0, far: float = 0.0, **rest: Any,
) -> Problem:  # fmt: skip
    """Two clouds with uneven weights, one of them 0 in each; eps and rho in units of the mean
    cost, totals that differ where nothing ties them."""
    rng = torch.Generator().manual_seed(n * m + d)
    points = [far + randn(rng, batch, n, d), far + 0.5 + randn(rng, batch, m, d)]
    weights = [rand(rng, batch, size) + 0.1 for size in (n, m)]
    for w in weights:
        if w.shape[1] > 2:
            w[:, w.shape[1] // 3] = 0
        w /= w.sum(-1, keepdim=True)
    p = Problem(points, weights, kind, **rest).to(dtype)
    if p.rho != HARD:
        p.weights[1] *= 2.5
    unit = p.unit()
    return replace(p, eps=eps * unit, rho=(p.rho[0] * unit, p.rho[1] * unit))


@dataclass
class Solved:
    loss: Tensor
    status: Tensor
    f: list[Tensor]
    g: list[Tensor]
    traces: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.loss, self.status, *self.f, *self.g]


def solve(p: Problem, *, dense: bool = True, init: Any = (), **options: Any) -> Solved:
    trace = options.get("n_iters", -1) > 0
    return Solved(*solved(p.arguments(), list(init), dense=dense, trace=trace, **options)[:5])


def exactly(p: Problem, **options: Any) -> Solved:
    """By the CPU kernels in float64, far below the tolerances here."""
    p = replace(p.to(DOUBLE), costs=p.matrices())
    a, b = p.weights
    if p.rho == HARD:
        p.weights = [a, b * (a.sum(-1, True) / b.sum(-1, True))]
    found = solve(p, **{"tol": 1e-8, "max_iters": 20000, **options})
    for k, (i, j) in enumerate(p.sides()):
        if i == j:  # an outlier settles slowly between f and g, not in their sum
            found.f[k] = found.g[k] = 0.5 * (found.f[k] + found.g[k])
    return found


def of_potentials(found: Solved, true: Solved, p: Problem) -> float:
    """Largest difference over points of positive weight, up to a constant each."""
    largest = 0.0
    for k, (i, j) in enumerate(p.sides()):
        for x, y, side in ((found.f[k], true.f[k], i), (found.g[k], true.g[k], j)):
            w = p.weights[side].double()
            difference = x.double() - y
            shift = (difference * w).sum(-1, True) / w.sum(-1, True)
            largest = max(largest, float(((difference - shift) * (w > 0)).abs().max()))
    return largest


def assert_solved(gpu: Gpu, p: Problem, tol: float) -> None:
    """To tol=1e-5, the loss and the potentials relative to the costs."""
    found, true, unit = gpu.solve(p, tol=1e-5), exactly(p), p.unit()
    assert bool((found.status[..., 2] == 1).all())
    assert float(found.status[..., 1].max()) <= 1e-5
    atol = tol * min(1.0, unit) if gpu.dense else tol * unit
    torch.testing.assert_close(found.loss.double(), true.loss, rtol=tol, atol=atol)
    assert of_potentials(found, true, p) < (3e-4 if gpu.dense else 1e-3) * unit
    for k, (i, j) in enumerate(p.sides()):
        assert not bool(found.f[k][p.weights[i] == 0].any() or found.g[k][p.weights[j] == 0].any())
        counted = (p.weights[i] > 0)[:, :, None] & (p.weights[j] > 0)[:, None]
        largest = torch.where(counted, p.matrices()[k], 0.0).amax((1, 2))
        told = found.status[k, :, 3]
        assert bool((told >= largest * (1 - 1e-5) - 1e-6).all())
        if gpu.dense:  # else it is only bounded, by the norms
            torch.testing.assert_close(told, largest, rtol=1e-4, atol=1e-5)


def assert_bitwise_equal(results: list[list[Tensor]]) -> None:
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# ---------------------------------------------------------------------------------------- solve


@some(
    "regime, dtype, kind, d, eps, penalty",
    REGIMES, DTYPES, range(3), [1, 3, 17, 70], [1.0, 0.1, 0.015],
    SOFT,
)  # fmt: skip
def test_solves_a_divergence(gpu, regime, dtype, kind, d, eps, penalty):
    """Far from the origin, with coincident points."""
    p = problem(dtype, d=d, kind=kind, eps=eps, far=10.0 * (kind < 2), rho=penalty)
    p.points[1][:, 4] = p.points[0][:, 5]
    assert_solved(gpu, p, 1e-5 if gpu.dense else 2e-5)


@some("regime, shape, dtype, d", REGIMES, SHAPES, DTYPES, [2, 50])
def test_shapes(gpu, regime, shape, dtype, d, force):
    if regime == "block" and max(shape) > 600:
        force(regime="dense")
    assert_solved(gpu, problem(dtype, *shape, d, batch=1, kind=1, pairs=(0, 1), eps=0.5), 2e-5)


@some("dtype, penalty", DTYPES, [HARD, (2.0, 0.5)])
def test_more_columns_than_registers_hold(gpu, dtype, penalty):
    assert_solved(gpu, problem(dtype, 3, 4200, batch=1, pairs=(0, 1), rho=penalty, eps=0.3), 2e-5)


def assert_iterations(p: Problem, found: Solved, tolerance: float) -> None:
    """Those of the reference."""
    for k, (i, j) in enumerate(p.sides()):
        a, b = p.weights[i].double(), p.weights[j].double()
        marginals, C = reference.marginals_of(*p.rho, i, j), p.matrices()[k]
        count, start = found.traces[k].shape[1], torch.zeros_like(b)
        call = (C, a, b, start, p.eps, count, marginals)
        *_, error, steps = reference.fixed_iterations(*call)
        if p.rho != HARD:
            close = {"rtol": 300 * tolerance, "atol": tolerance}
            torch.testing.assert_close(found.status[k, :, 1], error, **close)
        expected, last = torch.stack(steps, dim=1), torch.cat([found.f[k], found.g[k]], -1)
        scale = float(expected.abs().max())
        for got, true in ((found.traces[k], expected), (last, expected[:, -1])):
            got = got.double() / scale
            torch.testing.assert_close(got, true / scale, rtol=0, atol=tolerance)
        assert bool((found.status[k, :, 0] == count).all())


@some("regime, dtype, kind, d, eps, penalty",
      REGIMES, DTYPES, range(3), [5, 40], [1.0, 1e-3], SOFT)  # fmt: skip
def test_fixed_iterations(gpu, regime, dtype, kind, d, eps, penalty):
    """From a cold start at small eps most sums underflow and are made again; all blocks must agree
    on that."""
    p = problem(dtype, 70, 75, d=d, kind=kind, eps=eps, rho=penalty)
    exact = 1e-10 if gpu.dense else 1e-9
    assert_iterations(p, gpu.solve(p, n_iters=3), 1e-4 if dtype == SINGLE else exact)


@some("regime, dtype, penalty", STORED, DTYPES, [(1e-2, 1e-3), (math.inf, 1e-2)])
def test_soft_factors_that_overflow(gpu, regime, dtype, penalty, rng):
    """exp(-f / rho) is beyond any number where C is far below 0: all columns take the guard."""
    costs = [3 * randn(rng, 1, 14, 11, dtype=dtype)]
    weights = [torch.full((1, n), 1 / n, dtype=dtype) for n in (14, 11)]
    p = Problem([], weights, pairs=(0, 1), eps=0.05, rho=penalty, costs=costs)
    assert_iterations(p, gpu.solve(p, n_iters=2), 1e-4)


@some("regime, d", REGIMES, [3, 30])
def test_small_eps_from_a_cold_start(gpu, regime, d):
    """Row and column sums overflow and vanish: the guarded sums take over, stages help."""
    p = problem(SINGLE, 50, 45, d, batch=1, kind=1)
    p = replace(p, points=[100 * x for x in p.points], eps=2.0)
    found = gpu.solve(p, max_iters=3000)
    assert bool((found.status[..., 2] == 1).all())
    torch.testing.assert_close(found.loss.double(), exactly(p).loss, rtol=1e-3, atol=1e-2)


@some("regime, kind, objective, penalty", REGIMES, range(3), [0, 1], SOFT)
def test_the_loss_is_that_of_the_potentials(gpu, regime, kind, objective, penalty):
    p = problem(DOUBLE, kind=kind, eps=0.1, objective=objective, rho=penalty)
    found, values = gpu.solve(p, tol=1e-6), []
    for k, (i, j) in enumerate(p.sides()):
        C, a, b, f, g = p.matrices()[k], p.weights[i], p.weights[j], found.f[k], found.g[k]
        P = reference.plan(p.eps, C, f, g, a, b)
        value = (P * C).sum((1, 2)) if objective else torch.zeros_like(found.loss)
        for w, v, r in ((a, f, p.rho[i > 0]), (b, g, p.rho[j > 0])) if objective == 0 else ():
            value += (w * v if math.isinf(r) else r * (w - w * (-v / r).exp())).sum(-1)
        if objective == 0 and penalty != HARD:
            value -= p.eps * (P.sum((1, 2)) - a.sum(-1) * b.sum(-1))
        values.append(COEFFICIENTS[k] * value)
    torch.testing.assert_close(found.loss, sum(values), rtol=1e-9, atol=1e-9)


@every_regime
def test_what_is_not_finite(gpu, regime):
    p = problem(SINGLE, pairs=(0, 1))
    p.points[0][1, 4, 1] = math.nan
    found, (trace,) = gpu.solve(p), gpu.solve(p, n_iters=2).traces
    assert found.loss.isfinite().tolist() == [True, False]
    assert found.status[0, :, 2].tolist() == [1, 0]
    assert bool(found.f[0][1].isnan().all() and found.status[0, 1, 3].isnan())
    assert bool(trace[0].isfinite().all() and trace[1].isnan().all())


@some("regime, penalty", REGIMES, SOFT[:3])
def test_a_warm_start_needs_few_iterations(gpu, regime, penalty):
    p = problem(DOUBLE, eps=0.1, rho=penalty)
    cold = gpu.solve(p, tol=1e-6)
    init = [v for pair in zip(cold.f, cold.g, strict=True) for v in pair]
    warm = gpu.solve(p, tol=1e-5, init=init)
    assert float(warm.status[..., 0].max()) <= 2
    assert float(cold.status[..., 0].min()) > 2


@every_regime
def test_max_iters_is_kept(gpu, regime):
    status = gpu.solve(problem(SINGLE, eps=0.002, pairs=(0, 1)), tol=1e-7, max_iters=13).status
    assert bool((status[..., 0] <= 13).all() and (status[..., 2] == 0).all())


@some("regime, dtype, strength", REGIMES, DTYPES, [*STRENGTHS, 1e-3, 10.0, 1e3])
def test_soft_marginals(gpu, regime, dtype, strength):
    tol = 1e-8 if dtype == DOUBLE else 3e-5
    if dtype == SINGLE and strength == 1e3:
        tol = 1e-2  # potentials of some 1000 cannot resolve more of eps
    p = problem(dtype, 23, 19, eps=0.05, rho=rho(strength))
    found, true = gpu.solve(p, tol=tol), exactly(p, tol=1e-10)
    assert bool((found.status[..., 2] == 1).all())
    assert float(found.status[..., 1].max()) <= tol
    scale = float(true.loss.abs().max())
    torch.testing.assert_close(found.loss.double() / scale, true.loss / scale, rtol=0, atol=tol)
    for got, expected in zip([*found.f, *found.g], [*true.f, *true.g], strict=True):
        digits = 1e-4 if dtype == SINGLE else 1e-10
        torch.testing.assert_close(got.double(), expected, rtol=digits, atol=100 * tol)


HARD_PROBLEMS = ["near", "far clusters", "outliers", "wide weights"]


def hard_problem(kind: str, rng: torch.Generator) -> Problem:
    """That trips a solver."""
    n, m = 30, 26
    x, y = randn(rng, 1, n, 3), 0.7 * randn(rng, 1, m, 3) + 0.5
    weights = [torch.full((1, size), 1 / size, dtype=DOUBLE) for size in (n, m)]
    if kind == "far clusters":  # the semidual is flat until they exchange mass
        x[:, : n // 2] += 20
        y[:, : m // 3] += 20
    elif kind == "outliers":
        y[:, :2] *= 20
    elif kind == "wide weights":
        weights = [10 ** (-6 * rand(rng, 1, size)) for size in (n, m)]
        weights = [w / w.sum(-1, keepdim=True) for w in weights]
    eps = 0.2 if kind in ("far clusters", "outliers") else 0.03
    return Problem([x, y], weights, pairs=(0, 1), eps=eps).stored()


@some("kind, strength", HARD_PROBLEMS, [None, 1e-2, 1e3, (None, 0.1)])
def test_takes_the_steps_of_the_cpu(emulator, long_memory, force, monkeypatch, kind, strength, rng):
    """With one memory the passes agree, but for what rounding makes of a long way; with less memory
    they are some more."""
    force(regime="block")
    monkeypatch.setenv("OTLOSS_NEWTON", "0")
    p = hard_problem(kind, rng)
    unit = float(p.costs[0].mean())
    p.rho = HARD if strength is None else rho(scaled(strength, unit))
    expected = solve(p, max_iters=2000)
    passes = float(expected.status[0, 0, 0])
    assert bool(expected.status[0, 0, 2])
    for solver, few, share in ((long_memory, 2, 0.15), (emulator, 4, 0.5)):
        found = solver.solve(p, max_iters=2000)
        assert bool(found.status[0, 0, 2])
        assert abs(float(found.status[0, 0, 0]) - passes) <= few + share * passes
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-2, atol=1e-3 * unit)


@some("regime, kind", STORED, HARD_PROBLEMS)
def test_hard_problems_in_float32(gpu, regime, kind, rng):
    p = hard_problem(kind, rng)
    found, true = gpu.solve(p.to(SINGLE), tol=1e-2, max_iters=2000), exactly(p, tol=1e-6)
    assert bool((found.status[..., 2] == 1).all())
    torch.testing.assert_close(found.loss.double(), true.loss, rtol=3e-2, atol=1e-2 * p.eps)


# ------------------------------------------------------------------------------------- gradients


@dataclass
class Seeds:
    """A solution, and gradients of the loss and of the potentials from outside."""

    loss: Tensor
    f: list[Tensor]
    g: list[Tensor]
    solution: tuple[list[Tensor], list[Tensor]]  # potentials; unrolled: start and traces


def seeds(p: Problem, mode: str, *, n_iters: int = 7, init: Any = ()) -> Seeds:
    """Solved on the CPU, so that nothing but the gradients' rounding differs."""
    rng = torch.Generator().manual_seed(p.weights[0].shape[1])
    count = n_iters if mode == "unrolled" else -1
    found = solve(p, init=init, tol=1e-6, max_iters=500, n_iters=count)
    solution = (list(init), found.traces) if mode == "unrolled" else (found.f, found.g)
    f, g = ([0.1 * randn(rng, *v.shape, dtype=v.dtype) for v in s] for s in (found.f, found.g))
    return Seeds(randn(rng, *found.loss.shape, dtype=found.loss.dtype), f, g, solution)


def gradient(mode: str, p: Problem, s: Seeds, *, dense: bool, wanted: Any = (0, 1)) -> Any:
    """Of points (or costs) and weights, then the status of the linear systems (implicit)."""
    held, problem, wanted = mode == "envelope", p.arguments(), list(wanted)
    clouds = (p.points, p.weights, list(p.pairs), p.kind)
    if p.costs is None and (dense or (held and p.objective == 1)):
        problem = problem._replace(costs=ops.cost(*clouds), points=[])
    costs = list(range(len(problem.costs))) if wanted else []
    want = (costs, [] if problem.costs else wanted, True)
    head = (s.loss,) if held else (s.loss, s.f, s.g)
    call = getattr(ops, f"{mode}_backward")
    of_costs, of_points, *rest = call(*head, *problem, *s.solution, *want)
    if p.costs is None and problem.costs:
        of_points = ops.cost_backward(of_costs, problem.costs, *clouds, wanted) if wanted else []
    return of_points if p.costs is None else of_costs, *rest


def assert_gradients(
    gpu: Gpu, mode: str, p: Problem, s: Seeds, looser: float = 1.0, **options: Any
) -> None:
    """With those of the CPU, relative to the largest of the points and of the weights."""
    found = gpu.gradient(mode, p, s, **options)
    expected = gradient(mode, p, s, **{"dense": gpu.dense, **options})
    single = p.weights[0].dtype == SINGLE
    tolerance = looser * (2e-5 if single else 1e-10)
    weights = [[*one[1], *one[2]] for one in (found, expected)]
    for got, true in ((found[0], expected[0]), weights):
        scale = max([1e-30, *(float(t.abs().max()) for t in true)])
        for x, y in zip(got, true, strict=True):
            torch.testing.assert_close(x / scale, y / scale, rtol=0, atol=tolerance)
    if mode == "implicit":
        assert bool(((found[3][..., 0] - expected[3][..., 0]).abs() <= 2).all())
        assert float(found[3][..., 1].max()) < (1e-8 if single else 1e-13)


@some(
    "regime, mode, objective, penalty, cost, dtype",
    REGIMES, MODES, [0, 1], SOFT, [(0, 1), (0, 3), (1, 3), (2, 3), (0, 20), (1, 20), (2, 40)],
    DTYPES,
)  # fmt: skip
def test_gradients(gpu, regime, mode, objective, penalty, cost, dtype):
    p = problem(dtype, d=cost[1], kind=cost[0], eps=0.3, objective=objective, rho=penalty)
    assert_gradients(gpu, mode, p, seeds(p, mode), looser=1 if gpu.dense else 10)


@some("regime, mode, shape", REGIMES, MODES, SHAPES)
def test_gradients_at_every_shape(gpu, regime, mode, shape, force):
    if regime == "block" and max(shape) > 600:
        force(regime="dense")
    for dtype, d in ((SINGLE, 3), (DOUBLE, 18)):
        p = problem(dtype, *shape, d, batch=1, kind=1, eps=0.3, objective=1, pairs=(0, 1))
        looser = 3 if gpu.dense else 30
        assert_gradients(gpu, mode, p, seeds(p, mode, n_iters=3), looser)


FAR_APART = [  # eps, rho, level of the start
    (4e-3, (1e-3, 0.3), 0.0),
    (0.01, (math.inf, 1e-4), 0.0),
    (2e-3, HARD, 0.0),
    (0.1, (0.7, math.inf), 1.0),
    (0.1, (0.7, math.inf), 400.0),
]


@some("regime, case, dtype", REGIMES, FAR_APART, DTYPES)
def test_unrolled_where_factors_overflow(gpu, regime, case, dtype):
    """exp((g' - g) / eps) in a cold start or from a level far away, exp(f / rho) of points that
    are not transported: the softmaxes of an iteration are far apart, both take an exponential."""
    eps, penalty, level = case
    p = problem(dtype, 30, 26, eps=eps, rho=penalty)
    init = [torch.where(p.weights[c] > 0, level, 0.0).to(dtype) for c in p.pairs] if level else []
    s = seeds(p, "unrolled", n_iters=3, init=init)
    f, g = s.solution[1][0].split((30, 26), -1)
    change = ((init[1] if level else 0.0) - g[:, 0]).abs() / p.eps * (p.weights[1] > 0)
    of_rho = [v[:, 0].abs() / r for v, r in ((f, p.rho[0]), (g, p.rho[1]))]
    factors = change if level else torch.cat([*of_rho, change], -1)
    assert bool(factors.max() > 60 * math.log(2)) == (level != 1.0)  # kTrusted
    assert_gradients(gpu, "unrolled", p, s, looser=20 if gpu.dense else 100)


@some("regime, mode, wanted", REGIMES, MODES[1:], [(), (0,), (1,), (0, 1)])
def test_gradients_of_what_is_wanted(gpu, regime, mode, wanted):
    """With and without gradients of potentials from outside."""
    p = problem(DOUBLE, kind=2, eps=0.3, objective=1)
    s = seeds(p, mode, n_iters=4)
    for given in (s, replace(s, f=[], g=[])):
        assert_gradients(gpu, mode, p, given, wanted=wanted)


@some("regime, mode, content", STORED, MODES, [3.0, 1e30, math.nan])
def test_padding_of_cost_matrices(gpu, regime, mode, content):
    """Changes no bit of a solution or a gradient, and receives none."""
    p, (row, column) = problem(SINGLE, eps=0.3, pairs=(0, 1)).stored(), (40 // 3, 33 // 3)
    padded = p.costs[0].clone()
    padded[:, row] = padded[:, :, column] = content
    s, both = seeds(p, mode, n_iters=4), [p, replace(p, costs=[padded])]
    results = [[t for (t,) in gpu.gradient(mode, q, s)[:3]] for q in both]
    if math.isfinite(content):
        assert_bitwise_equal([gpu.solve(q).tensors() for q in both])
    assert_bitwise_equal(results)
    grad_C, grad_a, grad_b = results[1]
    assert not bool(grad_C[:, row].any() or grad_C[:, :, column].any())
    assert not bool(grad_a[:, row].any() or grad_b[:, column].any())


@some("regime, mode", REGIMES, MODES[1:])
def test_gradients_of_what_is_not_finite(gpu, regime, mode):
    p = problem(SINGLE, eps=0.3, objective=1, pairs=(0, 1))
    s = seeds(p, mode, n_iters=3)
    for tensor in (*s.solution[0], *s.solution[1]):
        tensor[1] = math.nan
    points, _, _, *status = gpu.gradient(mode, p, s)
    for x, w in zip(points, p.weights, strict=True):
        assert bool(x[0].isfinite().all() and x[1][w[1] > 0].isnan().all())
    for residual in (told[0, :, 1] for told in status):
        assert bool(residual[0].isfinite() and residual[1].isnan())


@some("dtype, kind, d, same", DTYPES, range(3), [1, 3, 40], [False, True])
def test_costs_and_their_gradients(gpu, dtype, kind, d, same):
    """With padding of NaN, coincident points, and under cosine a point without a direction."""
    p = problem(dtype, 35, 270, d, kind=kind, far=10.0, pairs=(0, 0) if same else (0, 1))
    p.points[1][:, 0] = p.points[0][:, 1]
    p.points[0][:, 2] *= kind != 2
    padding, counted_y = p.weights[0] == 0, p.weights[p.pairs[1]] > 0
    p.points[0][padding] = math.nan
    counted = ~padding[..., None] & counted_y[:, None]
    rest, (expected,) = (list(p.pairs), kind), p.matrices()
    W = torch.where(counted, randn(torch.Generator(), *counted.shape, dtype=dtype), 0.0)
    (C,) = gpu.call(ops.cost, p.points, p.weights, *rest)
    (grad,) = gpu.call(ops.cost_backward, [W], [C], p.points, p.weights, *rest, [0])
    (true,) = reference.cost_backward([W.double()], [expected], p.clean(), [], *rest, [0])
    tolerance = 2e-5 if dtype == SINGLE else 1e-11
    close = {"rtol": 10 * tolerance, "atol": 10 * tolerance}
    C, expected = (torch.where(counted, M.double(), 0.0) for M in (C, expected))
    torch.testing.assert_close(C, expected, **close)
    assert not same or float(C.diagonal(dim1=1, dim2=2)[:, 3:].abs().max()) == 0
    scale = 10 * max(1.0, float(true.abs().max()))
    true[padding] = 0
    torch.testing.assert_close(grad.double() / scale, true / scale, **close)


def errors_of_sums(gpu: Gpu, p: Problem) -> float:
    """Of V 1 x and V y at any potentials, over the largest of both: V as in csrc/kernels.h."""
    i, j = p.pairs
    (C,), a, b = p.matrices(), p.weights[i], p.weights[j]
    rng = torch.Generator().manual_seed(a.numel() + b.numel())
    f, g = (p.eps * randn(rng, *w.shape, dtype=w.dtype) for w in (a, b))
    grad = torch.tensor([2.0, -0.5], dtype=a.dtype)[: a.shape[0]]

    def points_gradient(p: Problem, grad: Tensor, f: Tensor, g: Tensor) -> Tensor:
        problem = p.arguments()._replace(coefficients=[-0.5])
        return ops.envelope_backward(grad, *problem, [f], [g], [], [i], False)[1][0]

    found = gpu.call(points_gradient, p, grad, f, g)
    P = reference.plan(p.eps, C, f.double(), g.double(), a.double(), b.double())
    W, points = -0.5 * grad.double()[:, None, None] * P, [x.double() for x in p.points]
    (expected,) = reference.cost_backward([W], [C], points, [], [i, j], p.kind, [i])
    V = (2 * W, torch.where(C > 0, W / C, 0.0), W)[p.kind]
    V = V + V.mT if i == j else V
    x, y, norm = points[i], points[j], torch.ones(())
    if p.kind == 2:
        norm = x.norm(dim=-1, keepdim=True)
        x, y = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
    size = float((V.sum(-1, keepdim=True) * x).abs().max() + (V @ y).abs().max())
    return float(((found.double() - expected) * norm).abs().max()) / size


@some(
    "dtype, kind, size", DTYPES, range(3),
    [(40, 33, 1), (35, 700, 3), (150, 150, 16), (40, 33, 40), (150, 150, 70), (65, 130, 17, 227),
     (1, 70, 90, 227), (70, 1, 33, 227), (70, 150, 300, 227), (70, 150, 300, 40)],
)  # fmt: skip
def test_gradient_sums_of_points(emulator, dtype, kind, size):
    """By tensor cores a bar that single half-precision products miss by a factor of a hundred."""
    pairs = (0, 0) if size[0] == size[1] else (0, 1)
    p = problem(dtype, *size[:3], kind=kind, eps=0.3, pairs=pairs)
    emulator.device = {"shared": 1024 * size[3]} if len(size) > 3 else {}
    single = 2e-6 if emulator.device else 2e-5
    assert errors_of_sums(emulator, p) < (single if dtype == SINGLE else 1e-11)


# ---------------------------------------------------------------- order of threads, many problems


@some("regime, mode, penalty, objective, size",
      REGIMES, MODES, SOFT[:3], [0, 1], [(37, 150, 3), (20, 75, 40), (20, 19, 3)])  # fmt: skip
def test_order_of_threads_does_not_matter(emulator, regime, mode, penalty, objective, size):
    """Bitwise: a difference would be a race, or a sum without a fixed order. See emulation.h."""
    p = problem(SINGLE, *size, eps=0.2, rho=penalty, objective=objective)
    p, results = replace(p, pairs=p.pairs[:4]), []
    s = seeds(p, mode, n_iters=5)
    cold = replace(p, eps=0.05 * p.eps)  # sums that are made again
    for order in range(5):
        emulator.device = {"order": order}
        points, a, b, *status = emulator.gradient(mode, p, s)
        found = emulator.solve(cold, tol=1e-4, max_iters=6).tensors()
        results.append([*found, *points, *a, *b, *status])
    assert_bitwise_equal(results)


@pytest.mark.parametrize("d", [2, 20])
def test_order_of_threads_does_not_matter_to_the_start(long_memory, d):
    p, results = problem(SINGLE, 130, 120, d, eps=0.1), []
    for order in range(5):
        long_memory.device = {"order": order}
        results.append(long_memory.solve(p, dense=False, max_iters=5).tensors())
    assert_bitwise_equal(results)


OLD = {"capability": 80, "shared": 163 * 1024}
FEW = {"multiprocessors": 3}


@every_regime
def test_many_problems_on_few_multiprocessors(emulator, regime):
    """More than run at once, several one after the other."""
    emulator.device = FEW if regime == "cluster" or "team" in regime else {**FEW, **OLD}
    if "team" in regime:
        emulator.device = {"multiprocessors": 8}
    assert_solved(emulator, problem(SINGLE, 12, 10, batch=7, pairs=(0, 1), eps=0.3), 1e-5)


@some("regime, mode", [*STORED, "streamed"], MODES)
def test_gradients_of_many_problems(emulator, regime, mode):
    """More than run at once, and more pairs than a launch takes."""
    emulator.device = FEW
    objective = int(mode != "envelope")
    p = problem(DOUBLE, 8, 6, 2, batch=5, pairs=(0, 1) * 10, objective=objective, eps=0.3)
    assert_gradients(emulator, mode, p, seeds(p, mode, n_iters=3))


def test_more_pairs_than_a_launch_takes(gpu):
    p = problem(SINGLE, 6, 5, batch=1, pairs=(0, 1) * 11)
    found = gpu.solve(p)
    assert all(torch.equal(f, found.f[0]) for f in found.f)
    torch.testing.assert_close(found.loss, exactly(p).loss.float(), rtol=1e-3, atol=1e-3)


def launches(gpu: Gpu, call: Callable[[], Any]) -> int:
    before = gpu.module.launches()
    call()
    return gpu.module.launches() - before


@pytest.mark.parametrize(("mode", "count"), [("unrolled", 3), ("implicit", 1)])
def test_gradients_are_few_launches(emulator, mode, count):
    """Whatever the number of pairs, problems and iterations."""
    p = problem(SINGLE, eps=0.3, objective=1).stored()
    s = seeds(p, mode, n_iters=20)
    assert launches(emulator, lambda: emulator.gradient(mode, p, s)) == count


# ------------------------------------------------------------------ launch layouts, what is refused


@pytest.mark.parametrize(
    ("problems", "n", "d", "layout"),
    [
        (1, 60, 0, "block, 1 block per problem, 1 at once, cost tile in shared memory"),
        (200, 150, 0, "block, 1 block per problem, 132 at once, cost tile in shared memory"),
        (1, 600, 0, "cluster, 16 blocks per problem, 1 at once, cost tile in shared memory"),
        (1, 9000, 0, "dense, 132 blocks per problem, 1 at once, cost tile in global memory"),
        (200, 20000, 0, "dense, 2 blocks per problem, 66 at once, cost tile in global memory"),
        (1, 9000, 3, "streamed, 132 blocks per problem, 1 at once, costs made on the way"),
    ],
)
def test_the_launch_layout_in_words(emulator, problems, n, d, layout):
    """As OTResult.explain and show_config say it, on 132 multiprocessors."""
    emulator.module.configure(multiprocessors=132)
    assert emulator.module.describe_plan(False, problems, n, n, d).startswith(layout)


def test_old_devices_use_no_clusters(emulator, force):
    p, emulator.device = problem(SINGLE, 260, 250, batch=1, pairs=(0, 1)), OLD
    assert bool((emulator.solve(p).status[..., 2] == 1).all())
    force(regime="cluster")
    with pytest.raises(RuntimeError, match="OTLOSS_CUDA_REGIME=cluster"):
        emulator.solve(p)


@where_stored
def test_a_regime_that_stores_costs_is_refused_for_points(gpu, regime):
    with pytest.raises(RuntimeError, match=f"OTLOSS_CUDA_REGIME={regime} stores costs"):
        gpu.solve(problem(SINGLE), dense=False)


def test_what_is_forced_must_exist(gpu, force):
    p = problem(SINGLE, d=20)
    force(team=4, parts=3)
    with pytest.raises(RuntimeError, match="OTLOSS_CUDA_PARTS=3 must divide the 4 blocks"):
        gpu.solve(p, dense=False)
    force(regime="fast")
    with pytest.raises(RuntimeError, match="OTLOSS_CUDA_REGIME"):
        gpu.solve(p)
    force(tiles="wmma", parts=1, regime="auto")
    with pytest.raises(RuntimeError, match="TILES must be auto, fma, tensor or high, got wmma"):
        gpu.solve(p, dense=False)


def test_the_cpu_kernels_return(emulator):
    emulator.solve(problem(SINGLE, 5, 4))
    x, y = torch.rand(5, 2), torch.rand(4, 2)
    assert launches(emulator, lambda: otloss.sinkhorn_divergence(x, y, 0.5)) == 0


# ---------------------------------------------------------------------------------- tensor cores


def errors_on_points(gpu: Gpu, p: Problem) -> tuple[float, float]:
    """Of the loss and the potentials of a divergence in float32, over the mean cost."""
    found, true = gpu.solve(p.to(SINGLE), dense=False, tol=1e-5), exactly(p)
    assert bool((found.status[..., 2] == 1).all())
    of_loss = float((found.loss.double() - true.loss).abs().max())
    unit = float(p.matrices()[0].mean())
    return of_loss / unit, of_potentials(found, true, p) / unit


@some("kind, size", range(3), [(65, 131, 17), (70, 64, 100), (129, 3, 33), (60, 50, 24)])
def test_tensor_cores_are_as_accurate_as_multiply_adds(gpu, force, kind, size):
    """Outliers set the scale of the halves; the distances of all others keep their digits."""
    p, errors = problem(DOUBLE, *size, batch=1, kind=kind), {}
    if size[2] == 24 and kind < 2:
        p.points[0][:, ::20] *= 100
    p.eps = 0.1 * p.unit()
    for tiles in ("fma", "tensor"):
        force(tiles=tiles)
        errors[tiles] = errors_on_points(gpu, p)
    for fma, tensor in zip(errors["fma"], errors["tensor"], strict=True):
        assert tensor <= 2 * fma + 3e-7


@pytest.mark.parametrize("kind", range(3))
def test_one_product_is_less_accurate(gpu, force, kind):
    """What precision="tf32" allows: 11 bits, here forced."""
    p = problem(DOUBLE, 65, 131, 100, batch=1, kind=kind, eps=0.1)
    pair, errors = replace(p.to(SINGLE), pairs=(0, 1)), {}
    for tiles in ("tensor", "high"):
        force(tiles=tiles)
        errors[tiles] = max(errors_on_points(gpu, p)[1], errors_of_sums(gpu, pair))
    assert errors["tensor"] < 3e-6
    assert 3e-5 < errors["high"] < 5e-3


@pytest.mark.parametrize(
    ("size", "scale", "shared"),
    [((40, 70, 24), 1e-15, 227), ((40, 70, 24), 1e15, 227), ((70, 90, 300), 1, 227),
     ((70, 90, 300), 1, 64)],
)  # fmt: skip
def test_tensor_cores_at_any_scale_and_with_many_coordinates(emulator, size, scale, shared):
    """Chunks of coordinates, with the rows' points resident and not."""
    emulator.device = {"shared": shared * 1024}
    p = problem(DOUBLE, *size, batch=1)
    p.points = [scale * x for x in p.points]
    p.eps = (0.1 if scale != 1 else 0.05) * float(p.matrices()[0].mean())
    of_loss, of_potential = errors_on_points(emulator, p)
    assert of_loss < 1e-6
    assert of_potential < 3e-6


def test_coordinates_in_chunks(emulator):
    """More coordinates than a stage of shared memory holds."""
    emulator.device, emulator.dense = {"shared": 48 * 1024}, False
    assert_solved(emulator, problem(SINGLE, 150, 140, 130, batch=1, eps=0.1, pairs=(0, 1)), 1e-5)


# ------------------------------------------------------------------- the start between Gaussians


@some("dense, d, same_spread, penalty",
      [True, False], [1, 2, 3], [False, True], [HARD, (5.0, 8.0), (math.inf, 3.0)])  # fmt: skip
def test_starts_as_the_cpu(long_memory, monkeypatch, dense, d, same_spread, penalty):
    """At the potential between Gaussians: near at large eps, given up or not at small eps. Clouds
    large enough for the CPU to try the start first, x in a plane if d > 2."""
    monkeypatch.setenv("OTLOSS_NEWTON", "0")
    p = problem(DOUBLE, 175, 165, d, batch=1, pairs=(0, 1))
    if d > 2:
        p.points[0][..., -1] = p.points[0][..., 0]
    if not same_spread:
        p.points[1] = 3 * p.points[1] + 4
    call, unit = {"dense": dense, "tol": 1e-2, "max_iters": 300}, float(p.matrices()[0].mean())
    for fraction in (1.0, 0.05, 1e-3):
        p = replace(p, eps=fraction * unit, rho=penalty)
        expected, found = solve(p, **call), long_memory.solve(p, **call)
        passes = float(expected.status[0, 0, 0])
        assert abs(float(found.status[0, 0, 0]) - passes) <= 1 + 0.15 * passes
        assert bool(found.status[0, 0, 2] == expected.status[0, 0, 2])
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-2, atol=1e-2 * p.eps)


def gaussian_potential(x: Tensor, y: Tensor, a: Tensor, b: Tensor, eps: float) -> Tensor:
    """The formula of gaussian_potential.h, by eigenvalues, at eps of |x - y|^2."""

    def root(S: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(S)
        return vectors @ (values.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT)

    def moments(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        w = w / w.sum()
        mean = w @ z
        return mean, (z - mean).mT @ (w.unsqueeze(-1) * (z - mean))

    (mx, A), (my, B) = moments(x, a), moments(y, b)
    e, identity = eps / 2, torch.eye(x.shape[-1], dtype=x.dtype)
    inner = root(root(A) @ B @ root(A) + e**2 / 4 * identity) + e / 2 * identity
    M = identity - root(A) @ torch.linalg.inv(inner) @ root(A)
    z = y - my
    return torch.where(b > 0, ((z @ M) * z).sum(-1) + 2 * z @ (my - mx), 0.0)


@some("dtype, d", DTYPES, [1, 2, 5, 16, 33, 64])
def test_the_start_between_gaussians(long_memory, dtype, d, rng):
    """One pass from it shows where it was: f is its softmin."""
    p = problem(DOUBLE, 41, 37, d, pairs=(0, 1))
    p.points[0] = p.points[0] @ randn(rng, d, d) / d**0.5
    p = replace(p.to(dtype), eps=0.3 * float(p.matrices()[0].mean()))
    for x, w in zip(p.points, p.weights, strict=True):
        x[w == 0] = math.nan
    found = long_memory.solve(p, max_iters=1)
    assert bool((found.status[..., 0] == 1).all())
    (C,), (a, b), (x, y) = p.matrices(), (w.double() for w in p.weights), p.clean()
    digits = 1e-5 if dtype == SINGLE else 1e-9
    for k in range(2):
        g, counted = gaussian_potential(x[k], y[k], a[k], b[k], p.eps), a[k] > 0
        expected, got = reference.softmin(p.eps, C[k], g, b[k])[counted], found.f[0][k][counted]
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=digits * float(C.mean()))


def test_the_start_is_left_out(emulator, long_memory):
    """Where it takes longer than it saves, and where its matrices do not fit."""
    p, counts = problem(SINGLE, 60, 50, 64, batch=1, pairs=(0, 1)), []
    for solver, kilobytes in ((long_memory, 163), (long_memory, 99), (emulator, 163)):
        solver.device = {"shared": kilobytes * 1024}
        counts.append(launches(solver, lambda solver=solver: solver.solve(p)))
    assert counts == [counts[1] + 3, counts[1], counts[1]]
