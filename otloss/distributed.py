"""The loss of a batch whose points are spread over processes: each holds some rows of each cloud.

The rows of a cost matrix are cut over the processes (ranks). A rank passes over the rows of its own
points with the kernels of every other solve, which gives their potentials f and, for each column,
its rows' contribution to the update of g. Contributions are exchanged, m numbers per rank and
iteration, and joined by a log-sum-exp. So all ranks know the same g, and the solver of
``otloss/reference``, which each of them runs over these sweeps, decides alike everywhere.

A rank stores n_local (n + m) + m_local m costs where one process stores n (n + m) + m^2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from otloss import _check, ops
from otloss._options import Options, check_options
from otloss.autograd import refuse_higher_order
from otloss.costs import COSTS, NAMED
from otloss.problem import Problem, check_clouds
from otloss.reference.engine import Clouds, sample, spread
from otloss.reference.marginals import BALANCED, SoftMean, counted, plan
from otloss.reference.solver import Solution, plain_iteration, solve_problem

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
        (``backward="envelope"``), which exchanges nothing.

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected. Settings that differ
            between ranks, and data that cannot be solved, are refused on all of them; otherwise a
            rank that raises leaves the others waiting, as everywhere in torch.distributed.
        NotImplementedError: batches of clouds, gradients of weights, second derivatives.

    References:
        Salimans et al., *Improving GANs using optimal transport* (2018): why large batches.
    """
    if not isinstance(cost, str):
        raise TypeError(f"cost must be a name, got {type(cost).__name__}")
    options = check_options(
        eps, cost=cost, objective=objective, tol=tol, max_iters=max_iters, n_iters=n_iters
    )
    given = {"a_local": a_local, "b_local": b_local}
    local = check_clouds({"x_local": x_local, "y_local": y_local}, given, balanced=False)
    if local.batched:
        raise NotImplementedError("distributed clouds come one at a time: (n_local, d), no batches")
    if any(w.requires_grad for w in local.weights):
        raise NotImplementedError("weights of distributed clouds receive no gradient: detach them")
    settings = {
        **options._asdict(),
        "the dtype": local.weights[0].dtype,
        "the dimension d": x_local.shape[1],
        "whether weights are given": [w is not None for w in given.values()],
    }
    shards, clouds = cut([x_local, y_local], settings, group), []
    cut_clouds = zip(shards, local.points, local.weights, given.values(), strict=True)
    for shard, x, (w,), v in cut_clouds:
        points = x.detach().to(w.dtype).contiguous()
        weights = torch.full_like(w, 1 / shard.total) if v is None else w
        clouds.append(Cloud(shard, points, weights, shard.gather(points), shard.gather(weights)))
    _check.same_mass(clouds[0].whole_weights, clouds[1].whole_weights, tuple(given.values()))
    return _Divergence.apply(options, local, clouds, x_local, y_local)


# ------------------------------------------------------------------------------- communication


class Shard(NamedTuple):
    """Which rows of a whole tensor are this rank's."""

    group: dist.ProcessGroup | None
    first: int
    total: int

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


def cut(
    local: Sequence[Tensor], settings: dict[str, Any], group: dist.ProcessGroup | None
) -> list[Shard]:
    """How the rows of each cloud are cut over the ranks; all ranks must have the same settings."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group must contain this process: only its ranks may call")
    hashes = [hashlib.sha256(repr(value).encode()).digest() for value in settings.values()]
    row = [*(len(x) for x in local), *(int.from_bytes(h[:7], "big") for h in hashes)]
    table = Shard(group, rank, ranks).gather(torch.tensor([row], device=local[0].device)).tolist()
    for name, *column in zip(settings, *(numbers[len(local) :] for numbers in table), strict=True):
        if len(set(column)) > 1:
            raise ValueError(f"{name} must be the same on every rank, here: {settings[name]!r}")
    sizes = [[numbers[cloud] for numbers in table] for cloud in range(len(local))]
    return [Shard(group, sum(counts[:rank]), sum(counts)) for counts in sizes]


class Cloud(NamedTuple):
    """This rank's points of a cloud, in the dtype computed in, and those of all ranks."""

    shard: Shard
    points: Tensor  # (n_local, d)
    weights: Tensor  # (n_local,)
    whole: Tensor  # (n, d)
    whole_weights: Tensor  # (n,)


# ------------------------------------------------------------------------------------ one problem


class ShardedEngine:
    """Sweeps over this rank's rows of one problem, joined with those of the others."""

    marginals = BALANCED

    def __init__(self, x: Cloud, y: Cloud, cost: int) -> None:
        self.rows, self.a = x.shard, x.weights
        mass, mass_y = (float(w.double().sum()) for w in (x.whole_weights, y.whole_weights))
        self.mass = mass, mass
        self.b = y.whole_weights * (mass / mass_y)
        weights = [self.a[None], self.b[None]]
        self.C = ops.cost([x.points[None], y.whole[None]], weights, [0, 1], cost)[0][0]
        self.clouds = Clouds(NAMED[cost], x.whole, y.whole, x.whole_weights, self.b)
        group = x.shard.group
        self.each = Shard(group, dist.get_rank(group), dist.get_world_size(group))  # a row per rank
        # The kernel scales b to the total of a, here to that of this rank's part of it.
        self.log_part = math.log(float(self.a.double().sum()) / mass)

    def softmins(self, eps: float, g: Tensor) -> tuple[Tensor, Tensor]:
        """f = T_x(g) of this rank's rows, and what these make of T_y(f) without the others."""
        init = [torch.zeros_like(self.a), g]
        weights = [self.a[None], self.b[None]]
        problem = ops.problems(weights, [0, 1], [1.0], eps, costs=[self.C[None]])
        start, unread = [v[None] for v in init], ops.number(1.0)
        _, _, (f,), (part,), *_ = ops.solve(*problem, start, unread, 1, 1, False, False)
        shift = eps * self.log_part
        return torch.where(self.a > 0, f[0] + shift, 0.0), part[0] - shift

    def iterate(self, eps: float, g: Tensor) -> tuple[Tensor, SoftMean, Tensor]:
        f, part = self.softmins(eps, g)
        weighted = self.a.double() * f.double()
        sums = torch.stack([weighted.sum(), weighted.abs().sum()])
        parts = self.each.gather(torch.cat([part.double(), sums])[None])
        mean = SoftMean(*(parts[:, -2:].sum(0) / self.mass[0]))
        t = -eps * torch.logsumexp(-parts[:, :-2] / eps, dim=0)
        return f, mean, torch.where(self.b > 0, t, 0.0).to(g)

    def update_rows(self, eps: float, g: Tensor) -> Tensor:
        return self.rows.gather(self.softmins(eps, g)[0])

    def sigma(self) -> float:
        rows, columns = sample(self.clouds.a) - self.rows.first, sample(self.b)
        own = (rows >= 0) & (rows < len(self.a))
        C = self.C.new_zeros(len(rows), len(columns))
        C[own] = self.C[rows[own]][:, columns]
        dist.all_reduce(C, group=self.rows.group)
        return spread(C)

    def propose(self, sweeps: float, eps: float) -> Tensor | None:
        g = self.clouds.propose(sweeps, eps)
        if g is not None:  # to the last digit as on the first rank
            dist.broadcast(g, group=self.rows.group, group_src=0)
        return g

    def check(self, eps: float, local: Problem) -> float:
        """The largest cost; raises, on every rank, where the problem cannot be solved."""
        largest = counted(self.C, self.a, self.b).abs().amax()[None]
        max_cost = float(self.each.gather(largest).max())
        if not math.isfinite(max_cost):
            for name, x in zip(local.names, local.points, strict=True):
                _check.finite(name, x)
            raise ValueError("the points of another rank are not finite, or costs overflow")
        _check.resolution(eps, max_cost, self.C.dtype)
        return max_cost

    def value(self, eps: float, objective: str, f: Tensor, g: Tensor) -> Tensor:
        """The objective at f (n,) and g (m,), in float64."""
        if objective == "regularized":
            return self.clouds.a.double() @ f.double() + self.b.double() @ g.double()
        P = plan(eps, self.C, self.rows.own(f, len(self.a)), g, self.a, self.b)
        return self.each.gather((P * self.C).double().sum()[None]).sum()


def _solve(engine: ShardedEngine, symmetric: bool, options: Options) -> Solution:
    """Both potentials whole."""
    if options.n_iters < 0:
        solved = solve_problem(engine, symmetric, options.eps, options.tol, options.max_iters)
        return solved if symmetric else solved._replace(f=engine.rows.gather(solved.f))
    g = torch.zeros_like(engine.b)
    for _ in range(options.n_iters):
        f, g, error = plain_iteration(engine, options.eps, g)
    return Solution(engine.rows.gather(f), g, float(error), options.n_iters, False)


# ---------------------------------------------------------------------------------------- the loss

PAIRS = [(0, 1, 1.0), (0, 0, -0.5), (1, 1, -0.5)]  # clouds and coefficients of the divergence


class _Divergence(torch.autograd.Function):
    """``(options, local, clouds, x_local, y_local) -> loss``."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, local: Problem, clouds: list[Cloud], *points: Tensor
    ) -> Tensor:
        ctx.options, ctx.clouds, ctx.kind = options, clouds, COSTS[str(options.cost)]
        ctx.solutions = []
        loss, max_cost = clouds[0].points.new_zeros((), dtype=torch.float64), 0.0
        for i, j, coefficient in PAIRS:
            engine = ShardedEngine(clouds[i], clouds[j], ctx.kind)
            max_cost = max(max_cost, engine.check(options.eps, local))
            solved = _solve(engine, i == j, options)
            loss += coefficient * engine.value(options.eps, options.objective, solved.f, solved.g)
            ctx.solutions.append(solved)
        worst = max(ctx.solutions, key=lambda s: (not s.converged, s.error))
        if options.n_iters < 0 and not worst.converged:
            dtype = clouds[0].points.dtype
            _check.not_converged(options, worst.iterations, worst.error, max_cost, dtype)
        ctx.save_for_backward(*points)
        return loss.to(clouds[0].points.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        points, clouds = ctx.saved_tensors, ctx.clouds
        whole, masses = [c.whole[None] for c in clouds], [c.whole_weights[None] for c in clouds]
        grads: list[Tensor | None] = [None, None]
        for c, (rows, own, weights, _, _) in enumerate(clouds):
            if not ctx.needs_input_grad[3 + c]:
                continue
            # Every pair that the cloud is in, its points as rows, once for each side.
            others, coefficients, f, g = [], [], [], []
            for (i, j, coefficient), (of_i, of_j, *_) in zip(PAIRS, ctx.solutions, strict=True):
                for side, other, u, v in ((i, j, of_i, of_j), (j, i, of_j, of_i)):
                    if side == c:
                        others += [0, 1 + other]
                        coefficients.append(coefficient)
                        f.append(rows.own(u, len(own))[None].contiguous())
                        g.append(v[None])
            x, w = [own[None], *whole], [weights[None], *masses]
            problem = ops.problems(
                w, others, coefficients, ctx.options.eps,
                costs=ops.cost(x, w, others, ctx.kind), points=x, kind=ctx.kind,
            )  # fmt: skip
            seed = grad.to(own).reshape(1)
            _, (found,), *_ = ops.envelope_backward(seed, *problem, f, g, [], [0], False)
            grads[c] = found[0].to(points[c].dtype)
        message = "second derivatives of distributed losses are not available"
        present = [g for g in grads if g is not None]
        kept = iter(refuse_higher_order(present, [*points, grad], message))
        return None, None, None, *(None if g is None else next(kept) for g in grads)
