"""The operations in every regime: costs stored or made on the way, on the CPU and, where a GPU
chooses between ways to launch, in each of them. And what only a GPU has: orders of threads, few
multiprocessors, tensor cores, launch layouts. GPUs are emulated (backends.py), a real one is
compared too if there is one.

Losses, gradients and results run on it among the other backends: `pytest -k emulated`.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from backends import HAS_COMPILER, HAS_GPU, ROOT, emulated, serving
from helpers import DTYPES, STRENGTHS, covering, name, rand, randn, rho, scaled, solved
from test_far_mass import two_clusters
from torch import Tensor
from torch.testing import assert_close

import otloss
from otloss import ops, reference
from otloss.costs import NAMED
from otloss.reference.arguments import as_pairs
from otloss.reference.marginals import marginals_of, plan, softmin, value

SINGLE, DOUBLE = DTYPES
DIVERGENCE = (0, 1, 0, 0, 1, 1)
COEFFICIENTS = [1.0, -0.4, 0.7, *[0.25] * 20]  # no sum of two pairs hides an error
HARD = (math.inf, math.inf)  # rho_x, rho_y
SOFT = [HARD, (0.7, 0.3), (math.inf, 0.5), (0.02, math.inf)]
STORED = ["block", "cluster", "dense"]  # where a GPU keeps the cost matrix
# Rows of a streamed sweep that several blocks share, in several parts.
SHARED = ["parts 1", "parts 2", "parts 4", "parts 3"]
LAUNCHED = [*STORED, "streamed", *SHARED]
REGIMES = ["cpu dense", "cpu streamed", *LAUNCHED]
MODES = ["envelope", "unrolled", "implicit"]
SHAPES = [(1, 1), (1, 9), (9, 1), (3, 70), (70, 3), (64, 64), (17, 600), (130, 129), (700, 3)]
SHAPES += [(1, 300), (5, 700), (17, 1100)]


def moved(value: Any, where: str | torch.dtype) -> Any:
    """Every tensor in a structure."""
    if isinstance(value, Tensor):
        return value.to(where)
    if isinstance(value, (list, tuple)):
        parts = [moved(v, where) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value):
        return replace(value, **{k: moved(v, where) for k, v in vars(value).items()})
    return value


@dataclass
class Machine:
    dense: bool = True
    place: str = "cpu"  # of tensors
    emulation: ModuleType | None = None
    gpu: dict[str, int] = field(default_factory=dict)  # what is emulated

    def is_cpu(self) -> bool:
        return self.place == "cpu" and self.emulation is None

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """There, with tensors of the CPU in and out."""
        if self.emulation is not None:
            with serving(self.emulation, **self.gpu):
                return function(*arguments)
        return moved(function(*moved(arguments, self.place)), "cpu")

    def solve(self, p: Problem, init: Any = (), **options: Any) -> Solved:
        options = {"dense": self.dense, **options}
        return self.call(lambda p, init: solve(p, init=init, **options), p, init)

    def gradient(self, mode: str, p: Problem, s: Seeds, **options: Any) -> Any:
        options = {"dense": self.dense, **options}
        return self.call(lambda p, s: gradient(mode, p, s, **options), p, s)

    def launches(self, call: Callable[[], Any]) -> int:
        before = self.emulation.launches()
        call()
        return self.emulation.launches() - before


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets OTLOSS_CUDA_REGIME, _TILES, _PARTS by their last word."""

    def force(**values: object) -> None:
        for word, setting in values.items():
            monkeypatch.setenv(f"OTLOSS_CUDA_{word.upper()}", str(setting))

    return force


@pytest.fixture
def regime(request: pytest.FixtureRequest, force: Callable[..., None]) -> str:
    words = request.param.split()
    if words[0] != "cpu":
        values = dict(zip(words[::2], words[1::2], strict=True)) if words[1:] else {}
        force(**values or {"regime": words[0]})
    return str(request.param)


def emulating(dense: bool = True, **macros: str) -> Machine:
    if not HAS_COMPILER:
        pytest.skip("needs g++")
    return Machine(dense, emulation=emulated(**macros))


@pytest.fixture
def emulator(request: pytest.FixtureRequest) -> Machine:
    """Where the device itself is set, or launches are counted."""
    named = "regime" in request.fixturenames
    return emulating(not named or request.getfixturevalue("regime") in STORED)


@pytest.fixture(params=["emulated", "cuda"] if HAS_GPU else None)
def machine(request: pytest.FixtureRequest) -> Machine:
    regime = request.getfixturevalue("regime") if "regime" in request.fixturenames else "block"
    dense, real = regime.split()[-1] in STORED, getattr(request, "param", "emulated") == "cuda"
    if not real:
        return Machine(dense) if regime.startswith("cpu") else emulating(dense)
    if regime.startswith("cpu"):
        pytest.skip("is for the CPU")
    if regime == "cluster" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("thread-block clusters need compute capability 9.0")
    return Machine(dense, "cuda")


@pytest.fixture
def long_memory() -> Machine:
    """As many L-BFGS pairs as the CPU, and a start between Gaussians whatever it takes."""
    return emulating(OTLOSS_LBFGS_PAIRS="8", OTLOSS_START_PASSES="1e9")


slow = pytest.mark.slow


def some(names: str, *values: Any, size: int = 2) -> Any:
    """parametrize: cases in which all combinations of `size` factors occur, slow but on a CPU."""
    fixtures = ["regime"] if names.startswith("regime") else []
    cases = [
        pytest.param(*case, marks=() if str(case[0]).startswith("cpu") else slow)
        for case in covering(size, *values)
    ]
    return pytest.mark.parametrize(names, cases, indirect=fixtures, ids=name)


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
        return as_pairs(list(self.pairs))


def problem(
    dtype: torch.dtype, n: int = 40, m: int = 33, d: int = 3, *, batch: int = 2, eps: float = 1.0,
    kind: int = 0, far: float = 0.0, wide: bool = False, **rest: Any,
) -> Problem:  # fmt: skip
    """Two clouds with uneven weights, one of them 0 in each; eps and rho in units of the mean
    cost, totals that differ where nothing ties them."""
    rng = torch.Generator().manual_seed(n * m + d)
    points = [far + randn(rng, batch, n, d), far + 0.5 + randn(rng, batch, m, d)]
    weights = [rand(rng, batch, size) for size in (n, m)]
    weights = [10 ** (-8 * w) if wide else w + 0.1 for w in weights]
    for w in weights:
        w[:, w.shape[1] // 3] *= w.shape[1] <= 2
        w /= w.sum(-1, keepdim=True)
    p = moved(Problem(points, weights, kind, **rest), dtype)
    if p.rho != HARD:
        p.weights[1] *= 2.5
    unit = p.unit()
    return replace(p, eps=eps * unit, rho=(p.rho[0] * unit, p.rho[1] * unit))


class Solved(NamedTuple):
    loss: Tensor
    status: Tensor
    f: list[Tensor]
    g: list[Tensor]
    traces: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.loss, self.status, *self.f, *self.g]

    def converged(self) -> bool:
        return bool((self.status[..., ops.CONVERGED] == 1).all())

    def passes(self) -> Tensor:
        return self.status[..., ops.ITERATIONS]


def solve(p: Problem, *, dense: bool = True, init: Any = (), **options: Any) -> Solved:
    trace = options.get("n_iters", -1) > 0
    return Solved(*solved(p.arguments(), list(init), dense=dense, trace=trace, **options)[:5])


def exactly(p: Problem, **options: Any) -> Solved:
    """By the CPU kernels in float64, far below the tolerances here."""
    p = replace(moved(p, DOUBLE), costs=p.matrices())
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


def assert_solved(machine: Machine, p: Problem, tol: float) -> None:
    """To tol=1e-5, the loss and the potentials relative to the costs."""
    found, true, unit = machine.solve(p, tol=1e-5), exactly(p), p.unit()
    assert found.converged()
    assert float(found.status[..., ops.ERROR].max()) <= 1e-5
    atol = tol * min(1.0, unit) if machine.dense else tol * unit
    assert_close(found.loss.double(), true.loss, rtol=tol, atol=atol)
    assert of_potentials(found, true, p) < (3e-4 if machine.dense else 1e-3) * unit
    for k, (i, j) in enumerate(p.sides()):
        assert not bool(found.f[k][p.weights[i] == 0].any() or found.g[k][p.weights[j] == 0].any())
        counted = (p.weights[i] > 0)[:, :, None] & (p.weights[j] > 0)[:, None]
        largest = torch.where(counted, p.matrices()[k], 0.0).amax((1, 2))
        told = found.status[k, :, ops.MAX_COST]
        assert bool((told >= largest * (1 - 1e-5) - 1e-6).all())
        if machine.dense:  # else it is only bounded, by the norms
            assert_close(told, largest, rtol=1e-4, atol=1e-5)


def assert_near(got: Sequence[Tensor], expected: Sequence[Tensor], tol: float) -> None:
    """Relative to the largest entry of all."""
    scale = max([1e-30, *(float(t.abs().max()) for t in expected)])
    close = {"rtol": 0, "atol": tol, "check_dtype": False}
    assert_close([t / scale for t in got], [t / scale for t in expected], **close)


def assert_bitwise_equal(results: list[list[Tensor]]) -> None:
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# ---------------------------------------------------------------------------------------- solve


@some("regime, dtype, kind, d, eps, penalty",
      LAUNCHED, DTYPES, range(3), [1, 3, 17, 70], [1.0, 0.1, 0.02], SOFT)  # fmt: skip
def test_solves_a_divergence(machine, regime, dtype, kind, d, eps, penalty):
    """Far from the origin, with coincident points."""
    p = problem(dtype, d=d, kind=kind, eps=eps, far=10.0 * (kind < 2), rho=penalty)
    p.points[1][:, 4] = p.points[0][:, 5]
    assert_solved(machine, p, 1e-5 if machine.dense else 2e-5)


@some("regime, shape, dtype, d", LAUNCHED, SHAPES, DTYPES, [2, 50])
def test_shapes(machine, regime, shape, dtype, d, force):
    if regime in ("block", "cluster") and max(shape) > 600:
        force(regime="dense")
    assert_solved(machine, problem(dtype, *shape, d, batch=1, kind=1, pairs=(0, 1), eps=0.5), 2e-5)


@some("dtype, penalty", DTYPES, [HARD, (2.0, 0.5)])
def test_more_columns_than_registers_hold(machine, dtype, penalty):
    assert_solved(
        machine, problem(dtype, 3, 4200, batch=1, pairs=(0, 1), rho=penalty, eps=0.3), 2e-5
    )


def assert_iterations(p: Problem, found: Solved, tolerance: float) -> None:
    """Those of the reference."""
    for k, (i, j) in enumerate(p.sides()):
        a, b = p.weights[i].double(), p.weights[j].double()
        marginals, count = marginals_of(*p.rho, i, j), found.traces[k].shape[1]
        *_, error, steps = reference.fixed_iterations(
            p.matrices()[k], a, b, torch.zeros_like(b), p.eps, count, marginals
        )
        if p.rho != HARD:
            told = found.status[k, :, ops.ERROR]
            assert_close(told, error, rtol=300 * tolerance, atol=tolerance)
        expected, last = torch.stack(steps, dim=1), torch.cat([found.f[k], found.g[k]], -1)
        assert_near([found.traces[k], last], [expected, expected[:, -1]], tolerance)
        assert bool((found.passes()[k] == count).all())


@some("regime, dtype, kind, d, eps, penalty",
      REGIMES, DTYPES, range(3), [5, 40], [1.0, 1e-3], SOFT)  # fmt: skip
def test_fixed_iterations(machine, regime, dtype, kind, d, eps, penalty):
    """From a cold start at small eps most sums underflow and are made again, columns included; all
    blocks must agree on that."""
    p = problem(dtype, 70, 131, d=d, kind=kind, eps=eps, rho=penalty, wide=eps < 1)
    exact = 1e-10 if machine.dense else 1e-9
    assert_iterations(p, machine.solve(p, n_iters=3), 1e-4 if dtype == SINGLE else exact)


@some("regime, dtype, penalty", STORED, DTYPES, [(1e-2, 1e-3), (math.inf, 1e-2)])
def test_soft_factors_that_overflow(machine, regime, dtype, penalty, rng):
    """exp(-f / rho) is beyond any number where C is far below 0: all columns take the guard."""
    costs = [3 * randn(rng, 1, 14, 11, dtype=dtype)]
    weights = [torch.full((1, n), 1 / n, dtype=dtype) for n in (14, 11)]
    p = Problem([], weights, pairs=(0, 1), eps=0.05, rho=penalty, costs=costs)
    assert_iterations(p, machine.solve(p, n_iters=2), 1e-4)


@some("regime, d", LAUNCHED, [3, 30])
def test_small_eps_from_a_cold_start(machine, regime, d):
    """Row and column sums overflow and vanish: the guarded sums take over, stages help."""
    p = problem(SINGLE, 50, 45, d, batch=1, kind=1)
    p = replace(p, points=[100 * x for x in p.points], eps=2.0)
    found = machine.solve(p, max_iters=3000)
    assert found.converged()
    assert_close(found.loss.double(), exactly(p).loss, rtol=1e-3, atol=1e-2)


@some("regime, kind, objective, penalty", REGIMES, range(3), [0, 1], SOFT)
def test_the_loss_is_that_of_the_potentials(machine, regime, kind, objective, penalty):
    p, values = problem(DOUBLE, kind=kind, eps=0.1, objective=objective, rho=penalty), []
    found = machine.solve(p, tol=1e-6)
    for k, (i, j) in enumerate(p.sides()):
        call = p.matrices()[k], found.f[k], found.g[k], p.weights[i], p.weights[j], objective
        values.append(COEFFICIENTS[k] * value(p.eps, *call, marginals_of(*p.rho, i, j)))
    assert_close(found.loss, sum(values), rtol=1e-9, atol=1e-9)


@some("regime", REGIMES)
def test_what_is_not_finite(machine, regime):
    p = problem(SINGLE, pairs=(0, 1))
    p.points[0][1, 4, 1] = math.nan
    found, (trace,) = machine.solve(p), machine.solve(p, n_iters=2).traces
    assert found.loss.isfinite().tolist() == [True, False]
    assert found.status[0, :, ops.CONVERGED].tolist() == [1, 0]
    assert bool(found.f[0][1].isnan().all() and found.status[0, 1, ops.MAX_COST].isnan())
    assert bool(trace[0].isfinite().all() and trace[1].isnan().all())


@some("regime, penalty", LAUNCHED, SOFT[:3])
def test_a_warm_start_needs_few_iterations(machine, regime, penalty):
    p = problem(DOUBLE, eps=0.1, rho=penalty)
    cold = machine.solve(p, tol=1e-6)
    init = [v for pair in zip(cold.f, cold.g, strict=True) for v in pair]
    assert float(machine.solve(p, tol=1e-5, init=init).passes().max()) <= 2
    assert float(cold.passes().min()) > 2


@some("regime", LAUNCHED)
def test_max_iters_is_kept(machine, regime):
    found = machine.solve(problem(SINGLE, eps=0.002, pairs=(0, 1)), tol=1e-7, max_iters=13)
    assert bool((found.passes() <= 13).all() and not found.status[..., ops.CONVERGED].any())


@some("regime, dtype, strength", LAUNCHED, DTYPES, [*STRENGTHS, 1e-3, 10.0, 1e3])
def test_soft_marginals(machine, regime, dtype, strength):
    tol = 1e-8 if dtype == DOUBLE else 3e-5
    if dtype == SINGLE and strength == 1e3:
        tol = 1e-2  # potentials of some 1000 cannot resolve more of eps
    p = problem(dtype, 23, 19, eps=0.05, rho=rho(strength))
    found, true = machine.solve(p, tol=tol), exactly(p, tol=1e-10)
    assert found.converged()
    assert float(found.status[..., ops.ERROR].max()) <= tol
    assert_near([found.loss], [true.loss], tol)
    close = {"rtol": 1e-4 if dtype == SINGLE else 1e-10, "atol": 100 * tol}
    assert_close([*found.f, *found.g], [*true.f, *true.g], check_dtype=False, **close)


HARD_PROBLEMS = ["near", "far clusters", "outliers", "wide weights"]


def hard_problem(kind: str, rng: torch.Generator) -> Problem:
    """That trips a solver."""
    n, m = 30, 26
    x, y = randn(rng, 1, n, 3), 0.7 * randn(rng, 1, m, 3) + 0.5
    weights = [10 ** (-6 * (kind == "wide weights") * rand(rng, 1, size)) for size in (n, m)]
    if kind == "far clusters":  # the semidual is flat until they exchange mass
        x[:, : n // 2] += 20
        y[:, : m // 3] += 20
    y[:, :2] *= 20 if kind == "outliers" else 1
    eps = 0.2 if kind in ("far clusters", "outliers") else 0.03
    weights = [w / w.sum(-1, keepdim=True) for w in weights]
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
    passes = float(expected.passes())
    assert expected.converged()
    for solver, few, share in ((long_memory, 2, 0.15), (emulator, 4, 0.5)):
        found = solver.solve(p, max_iters=2000)
        assert found.converged()
        assert abs(float(found.passes()) - passes) <= few + share * passes
        assert_close(found.loss, expected.loss, rtol=1e-2, atol=1e-3 * unit)


@some("regime, kind", STORED, HARD_PROBLEMS)
def test_hard_problems_in_float32(machine, regime, kind, rng):
    p = hard_problem(kind, rng)
    found, true = machine.solve(moved(p, SINGLE), tol=1e-2, max_iters=2000), exactly(p, tol=1e-6)
    assert found.converged()
    assert_close(found.loss.double(), true.loss, rtol=3e-2, atol=1e-2 * p.eps)


@some("regime, gap", LAUNCHED, [1e-3, 3e-3])
def test_small_mass_that_goes_far(machine, regime, gap):
    """No more than the tolerance in the marginal error, but most of the value. Whether rounding of
    such costs leaves a proof is another matter."""
    c = two_clusters(gap)
    clouds = [[c.x[None], c.y[None]], [c.a[None], c.b[None]]]
    p = Problem(*moved(clouds, SINGLE), pairs=(0, 1), eps=1.0)
    found = machine.solve(p, tol=1e-3, max_iters=60)
    value = {1e-3: 5.69803, 3e-3: 15.6276}[gap]
    assert float(found.passes()) < 30
    assert float(found.loss) == pytest.approx(value, rel=1e-3)


@some("regime, dtype", LAUNCHED, DTYPES)
def test_a_doubted_solve_is_proven(machine, regime, dtype, rng):
    """A pair of points far from all others makes large costs, but no mass has to go there: as on
    the CPU the duality gap shows it."""
    x, y = randn(rng, 1, 80, 2), randn(rng, 1, 70, 2)
    x[:, -1], y[:, -1] = 300, 300
    a, b = (torch.full((1, n), 0.99 / (n - 1)).double() for n in (80, 70))
    a[:, -1], b[:, -1] = 0.01, 0.01
    p = Problem(*moved([[x, y], [a, b]], dtype), pairs=(0, 1), eps=0.5)
    found, expected = machine.solve(p, tol=1e-2), solve(p, tol=1e-2)
    assert found.converged()
    assert expected.converged()
    assert float(found.passes()) <= float(expected.passes()) + 5
    assert_close(found.loss.double(), exactly(p).loss, rtol=2e-2, atol=0)


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


def gradient(
    mode: str, p: Problem, s: Seeds, *, dense: bool, wanted: Any = (0, 1), module: Any = ops
) -> Any:
    """Of points (or costs) and weights, then the status of the linear systems (implicit)."""
    held, problem, wanted = mode == "envelope", p.arguments(), list(wanted)
    clouds = (p.points, p.weights, list(p.pairs), p.kind)
    if p.costs is None and (dense or (held and p.objective == 1)):
        problem = problem._replace(costs=module.cost(*clouds), points=[])
    costs = list(range(len(problem.costs))) if wanted else []
    want = (costs, [] if problem.costs else wanted, True)
    head = (s.loss,) if held else (s.loss, s.f, s.g)
    call = getattr(module, f"{mode}_backward")
    of_costs, of_points, *rest = call(*head, *problem, *s.solution, *want)
    if p.costs is None and problem.costs:
        given = of_costs, problem.costs
        of_points = module.cost_backward(*given, *clouds, wanted) if wanted else []
    return of_points if p.costs is None else of_costs, *rest


def assert_gradients(
    machine: Machine, mode: str, p: Problem, s: Seeds, looser: float = 1.0, **options: Any
) -> None:
    """A GPU's with those of the CPU, these with the reference in float64: relative to the largest
    of the points and of the weights."""
    found = machine.gradient(mode, p, s, **options)
    options = {"dense": machine.dense, **options}
    single, tolerance = p.weights[0].dtype == SINGLE, looser * 1e-10
    if machine.is_cpu():
        exact = [moved(value, DOUBLE) for value in (p, s)]
        expected = gradient(mode, *exact, module=reference, **options)
        if mode == "implicit":
            tolerance = 1e-8  # a residual of 1e-13 times the system's condition
    else:
        expected = gradient(mode, p, s, **options)
        if mode == "implicit":
            assert bool(((found[3][..., 0] - expected[3][..., 0]).abs() <= 2).all())
    tolerance = 2e-5 * looser if single else tolerance
    assert_near(found[0], expected[0], tolerance)
    assert_near([*found[1], *found[2]], [*expected[1], *expected[2]], tolerance)
    if mode == "implicit":
        assert float(found[3][..., 1].max()) < (1e-8 if single else 1e-13)


KINDS = [(0, 1), (0, 3), (1, 3), (2, 3), (0, 20), (1, 20), (2, 40)]  # of cost, with d


@some("regime, mode, objective, penalty, cost, dtype",
      REGIMES, MODES, [0, 1], SOFT, KINDS, DTYPES)  # fmt: skip
def test_gradients(machine, regime, mode, objective, penalty, cost, dtype):
    p = problem(dtype, d=cost[1], kind=cost[0], eps=0.3, objective=objective, rho=penalty)
    assert_gradients(machine, mode, p, seeds(p, mode), looser=1 if machine.dense else 10)


@some("regime, mode, objective, penalty, eps, seeded",
      REGIMES[:2], MODES, [0, 1], [HARD, (1.0, 0.1), (math.inf, 3.0)], [0.2, 0.01],
      [True, False], size=4)  # fmt: skip
def test_gradients_are_those_of_the_reference(
    machine, regime, mode, objective, penalty, eps, seeded
):
    """At small eps, of a cloud on either side, without gradients from outside."""
    pairs = (0, 1, 0, 0, 1, 0)
    p = problem(DOUBLE, 21, 34, eps=eps, rho=penalty, objective=objective, pairs=pairs)
    s = seeds(p, mode)
    assert_gradients(machine, mode, p, s if seeded else replace(s, f=[], g=[]))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_wanted_is_left_out(mode):
    p = problem(DOUBLE, eps=0.3, objective=1).stored()
    s = seeds(p, mode)
    head = (s.loss,) if mode == "envelope" else (s.loss, s.f, s.g)

    def call(*wanted: Any) -> Any:
        operation = getattr(ops, f"{mode}_backward")
        return operation(*head, *p.arguments(), *s.solution, *wanted)[:4]

    every, one, weights = call([0, 1, 2], [], True), call([1], [], False), call([], [], True)
    assert [len(grads) for grads in one] == [1, 0, 0, 0]
    assert_close(one[0][0], every[0][1])
    assert not weights[0]
    assert_close(weights[2:], every[2:])


@some("regime, mode, shape", REGIMES, MODES, SHAPES)
def test_gradients_at_every_shape(machine, regime, mode, shape, force):
    if regime == "block" and max(shape) > 600:
        force(regime="dense")
    for dtype, d in ((SINGLE, 3), (DOUBLE, 18)):
        p = problem(dtype, *shape, d, batch=1, kind=1, eps=0.3, objective=1, pairs=(0, 1))
        looser = 3 if machine.dense else 30
        assert_gradients(machine, mode, p, seeds(p, mode, n_iters=3), looser)


FAR_APART = [  # eps, rho, level of the start
    (4e-3, (1e-3, 0.3), 0.0),
    (0.01, (math.inf, 1e-4), 0.0),
    (2e-3, HARD, 0.0),
    (0.1, (0.7, math.inf), 1.0),
    (0.1, (0.7, math.inf), 400.0),
    (0.1, (0.7, math.inf), 1200.0),  # beyond 2^126, where the exponential ends
]


@some("regime, case, dtype", REGIMES, FAR_APART, DTYPES)
def test_unrolled_where_factors_overflow(machine, regime, case, dtype):
    """exp((g' - g) / eps) in a cold start or from a level far away, exp(f / rho) of points that
    are not transported: the softmaxes of an iteration are far apart, both take an exponential."""
    eps, penalty, level = case
    dtype = DOUBLE if level > 400 else dtype  # exp(f / rho) is beyond float32
    p = problem(dtype, 30, 26, eps=eps, rho=penalty)
    init = [torch.where(p.weights[c] > 0, level, 0.0).to(dtype) for c in p.pairs] if level else []
    s = seeds(p, "unrolled", n_iters=3, init=init)
    f, g = s.solution[1][0].split((30, 26), -1)
    change = ((init[1] if level else 0.0) - g[:, 0]).abs() / p.eps * (p.weights[1] > 0)
    of_rho = [v[:, 0].abs() / r for v, r in ((f, p.rho[0]), (g, p.rho[1]))]
    factors = change if level else torch.cat([*of_rho, change], -1)
    assert bool(factors.max() > 60 * math.log(2)) == (level != 1.0)  # kTrusted
    assert_gradients(machine, "unrolled", p, s, looser=20 if machine.dense else 100)


@some("regime, mode, wanted", REGIMES, MODES[1:], [(), (0,), (1,), (0, 1)])
def test_gradients_of_what_is_wanted(machine, regime, mode, wanted):
    """With and without gradients of potentials from outside."""
    p = problem(DOUBLE, kind=2, eps=0.3, objective=1)
    s = seeds(p, mode, n_iters=4)
    for given in (s, replace(s, f=[], g=[])):
        assert_gradients(machine, mode, p, given, wanted=wanted)


@some("regime, mode, content", STORED, MODES, [3.0, 1e30, math.nan])
def test_padding_of_cost_matrices(machine, regime, mode, content):
    """Changes no bit of a solution or a gradient, and receives none."""
    p, (row, column) = problem(SINGLE, eps=0.3, pairs=(0, 1)).stored(), (40 // 3, 33 // 3)
    padded = p.costs[0].clone()
    padded[:, row] = padded[:, :, column] = content
    s, both = seeds(p, mode, n_iters=4), [p, replace(p, costs=[padded])]
    results = [[t for (t,) in machine.gradient(mode, q, s)[:3]] for q in both]
    if math.isfinite(content):
        assert_bitwise_equal([machine.solve(q).tensors() for q in both])
    assert_bitwise_equal(results)
    grad_C, grad_a, grad_b = results[1]
    assert not bool(grad_C[:, row].any() or grad_C[:, :, column].any())
    assert not bool(grad_a[:, row].any() or grad_b[:, column].any())


@some("regime, mode", LAUNCHED, MODES[1:])
def test_gradients_of_what_is_not_finite(machine, regime, mode):
    p = problem(SINGLE, eps=0.3, objective=1, pairs=(0, 1))
    s = seeds(p, mode, n_iters=3)
    for tensor in (*s.solution[0], *s.solution[1]):
        tensor[1] = math.nan
    points, _, _, *status = machine.gradient(mode, p, s)
    for x, w in zip(points, p.weights, strict=True):
        assert bool(x[0].isfinite().all() and x[1][w[1] > 0].isnan().all())
    for residual in (told[0, :, 1] for told in status):
        assert bool(residual[0].isfinite() and residual[1].isnan())


@some("dtype, kind, d, same", DTYPES, range(3), [1, 3, 40], [False, True])
def test_costs_and_their_gradients(machine, dtype, kind, d, same):
    """With padding of NaN, coincident points, and under cosine a point without a direction."""
    p = problem(dtype, 35, 270, d, kind=kind, far=10.0, pairs=(0, 0) if same else (0, 1))
    p.points[1][:, 0] = p.points[0][:, 1]
    p.points[0][:, 2] *= kind != 2
    padding, counted_y = p.weights[0] == 0, p.weights[p.pairs[1]] > 0
    p.points[0][padding] = math.nan
    counted = ~padding[..., None] & counted_y[:, None]
    rest, (expected,) = (list(p.pairs), kind), p.matrices()
    W = torch.where(counted, randn(torch.Generator(), *counted.shape, dtype=dtype), 0.0)
    (C,) = machine.call(ops.cost, p.points, p.weights, *rest)
    (grad,) = machine.call(ops.cost_backward, [W], [C], p.points, p.weights, *rest, [0])
    (true,) = reference.cost_backward([W.double()], [expected], p.clean(), [], *rest, [0])
    tolerance = 2e-4 if dtype == SINGLE else 1e-10
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    C, expected = (torch.where(counted, M, 0.0) for M in (C, expected))
    assert_close(C, expected, **close)
    assert not same or float(C.diagonal(dim1=1, dim2=2)[:, 3:].abs().max()) == 0
    scale = 10 * max(1.0, float(true.abs().max()))
    true[padding] = 0
    assert_close(grad / scale, true / scale, **close)


def errors_of_sums(machine: Machine, p: Problem) -> float:
    """Of V 1 x and V y at any potentials, over the largest of both: V as in csrc/kernels.h."""
    i, j = p.pairs
    (C,), a, b = p.matrices(), p.weights[i], p.weights[j]
    rng = torch.Generator().manual_seed(a.numel() + b.numel())
    f, g = (p.eps * randn(rng, *w.shape, dtype=w.dtype) for w in (a, b))
    grad = torch.tensor([2.0, -0.5], dtype=a.dtype)[: a.shape[0]]

    def points_gradient(p: Problem, grad: Tensor, f: Tensor, g: Tensor) -> Tensor:
        problem = p.arguments()._replace(coefficients=[-0.5])
        return ops.envelope_backward(grad, *problem, [f], [g], [], [i], False)[1][0]

    found = machine.call(points_gradient, p, grad, f, g)
    P = plan(p.eps, C, f.double(), g.double(), a.double(), b.double())
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
     (1, 70, 90, 227), (70, 1, 33, 227), (70, 150, 300, 227), (70, 150, 300, 99)],
)  # fmt: skip
def test_gradient_sums_of_points(emulator, dtype, kind, size):
    """By multiply-adds, whatever makes the costs of a solve."""
    pairs = (0, 0) if size[0] == size[1] else (0, 1)
    p = problem(dtype, *size[:3], kind=kind, eps=0.3, pairs=pairs)
    emulator.gpu = {"shared": 1024 * size[3]} if len(size) > 3 else {}
    single = 2e-6 if emulator.gpu else 2e-5
    assert errors_of_sums(emulator, p) < (single if dtype == SINGLE else 1e-11)


# ---------------------------------------------------------------- order of threads, many problems


@some("regime, mode, penalty, objective, size",
      LAUNCHED, MODES, SOFT[:3], [0, 1], [(37, 150, 3), (20, 75, 40), (20, 19, 3)])  # fmt: skip
def test_order_of_threads_does_not_matter(emulator, regime, mode, penalty, objective, size):
    """Bitwise: a difference would be a race, or a sum without a fixed order. See emulation.h."""
    p = problem(SINGLE, *size, eps=0.2, rho=penalty, objective=objective)
    p, results = replace(p, pairs=p.pairs[:4]), []
    s = seeds(p, mode, n_iters=5)
    cold = replace(p, eps=0.05 * p.eps)  # sums that are made again
    for order in range(5):
        emulator.gpu = {"order": order}
        points, a, b, *status = emulator.gradient(mode, p, s)
        found = emulator.solve(cold, tol=1e-4, max_iters=6).tensors()
        results.append([*found, *points, *a, *b, *status])
    assert_bitwise_equal(results)


@slow
@pytest.mark.parametrize("d", [2, 20])
def test_order_of_threads_does_not_matter_to_the_start(long_memory, d):
    p, results = problem(SINGLE, 130, 120, d, eps=0.1), []
    for order in range(5):
        long_memory.gpu = {"order": order}
        results.append(long_memory.solve(p, dense=False, max_iters=5).tensors())
    assert_bitwise_equal(results)


OLD = {"capability": 80, "shared": 163 * 1024}
FEW = {"multiprocessors": 3}


@some("regime", LAUNCHED)
def test_many_problems_on_few_multiprocessors(emulator, regime):
    """More than run at once, several one after the other."""
    emulator.gpu = FEW if regime == "cluster" else {**FEW, **OLD}
    assert_solved(emulator, problem(SINGLE, 12, 10, batch=7, pairs=(0, 1), eps=0.3), 1e-5)


@some("regime, mode", [*STORED, "streamed"], MODES)
def test_at_the_block_size_of_a_gpu(regime, mode):
    """The other tests have blocks of half as many threads."""
    machine = emulating(regime in STORED, OTLOSS_SOLVE_THREADS="256")
    p = problem(SINGLE, 70, 300, 20, batch=1, pairs=(0, 1, 0, 0), eps=0.3)
    assert_solved(machine, p, 2e-5)
    p = replace(p, objective=int(mode != "envelope"))
    assert_gradients(machine, mode, p, seeds(p, mode, n_iters=3), looser=1 if machine.dense else 10)


@some("regime, mode", [*STORED, "streamed"], MODES)
def test_gradients_of_many_problems(emulator, regime, mode):
    """More than run at once, and more pairs than a launch takes."""
    emulator.gpu = FEW
    objective = int(mode != "envelope")
    p = problem(DOUBLE, 8, 6, 2, batch=5, pairs=(0, 1) * 10, objective=objective, eps=0.3)
    assert_gradients(emulator, mode, p, seeds(p, mode, n_iters=3))


@slow
def test_more_pairs_than_a_launch_takes(machine):
    p = problem(SINGLE, 6, 5, batch=1, pairs=(0, 1) * 11)
    found = machine.solve(p)
    assert all(torch.equal(f, found.f[0]) for f in found.f)
    assert_close(found.loss, exactly(p).loss.float(), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------ launch layouts, what is refused


@slow
@pytest.mark.parametrize(
    ("problems", "n", "d", "layout"),
    [
        (1, 60, 0, "block, 1 block per problem, cost tile in shared memory"),
        (200, 150, 0, "block, 1 block per problem, cost tile in shared memory"),
        (1, 600, 0, "cluster, 8 blocks per problem, cost tile in shared memory"),
        (
            1,
            9000,
            0,
            "dense, a launch for each sweep, costs read from global memory, "
            "a block has 32 by 1/9 of the columns",
        ),
        (
            1,
            9000,
            3,
            "streamed, a launch for each sweep, costs made on the way by multiply-adds, "
            "a block has 32 by 1/4 of the columns",
        ),
    ],
)
def test_the_launch_layout_in_words(emulator, problems, n, d, layout):
    """As OTResult.explain and show_config say it, on 132 multiprocessors."""
    emulator.emulation.configure(multiprocessors=132)
    assert emulator.emulation.describe_plan(False, problems, n, n, d).startswith(layout)


@slow
def test_old_devices_use_no_clusters(emulator, force):
    p, emulator.gpu = problem(SINGLE, 260, 250, batch=1, pairs=(0, 1)), OLD
    assert emulator.solve(p).converged()
    force(regime="cluster")
    with pytest.raises(RuntimeError, match="OTLOSS_CUDA_REGIME=cluster"):
        emulator.solve(p)


@some("regime", STORED)
def test_a_regime_that_stores_costs_is_refused_for_points(machine, regime):
    with pytest.raises(RuntimeError, match=f"OTLOSS_CUDA_REGIME={regime} stores costs"):
        machine.solve(problem(SINGLE), dense=False)


@slow
def test_what_is_forced_must_exist(machine, force):
    for forced, message in (
        ({"regime": "fast"}, "OTLOSS_CUDA_REGIME"),
        ({"tiles": "wmma", "regime": "auto"}, "TILES must be auto, .* got wmma"),
    ):
        force(**forced)
        with pytest.raises(RuntimeError, match=message):
            machine.solve(problem(SINGLE, d=20), dense="regime" in forced and "tiles" not in forced)


@slow
@pytest.mark.parametrize("loops", [0, 1])
def test_loops_of_launches_compile(tmp_path, loops):
    """With loops in graphs, and for toolkits that have none."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = tmp_path / "loops.cu"
    source.write_text(LOOPS)
    macro = f"-DOTLOSS_GRAPH_LOOPS={loops}"
    command = [nvcc, "-ptx", "-std=c++17", macro, f"-I{ROOT / 'csrc'}", str(source)]
    subprocess.run([*command, "-o", str(tmp_path / "loops.ptx")], check=True)


LOOPS = """
#include "cuda/device/loop.cuh"
using namespace otloss::cuda;
struct Kernel {
  static constexpr int kThreads = 32;
  Loop loop;
  template <class Block>
  __device__ void operator()(Block& block) const { block.count_off(loop, true); }
};
void run(const Context& context, const Loop& loop) {
  repeat(context, loop, 3, [](const Loop& turn, Queue& queue) { queue(Kernel{turn}, Grid{}); });
}
"""


@slow
def test_the_cpu_kernels_return(emulator):
    emulator.solve(problem(SINGLE, 5, 4))
    x, y = torch.rand(5, 2), torch.rand(4, 2)
    assert emulator.launches(lambda: otloss.sinkhorn_divergence(x, y, 0.5)) == 0


# ---------------------------------------------------------------------------------- tensor cores


def errors_on_points(machine: Machine, p: Problem) -> tuple[float, float]:
    """Of the loss and the potentials of a divergence in float32, over the mean cost."""
    found, true = machine.solve(moved(p, SINGLE), dense=False, tol=1e-5), exactly(p)
    assert found.converged()
    of_loss = float((found.loss.double() - true.loss).abs().max())
    unit = float(p.matrices()[0].mean())
    return of_loss / unit, of_potentials(found, true, p) / unit


@some("kind, size", range(3), [(65, 131, 17), (70, 64, 100), (129, 3, 33), (60, 50, 24)])
def test_tensor_cores_are_as_accurate_as_multiply_adds(machine, force, kind, size):
    """Outliers set the scale of the halves; the distances of all others keep their digits."""
    p, errors = problem(DOUBLE, *size, batch=1, kind=kind), {}
    if size[2] == 24 and kind < 2:
        p.points[0][:, ::20] *= 100
    p.eps = 0.1 * p.unit()
    for tiles in ("fma", "tensor"):
        force(tiles=tiles)
        errors[tiles] = errors_on_points(machine, p)
    for fma, tensor in zip(errors["fma"], errors["tensor"], strict=True):
        assert tensor <= 2 * fma + 3e-7


@some("kind", range(3))
def test_one_product_is_less_accurate(machine, force, kind):
    """What precision="tf32" allows: 11 bits, here forced."""
    p = problem(DOUBLE, 65, 131, 100, batch=1, kind=kind, eps=0.1)
    errors = {}
    for tiles in ("tensor", "high"):
        force(tiles=tiles)
        errors[tiles] = errors_on_points(machine, p)[1]
    assert errors["tensor"] < 3e-6
    assert 1e-5 < errors["high"] < 5e-3


@slow
@pytest.mark.parametrize(
    ("size", "scale", "shared"),
    [((40, 70, 24), 1e-15, 227), ((40, 70, 24), 1e15, 227), ((70, 90, 300), 1, 227),
     ((70, 90, 300), 1, 64)],
)  # fmt: skip
def test_tensor_cores_at_any_scale_and_with_many_coordinates(emulator, size, scale, shared):
    """Chunks of coordinates, with the rows' points resident and not."""
    emulator.gpu = {"shared": shared * 1024}
    p = problem(DOUBLE, *size, batch=1)
    p.points = [scale * x for x in p.points]
    p.eps = (0.1 if scale != 1 else 0.05) * float(p.matrices()[0].mean())
    of_loss, of_potential = errors_on_points(emulator, p)
    assert of_loss < 1e-6
    assert of_potential < 3e-6


@slow
def test_coordinates_in_chunks(emulator):
    """More coordinates than a stage of shared memory holds."""
    emulator.gpu, emulator.dense = {"shared": 48 * 1024}, False
    assert_solved(emulator, problem(SINGLE, 150, 140, 130, batch=1, eps=0.1, pairs=(0, 1)), 1e-5)


# ------------------------------------------------------------------- the start between Gaussians


@some("dense, d, same_spread, penalty",
      [True, False], [1, 2, 3], [False, True], [HARD, (5.0, 8.0), (math.inf, 3.0)])  # fmt: skip
def test_starts_as_the_cpu(long_memory, monkeypatch, dense, d, same_spread, penalty):
    """At the potential between Gaussians: near at large eps, given up or not at small eps. Clouds
    large enough for the CPU to try the start first, x in a plane if d > 2. In a long solve small
    mass that has to go far is looked for, which counts as sweeps."""
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
        passes = float(expected.passes())
        more = float(found.passes()) - passes
        assert abs(more) <= 1 + (0.15 if passes < 50 else 0.4) * passes
        assert found.converged() == expected.converged()
        assert_close(found.loss, expected.loss, rtol=1e-2, atol=1e-2 * p.eps)


@some("dtype, d", DTYPES, [1, 2, 5, 16, 33, 64])
def test_the_start_between_gaussians(long_memory, dtype, d, rng):
    """One pass from it shows where it was: f is its softmin."""
    p = problem(DOUBLE, 41, 37, d, pairs=(0, 1))
    p.points[0] = p.points[0] @ randn(rng, d, d) / d**0.5
    p = replace(moved(p, dtype), eps=0.3 * float(p.matrices()[0].mean()))
    for x, w in zip(p.points, p.weights, strict=True):
        x[w == 0] = math.nan
    found = long_memory.solve(p, max_iters=1)
    assert bool((found.passes() == 1).all())
    (C,), (a, b), (x, y) = p.matrices(), moved(p.weights, DOUBLE), p.clean()
    atol = (1e-5 if dtype == SINGLE else 1e-9) * float(C.mean())
    for k in range(2):
        g = NAMED[0].gaussian_potential(x[k], y[k], a[k], b[k], p.eps)
        expected, got = softmin(p.eps, C[k], g, b[k]), found.f[0][k]
        counted = a[k] > 0
        assert_close(got[counted].double(), expected[counted], rtol=0, atol=atol)


@slow
def test_the_start_is_left_out(emulator, long_memory):
    """Where it takes longer than it saves, and where its matrices do not fit."""
    p, counts = problem(SINGLE, 60, 50, 64, batch=1, pairs=(0, 1)), []
    for solver, kilobytes in ((long_memory, 163), (long_memory, 99), (emulator, 163)):
        solver.gpu = {"shared": kilobytes * 1024}
        counts.append(solver.launches(lambda solver=solver: solver.solve(p)))
    assert counts == [counts[1] + 1, counts[1], counts[1]]
