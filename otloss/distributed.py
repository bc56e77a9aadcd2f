"""The loss of a batch whose points are spread over processes: each holds some rows of each cloud.

The rows of a cost matrix are cut over the processes (ranks). A rank passes over the rows of its own
points with the kernels of every other solve, which gives their potentials f and, for each column,
its rows' contribution to the update of g. Contributions are exchanged, m numbers per rank and
iteration, and joined by a log-sum-exp. Then all ranks know the same g, and take the same decisions.

A rank stores n_local (n + m) + m_local m costs where one process stores n (n + m) + m^2.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from otloss import _check, ops
from otloss.autograd import refuse_higher_order
from otloss.costs import COSTS
from otloss.solve import Problem, _depth_of_caller, check_clouds, compute_dtype

__all__ = ["sinkhorn_divergence"]


def sinkhorn_divergence(
    x_local: Tensor,
    y_local: Tensor,
    eps: float,
    group: dist.ProcessGroup | None = None,
    *,
    a_local: Tensor | None = None,
    b_local: Tensor | None = None,
    cost: str = "sqeuclidean",
    objective: str = "regularized",
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
) -> Tensor:
    """:func:`otloss.sinkhorn_divergence` of the clouds of all ranks, concatenated.

    All ranks of the group call it together, with the same settings. Each gets the whole loss, and
    the gradient of its own points: what one process would get for these rows, to rounding with
    ``n_iters`` and within ``tol`` otherwise. So summing the gradients of parameters over the ranks
    gives the gradient of the loss; DistributedDataParallel averages them, which is the same for a
    loss multiplied by the number of ranks.

    Args:
        x_local, y_local: this rank's points (n_local, d) and (m_local, d), at least one of each;
            their numbers may differ from rank to rank.
        eps: regularisation, in units of cost, absolute.
        group: of torch.distributed; default all ranks.
        a_local, b_local: this rank's weights (n_local,) and (m_local,), not all 0, whose totals
            over all ranks are equal; default uniform over all points. They receive no gradient.
        cost: ``"sqeuclidean"``, ``"euclidean"`` or ``"cosine"``.
        objective, tol, max_iters, n_iters: as in :func:`otloss.sinkhorn_divergence`.

    Returns:
        (), the same on every rank; differentiable once in x_local and y_local, at fixed potentials
        (``backward="envelope"``). The backward pass exchanges nothing.

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected. A rank that raises
            leaves the others waiting, as everywhere in torch.distributed.
        NotImplementedError: batches of clouds, gradients of weights, second derivatives.

    References:
        Salimans, Zhang, Radford, Metaxas, *Improving GANs using optimal transport* (2018): why
        batches over many GPUs.
    """
    if not isinstance(cost, str):
        raise TypeError(f"cost must be a name, got {type(cost).__name__}")
    options = _check.options(
        eps, cost=cost, objective=objective, tol=tol, max_iters=max_iters, n_iters=n_iters
    )
    local = check_clouds(
        {"x_local": x_local, "y_local": y_local},
        {"a_local": a_local, "b_local": b_local},
        balanced=False,
    )
    if local.batched:
        raise NotImplementedError("distributed clouds come one at a time: (n_local, d), no batches")
    if any(w.requires_grad for w in local.weights):
        raise NotImplementedError("weights of distributed clouds receive no gradient: detach them")
    shards = [Shard.of(x, group) for x in (x_local, y_local)]
    given = (a_local, b_local)
    weights = [
        torch.full_like(w, 1 / shard.total) if v is None else w
        for w, v, shard in zip(local.weights, given, shards, strict=True)
    ]
    return _Divergence.apply(options, shards, local, *weights, x_local, y_local)


# ------------------------------------------------------------------------------- communication


class Shard(NamedTuple):
    """Which rows of a whole tensor are this rank's."""

    group: dist.ProcessGroup | None
    first: int
    total: int

    @classmethod
    def of(cls, local: Tensor, group: dist.ProcessGroup | None) -> Shard:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        size = torch.tensor([local.shape[0]], device=local.device)
        sizes = cls(group, rank, ranks).gather(size).tolist()
        return cls(group, sum(sizes[:rank]), sum(sizes))

    def gather(self, part: Tensor) -> Tensor:
        """The whole tensor, from the parts of all ranks along the first dimension.

        A sum with zeros is exact, takes parts of any size, and exists in every backend.
        """
        whole = part.new_zeros(self.total, *part.shape[1:])
        self.own(whole, len(part)).copy_(part)
        dist.all_reduce(whole, group=self.group)
        return whole

    def own(self, whole: Tensor, count: int) -> Tensor:
        return whole[self.first : self.first + count]


# ------------------------------------------------------------------------------------ one problem


class Point(NamedTuple):
    """A potential g, the update gt = T(f) that follows on f = T(g), and what they tell."""

    f: Tensor  # (n_local,)
    g: Tensor  # (m,)
    gt: Tensor  # (m,)
    value: float  # <a, f> + <b, g>
    noise: float  # its rounding error
    error: float  # L1 marginal error over the total mass


class Rows:
    """This rank's rows of one OT problem."""

    def __init__(self, C: Tensor, a: Tensor, b: Tensor, rows: Shard) -> None:
        self.C, self.a, self.b, self.rows = C, a, b, rows  # (n_local, m) (n_local,) (m,)
        self.mass = float(b.double().sum())
        ranks = dist.get_world_size(rows.group)
        self.each = Shard(rows.group, dist.get_rank(rows.group), ranks)  # a row from each rank
        # The kernel scales b to the total of a, here to that of this rank's part of it.
        self.log_part = math.log(float(a.double().sum()) / self.mass)

    def softmins(self, eps: float, g: Tensor) -> tuple[Tensor, Tensor]:
        """f = T(g) of this rank's rows, and what these make of T(f) without the others."""
        init = [torch.zeros_like(self.a), g]
        weights = [self.a[None], self.b[None]]
        problem = ops.problems(weights, [0, 1], [1.0], eps, costs=[self.C[None]])
        start, unread = [v[None] for v in init], ops.number(1.0)
        _, _, (f,), (part,), *_ = ops.solve(*problem, start, unread, 1, 1, False, False)
        shift = eps * self.log_part
        return torch.where(self.a > 0, f[0] + shift, 0.0), part[0] - shift

    def update(self, eps: float, g: Tensor) -> Tensor:
        """T(g), whole."""
        return self.rows.gather(self.softmins(eps, g)[0])

    def evaluate(self, eps: float, g: Tensor) -> Point:
        f, part = self.softmins(eps, g)
        a, b, own = self.a.double(), self.b.double(), f.double()
        sums = torch.stack([(a * own).sum(), (a * own.abs()).sum()])
        parts = self.each.gather(torch.cat([part.double(), sums])[None])
        joined = -eps * torch.logsumexp(-parts[:, :-2] / eps, dim=0)
        gt = torch.where(self.b > 0, joined, 0.0).to(g)
        on_f, size = parts[:, -2:].sum(0).tolist()
        wide = g.double()
        value = on_f + float((b * wide).sum())
        unit = 4 * torch.finfo(g.dtype).eps
        excess = self.excess(eps, g, gt).abs() * b
        return Point(
            f,
            g,
            gt,
            value,
            unit * (size + float((b * wide.abs()).sum())),
            float(excess.sum()) / self.mass,
        )

    @staticmethod
    def excess(eps: float, g: Tensor, gt: Tensor) -> Tensor:
        """1 - q, where the plan has the column sums b q."""
        return 1 - ((g.double() - gt.double()) / eps).clamp(max=30).exp()

    def sigma(self) -> float:
        """Standard deviation of the double-centred costs, from a sample of each rank's rows."""
        C = self.C[:: max(1, len(self.a) // 256), :: max(1, len(self.b) // 256)].double()
        C = C - C.mean(0, keepdim=True) - C.mean(1, keepdim=True) + C.mean()
        return math.sqrt(float(self.each.gather(C.square().mean()[None]).mean()))


class Solution(NamedTuple):
    f: Tensor  # (n,)
    g: Tensor  # (m,)
    error: float
    iterations: int


def _fixed(rows: Rows, eps: float, n_iters: int) -> Solution:
    point = rows.evaluate(eps, torch.zeros_like(rows.b))
    for _ in range(n_iters - 1):
        point = rows.evaluate(eps, point.gt)
    return Solution(rows.rows.gather(point.f), point.gt, point.error, n_iters)


def _symmetric(rows: Rows, eps: float, tol: float, max_iters: int) -> Solution:
    """A cloud against itself: one potential, by steps that contract whatever eps."""
    a = rows.b
    f = rows.update(eps, torch.zeros_like(a))
    f = torch.where(a > 0, f - 0.5 * (a * f).sum() / a.sum(), 0.0)
    iterations = 1
    while True:
        step = rows.update(eps, f) - f
        iterations += 1
        error = float((rows.excess(eps, f, f + step).abs() * a).sum()) / rows.mass
        if not error > tol or iterations >= max_iters:
            f = f + 0.5 * step
            return Solution(f, f, error, iterations)
        f = f + 2 / 3 * step


def _pair(rows: Rows, eps: float, tol: float, max_iters: int) -> Solution:
    """Quasi-Newton ascent of the semidual, by way of larger eps where a cold start is slow."""
    point, count = rows.evaluate(eps, torch.zeros_like(rows.b)), 1
    far = float((point.gt - point.g).abs().max()) > 10 * eps
    first = 0.1 * rows.sigma() if point.error > 0.6 or far else 0.0
    stages = max(1, round(math.log(first / eps, 4))) if first > 1.3 * eps else 0
    for stage in range(stages):
        stage_eps = first * (eps / first) ** (stage / stages)
        point, count = rows.evaluate(stage_eps, point.gt), count + 1
        point, count = _ascend(rows, stage_eps, max(tol, 0.01), max_iters - 1, point, count)
    if stages:
        point, count = rows.evaluate(eps, point.gt), count + 1
    point, count = _ascend(rows, eps, tol, max_iters, point, count)
    return Solution(rows.rows.gather(point.f), point.gt, point.error, count)


def _ascend(
    rows: Rows, eps: float, tol: float, max_iters: int, point: Point, count: int
) -> tuple[Point, int]:
    """L-BFGS on the log residual gt - g, in the inner product weighted by b (docs/solver.md)."""
    b, memory = rows.b.double(), list[tuple[Tensor, Tensor]]()

    def inner(v: Tensor, w: Tensor) -> float:
        return float((b * v * w).sum())

    def residual(at: Point) -> Tensor:
        r = at.gt.double() - at.g.double()
        return torch.where(b > 0, r - (b * r).sum() / rows.mass, 0.0)

    r = residual(point)
    while point.error > tol and count < max_iters:
        slopes = rows.excess(eps, point.g, point.gt)
        p = _direction(r, memory, inner)
        if not inner(slopes, p) > 0:
            memory.clear()
            p = r
        slope, t, accepted = inner(slopes, p), 1.0, False
        for _ in range(5):
            if count + 1 >= max_iters:  # the last pass is a plain iteration
                break
            trial, count = rows.evaluate(eps, (point.g.double() + t * p).to(point.g)), count + 1
            accepted = trial.value >= point.value + 1e-4 * t * slope - point.noise
            if accepted:
                break
            t *= 0.3
        if not accepted:
            memory.clear()
            trial, count = rows.evaluate(eps, point.gt), count + 1  # always ascends
        after = residual(trial)
        s, y = torch.where(b > 0, trial.g.double() - point.g.double(), 0.0), r - after
        if accepted and inner(s, y) > 1e-10 * math.sqrt(inner(s, s) * inner(y, y)):
            memory = [*memory[-7:], (s, y)]
        point, r = trial, after
    return point, count


def _direction(r: Tensor, memory: list[tuple[Tensor, Tensor]], inner: Any) -> Tensor:
    """The two-loop recursion."""
    p, steps = r, list[float]()
    for s, y in reversed(memory):
        steps.append(inner(s, p) / inner(s, y))
        p = p - steps[-1] * y
    if memory:
        s, y = memory[-1]
        p = inner(s, y) / inner(y, y) * p
    for s, y in memory:
        p = p + (steps.pop() - inner(y, p) / inner(s, y)) * s
    return p


# ---------------------------------------------------------------------------------------- the loss

PAIRS = [(0, 1, 1.0), (0, 0, -0.5), (1, 1, -0.5)]  # clouds and coefficients of the divergence


class _Divergence(torch.autograd.Function):
    """``(options, shards, local, a_local, b_local, x_local, y_local) -> loss``."""

    @staticmethod
    def forward(
        ctx: Any,
        options: _check.Options,
        shards: list[Shard],
        local: Problem,
        *tensors: Tensor,
    ) -> Tensor:
        weights, points = [w[0] for w in tensors[:2]], tensors[2:]
        dtype = compute_dtype(points[0])
        clouds = [x.detach().to(dtype).contiguous() for x in points]
        whole = [shard.gather(x) for shard, x in zip(shards, clouds, strict=True)]
        whole_weights = [shard.gather(w) for shard, w in zip(shards, weights, strict=True)]
        _check.same_mass(whole_weights[0], whole_weights[1], points[0].dtype)
        kind, eps = COSTS[str(options.cost)], options.eps
        loss, solutions = torch.zeros((), dtype=torch.float64, device=points[0].device), []
        for i, j, coefficient in PAIRS:
            (C,) = ops.cost([clouds[i][None], whole[j][None]], [], [0, 1], kind)
            rows = Rows(C[0], weights[i], whole_weights[j], shards[i])
            if options.n_iters >= 0:
                solution = _fixed(rows, eps, options.n_iters)
            elif i == j:
                solution = _symmetric(rows, eps, options.tol, options.max_iters)
            else:
                solution = _pair(rows, eps, options.tol, options.max_iters)
            loss += coefficient * _value(rows, solution, whole_weights[i], options)
            solutions.append(solution)
        _report(options, local, solutions, loss)
        ctx.options, ctx.shards, ctx.kind = options, shards, kind
        potentials = [v for solution in solutions for v in (solution.f, solution.g)]
        ctx.save_for_backward(*points, *weights, *whole, *whole_weights, *potentials)
        return loss.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved, options = ctx.saved_tensors, ctx.options
        points, weights, whole, whole_weights = (saved[k : k + 2] for k in (0, 2, 4, 6))
        grads: list[Tensor | None] = []
        for c, (x, w, shard) in enumerate(zip(points, weights, ctx.shards, strict=True)):
            if not ctx.needs_input_grad[5 + c]:
                grads.append(None)
                continue
            # Every pair that the cloud is in, its points as rows, once for each side.
            others, coefficients, f, g = [], [], [], []
            for p, (i, j, coefficient) in enumerate(PAIRS):
                of_i, of_j = saved[8 + 2 * p], saved[9 + 2 * p]
                for side, other, own, across in ((i, j, of_i, of_j), (j, i, of_j, of_i)):
                    if side == c:
                        others += [0, 1 + other]
                        coefficients.append(coefficient)
                        f.append(shard.own(own, len(x))[None].contiguous())
                        g.append(across[None])
            dtype = whole[0].dtype
            clouds = [t.detach().to(dtype).contiguous()[None] for t in (x, *whole)]
            masses = [t[None] for t in (w, *whole_weights)]
            costs = ops.cost(clouds, masses, others, ctx.kind)
            problem = ops.problems(
                masses, others, coefficients, options.eps, costs=costs, points=clouds, kind=ctx.kind
            )
            _, (found,), *_ = ops.envelope_backward(
                grad.to(dtype).reshape(1), *problem, f, g, [], [0], False
            )
            grads.append(found[0].to(x.dtype))
        present = [g for g in grads if g is not None]
        message = "second derivatives of distributed losses are not available"
        kept = iter(refuse_higher_order(present, [*points, grad], message))
        return None, None, None, None, None, *(None if g is None else next(kept) for g in grads)


def _value(rows: Rows, solution: Solution, a: Tensor, options: _check.Options) -> Tensor:
    f, g = solution.f.double(), solution.g.double()
    if options.objective == "regularized":
        return (a.double() * f).sum() + (rows.b.double() * g).sum()
    own = rows.rows.own(solution.f, len(rows.a))
    exponent = (own[:, None] + solution.g - rows.C) / options.eps
    P = rows.a[:, None] * rows.b * exponent.exp()
    return rows.each.gather(torch.where(P > 0, P * rows.C, 0.0).double().sum()[None]).sum()


def _report(
    options: _check.Options, local: Problem, solutions: list[Solution], loss: Tensor
) -> None:
    if not math.isfinite(float(loss)):
        for name, x in zip(local.names, local.points, strict=True):
            _check.finite(name, x)
        raise ValueError("the points of another rank are not finite, or costs overflow")
    worst = max(solutions, key=lambda solution: solution.error)
    if options.n_iters < 0 and worst.error > options.tol:
        warnings.warn(
            f"Sinkhorn stopped after {worst.iterations} iterations at a marginal error of "
            f"{worst.error:.2e}, above tol={options.tol:g}. Raise max_iters "
            f"({options.max_iters}), eps ({options.eps:g}) or tol.",
            _check.ConvergenceWarning,
            stacklevel=_depth_of_caller(),
        )
