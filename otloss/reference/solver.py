"""The method of docs/solver.md in plain torch, one problem at a time, for any engine.

The solver decides which potentials to try next and sees costs only through an ``Engine``: a stored
matrix (``DenseEngine``), or rows spread over processes (``otloss/distributed``). The rules are
those of csrc/core/step_control.h; Newton's step is left out. The kernels take the same sweeps with
``OTLOSS_NEWTON=0``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from otloss.reference.engine import Clouds, DenseEngine, Engine
from otloss.reference.far_mass import FarMass, Found
from otloss.reference.lbfgs import MEMORY, InnerProduct, StepLength, two_loop_recursion
from otloss.reference.marginals import (
    BALANCED,
    Marginals,
    damping,
    mean_and_magnitude,
    target_marginal,
)
from otloss.reference.semidual import (
    NO_MASS,
    Point,
    column_ratio,
    evaluate,
    is_near,
    least_change,
    marginal_error,
    residual,
)
from otloss.reference.stopping import StopRule, rounding, rounding_share

# Stages: none from this eps on, over sigma; else from FIRST_STAGE * sigma by about STAGE_RATIO,
# each but the last to STAGE_TOL.
EASY_EPS, FIRST_STAGE, STAGE_RATIO, STAGE_TOL = 0.077, 0.1, 0.25, 0.01
# Iterations that began without stages, near the solution as it seemed, go through them if they are
# not near after so many sweeps.
STAY_NEAR = 20
# The line search: steps along one direction, the factor from one to the next, and the part of the
# predicted gain that a step must bring.
TRIES, SHRINK, SUFFICIENT_GAIN = 5, 0.3, 1e-4
# The start in closed form is tried first where it takes less time than CHEAP_SWEEPS, and second
# where it takes less than WORTH_SWEEPS.
CHEAP_SWEEPS, WORTH_SWEEPS = 1, 10


class Solution(NamedTuple):
    f: Tensor  # (n,)
    g: Tensor  # (m,)
    error: float  # the marginal error
    iterations: int  # sweeps
    converged: bool


# ------------------------------------------------------------------- a fixed number of iterations


def plain_iteration(engine: Engine, eps: float, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An update of f, then of g, and the marginal error before the latter."""
    rho = engine.marginals.y
    f, mean_f, t = engine.iterate(eps, g)
    mean_g = mean_and_magnitude(g.detach(), engine.b, rho)
    error = marginal_error(target_marginal(g, engine.b, rho), column_ratio(g, t, eps, rho))
    off = rounding(mean_f.magnitude + mean_g.magnitude, eps, g.dtype)
    return f, damping(rho, eps) * t, error + rounding_share(engine.a, engine.b) * off


def fixed_iterations(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    eps: float,
    n_iters: int,
    marginals: Marginals = BALANCED,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """``n_iters`` updates of f, then g, from g: f, g, the error, and [f g] of each iteration.

    Differentiable by autograd to any order, at the memory of every iteration.
    """
    engine, steps = DenseEngine(C, a, b, marginals), []
    f, error = torch.zeros_like(a), torch.full_like(a[..., 0], math.nan)
    for _ in range(n_iters):
        f, g, error = plain_iteration(engine, eps, g)
        steps.append(torch.cat([f, g], dim=-1))
    return f, g, error, steps


# ----------------------------------------------------------------------------- until it converges


def solve_batch(
    C: Tensor,
    a: Tensor,
    b: Tensor,
    marginals: Marginals,
    symmetric: bool,
    eps: float,
    tol: float,
    max_iters: int,
    init: Sequence[Tensor] = (),
    clouds: Clouds | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``solve_each`` of problems C (B, n, m)."""
    engines = (
        DenseEngine(C[k], a[k], b[k], marginals, clouds and clouds.item(k)) for k in range(len(C))
    )
    return solve_each(engines, symmetric, eps, tol, max_iters, init)


def solve_each(
    engines: Iterable[Engine],
    symmetric: bool,
    eps: float,
    tol: float,
    max_iters: int,
    init: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """f, g, the errors, the sweeps and whether they converged, of problems each on its own.

    ``init``: f and g (B, n) to start from, or nothing. NaN where costs are not finite.
    """
    solutions = []
    for k, engine in enumerate(engines):
        start = [v[k] for v in init]
        if all(map(math.isfinite, engine.cost_range)):
            solutions.append(solve_problem(engine, symmetric, eps, tol, max_iters, start))
        else:
            f, g = (torch.full_like(w, math.nan) for w in (engine.a, engine.b))
            solutions.append(Solution(f, g, math.nan, 0, False))
    f, g = torch.stack([s.f for s in solutions]), torch.stack([s.g for s in solutions])
    error, sweeps, converged = f.new_tensor([s[2:] for s in solutions], dtype=torch.float64).T
    return f, g, error, sweeps, converged


def solve_problem(
    engine: Engine,
    symmetric: bool,
    eps: float,
    tol: float,
    max_iters: int,
    init: Sequence[Tensor] = (),
) -> Solution:
    """Until a ``StopRule`` ends it; ``symmetric``: of a cloud against itself."""
    if symmetric:
        return solve_symmetric(engine, eps, tol, max_iters, init[0] if init else None)
    return solve_pair(engine, eps, tol, max_iters, init[1] if init else None)


# ------------------------------------------------------------------------- a cloud against itself


def solve_symmetric(
    engine: Engine, eps: float, tol: float, max_iters: int, f: Tensor | None = None
) -> Solution:
    """One potential, f = damping T(f), by relaxed iterations that contract whatever eps."""
    a, rho, iterations = engine.b, engine.marginals.y, 0
    factor = damping(rho, eps)
    if f is None:
        f = engine.update_rows(eps, torch.zeros_like(a))
        mean = float((a.double() * f.double()).sum()) / engine.mass[1]
        f = torch.where(a > 0, factor * (f - factor / (1 + factor) * mean), 0.0)
        iterations = 1
    stop = StopRule(tol, float(rounding_share(a, a)))
    while True:
        t = engine.update_rows(eps, f)
        iterations += 1
        error = float(marginal_error(target_marginal(f, a, rho), column_ratio(f, t, eps, rho)))
        size = float(mean_and_magnitude(f, a, rho).magnitude)
        stop.see(error, rounding(2 * size, eps, f.dtype), iterations)
        step = factor * t - f
        if stop.ends or iterations >= max_iters:
            f = f + step / (1 + factor)
            return Solution(f, f, stop.error, iterations, stop.reached)
        f = f + 2 / (2 + factor) * step


# ---------------------------------------------------------------------------------- general pairs


def solve_pair(
    engine: Engine, eps: float, tol: float, max_iters: int, g: Tensor | None = None
) -> Solution:
    """L-BFGS ascent of the semidual from g, by way of larger eps where a start is far away."""
    point, iterations = _begin(engine, eps, max_iters, g)
    before = stages_of_eps(eps, engine.sigma())
    stages, later = ([], before) if is_near(eps, point) else (before, [])
    at, share = eps, float(rounding_share(engine.a, engine.b))
    while True:
        last, stage_eps = not stages, stages.pop(0) if stages else eps
        limit = max_iters if last else max_iters - 1
        if not last and iterations + 1 >= limit:
            continue
        if stage_eps != at:
            point, iterations, at = evaluate(engine, stage_eps, point.g), iterations + 1, stage_eps
        far = FarMass(engine, eps, tol) if last else None
        stop = StopRule(tol if last else max(STAGE_TOL, tol), share)
        point, iterations, doubtful, strays = _ascend(
            engine, stage_eps, stop, far, limit, point, iterations, bool(later)
        )
        if last and not strays:
            reached = stop.reached and not doubtful
            return Solution(point.f, point.next_g, stop.error, iterations, reached)
        if strays:
            stages, later = later, []
        point = point._replace(g=point.next_g)


def stages_of_eps(eps: float, sigma: float) -> list[float]:
    """The larger values to go through before eps, from large to small; none where that is easy."""
    if not eps < EASY_EPS * sigma:
        return []
    first = FIRST_STAGE * sigma
    count = max(1, int(math.log(eps / first, STAGE_RATIO) + 0.5))
    return [first * (eps / first) ** (stage / count) for stage in range(count)]


def _begin(engine: Engine, eps: float, max_iters: int, g: Tensor | None) -> tuple[Point, int]:
    """Where to begin, evaluated, and the sweeps that took: the given g; or 0 and a proposal, the
    cheaper one first, the other one only if that is far away. The higher value is kept."""
    if g is not None:
        return evaluate(engine, eps, g), 1
    zero = torch.zeros_like(engine.b)
    cheap = engine.propose(CHEAP_SWEEPS, eps)
    point = evaluate(engine, eps, zero if cheap is None else cheap)
    if max_iters <= 2 or is_near(eps, point):
        return point, 1
    other = zero if cheap is not None else engine.propose(WORTH_SWEEPS, eps)
    if other is None:
        return point, 1
    second = evaluate(engine, eps, other)
    return (second if second.value > point.value else point), 2


def _ascend(
    engine: Engine,
    eps: float,
    stop: StopRule,
    far: FarMass | None,
    max_iters: int,
    point: Point,
    iterations: int,
    may_stray: bool,
) -> tuple[Point, int, bool, bool]:
    """Raises the semidual at one eps until ``stop`` ends it, and ``far`` does not doubt that.

    The point, all sweeps, whether ``far`` doubts it, and whether it is not near after all.
    """
    memory: list[tuple[Tensor, Tensor]] = []  # steps and changes of the residual
    length, r, kept = StepLength(), residual(engine, point), point
    begun = iterations - 1
    while True:
        stop.see(point.error, point.noise / (4 * engine.mass[1] * eps), iterations)
        kept = point if stop.keep else kept
        found = Found()
        if far:
            found = far.look(point, stop, iterations - begun, max_iters - iterations)
        iterations += found.readings
        if found.shifted:
            point, memory, length = found.shifted, [], StepLength()
            r = residual(engine, point)
            stop.restart()
            continue
        ends = stop.stuck or (stop.ends and not found.doubtful)
        if ends or iterations >= max_iters:
            return (kept if stop.returns_kept else point), iterations, found.doubtful, False
        if may_stray and STAY_NEAR <= iterations < max_iters - 2 and not is_near(eps, point):
            return point, iterations, found.doubtful, True
        inner = InnerProduct(point.target)
        p = torch.where(
            point.target > NO_MASS * engine.mass[1], two_loop_recursion(r, memory, inner), r
        )
        excess = 1 - point.ratio
        if not inner(excess, p) > 0:
            memory.clear()
            p = r
        first, left = length.first(inner(p, p)), max_iters - iterations
        trial, sweeps = _line_search(engine, eps, point, p, first, inner(excess, p), left)
        if trial is None:  # a plain iteration always ascends
            memory.clear()
            length.plain(inner(r, r))
            trial, sweeps = evaluate(engine, eps, point.next_g), sweeps + 1
            after = residual(engine, trial)
        else:
            after = residual(engine, trial)
            step, change = torch.where(engine.b > 0, trial.g - point.g, 0.0), r - after
            changed = inner(change, change)
            least = least_change(engine, eps, point)
            length.accepted(inner(step, step), changed, inner(r, r), least)
            if changed > least and inner.curved(step, change):
                memory = [*memory[1 - MEMORY :], (step, change)]
        iterations += sweeps
        point, r = trial, after
        if not math.isinf(engine.marginals.y):  # the inner product has changed
            memory = [pair for pair in memory if InnerProduct(point.target).curved(*pair)]


def _line_search(
    engine: Engine, eps: float, point: Point, p: Tensor, t: float, slope: float, left: int
) -> tuple[Point | None, int]:
    """The first of the shrinking steps along p that raises the value enough, and the sweeps made.

    Of the sweeps that are left the last is kept for a plain iteration.
    """
    for tries in range(1, min(TRIES, left - 1) + 1):
        trial = evaluate(engine, eps, point.g + t * p)
        if trial.value >= point.value + SUFFICIENT_GAIN * t * slope - point.noise:
            return trial, tries
        t *= SHRINK
    return None, max(0, min(TRIES, left - 1))
