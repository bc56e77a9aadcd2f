"""How a problem is solved when the caller leaves it open: with stored cost matrices, with costs
made in every sweep, or with those alone that hold something of the plan."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from otloss import _check, ops
from otloss._options import Options
from otloss.costs import COSTS, NAMED, degree
from otloss.reference.arguments import as_pairs

__all__ = [
    "budget",
    "choose",
    "choose_method",
    "dense_budget",
    "exceeds_budget",
    "in_blocks",
    "streams_function",
]

# Cost matrices that together take more bytes than this are not stored; on a GPU, where it is left
# at this default, more than CUDA_SHARE of the memory. Set it through the environment variable or by
# assignment, `otloss.method.dense_budget = 1 << 30`.
DEFAULT_BUDGET = 1 << 30
dense_budget = int(os.environ.get("OTLOSS_DENSE_BUDGET", DEFAULT_BUDGET))
CUDA_SHARE = 0.25

# Bytes per block of rows in a streamed result; the computation takes about ten times that. glibc
# gives pieces of this size back to the system; smaller ones fragment its heap.
BLOCK_BYTES = 1 << 25

# Where making a cost again is faster than reading it, on each kind of device: up to this
# dimension, and for matrices of more than this number of bytes. A matrix that fits in the L2 cache
# (on a GPU in shared memory) is cheaper to read again than to make.
STREAMED_FROM = {"cpu": {4: 1 << 20, 8: 12 << 20}, "cuda": {3: 1 << 25}}
# For gradients that read the costs repeatedly: a stored matrix pays until it exceeds the L3 cache.
# (A GPU makes each entry twice in a pass.)
STREAMED_BACK_FROM = {"cpu": {4: 12 << 20, 8: 32 << 20}, "cuda": {}}

# Of the multiscale engine, whose float32 tiles resolve errors down to a few 1e-6.
MULTISCALE_COSTS = ("sqeuclidean", "cosine")
MULTISCALE_DIMS, MULTISCALE_TOL = 8, 1e-5
# "auto" takes it for at least MULTISCALE_FROM pairs of points, in clouds of a local dimension of at
# most MULTISCALE_LOCAL. That is measured at SAMPLED points: how the number of neighbours grows with
# the distance, from the first of NEIGHBOURS to the second.
MULTISCALE_FROM, MULTISCALE_LOCAL = 2.5e7, 3.4
NEIGHBOURS, SAMPLED = (16, 128), 64
# On a GPU, predicted and not measured (docs/cuda-multiscale.md): from this many pairs, where a
# sweep over all of them takes some 10 ms, and if at most CUDA_NEAR of them are near. Those are
# within sqrt(REACH eps), where an entry of the plan is not below what is left out, and some leaves.
MULTISCALE_FROM_CUDA, CUDA_NEAR, REACH, LEAVES = 1e10, 0.1, 20.0, 4
# Nothing else pays on a CPU between clouds of up to this number of points.
SMALL = 256


def choose(
    points: Sequence[Tensor], weights: Sequence[Tensor], pairs: list[int], options: Options
) -> tuple[Options, bool]:
    """The options, with ``method="multiscale"`` also where "auto" takes it, and whether cost
    matrices are stored."""
    options = _with_function(options)
    if options.method == "auto" and _are_small(points, weights):
        return options, True
    lacks = _multiscale_lacks(points, weights, options)
    if (
        options.method == "multiscale"
        and not lacks
        and _without_direction(points, weights, options)
    ):
        lacks = "points of norm > 0 under cosine", 0.0
    if options.method == "multiscale" and lacks:
        needed, given = lacks
        raise NotImplementedError(f'method="multiscale" needs {needed}, got {given!r}')
    if options.method == "auto" and not lacks and _multiscale_pays(points, weights, pairs, options):
        options = options._replace(method="multiscale")
    if options.method == "multiscale":
        return options, False
    return options, not _streams(points, weights, pairs, options)


def _are_small(points: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether costs are stored, before anything is counted: that takes time of a small call."""
    sizes, within = [w.shape[1] for w in weights], dense_budget >= DEFAULT_BUDGET
    return within and points[0].is_cpu and points[0].dim() == 2 and max(sizes) <= SMALL


def _with_function(options: Options) -> Options:
    """A cost that does not scale with the points as a function, where eps has a derivative: that
    takes costs which can be scaled; see otloss/eps.py."""
    if not (isinstance(options.cost, str) and options.learns_eps()):
        return options
    if degree(options.cost):
        return options
    if options.method in ("streamed", "multiscale"):
        raise NotImplementedError(
            f"the derivative in eps with cost={options.cost!r} needs stored cost matrices, not "
            f'method={options.method!r}: detach eps, or use "dense"'
        )

    between = NAMED[COSTS[options.cost]].between
    return options._replace(cost=between, symmetric=True)


def _multiscale_lacks(
    points: Sequence[Tensor], weights: Sequence[Tensor], options: Options
) -> tuple[str, Any] | None:
    """What the multiscale engine would need to solve the problem, and what is given."""
    (n, d), device = points[0].shape[-2:], points[0].device
    if weights[0].shape[-1] > n:
        return "all of the mass", "mass="
    on_gpu = device.type == "cuda"
    if not (ops.CUDA_KERNELS if on_gpu else ops.NATIVE and device.type == "cpu"):
        return "a build with kernels for the points' device", str(device)
    if on_gpu and options.objective != "regularized":
        return 'objective="regularized" on a GPU', options.objective
    if options.cost not in MULTISCALE_COSTS:
        return 'cost="sqeuclidean" or "cosine"', options.cost
    if d > MULTISCALE_DIMS:
        return f"at most {MULTISCALE_DIMS} dimensions", d
    if options.n_iters >= 0:
        return "a tolerance in place of n_iters", options.n_iters
    if isinstance(options.eps, Tensor) and options.eps.dim():
        return "one eps for all problems", tuple(options.eps.shape)
    if options.tol < MULTISCALE_TOL:
        return f"tol of at least {MULTISCALE_TOL:g}", options.tol
    return None


def _multiscale_pays(
    points: Sequence[Tensor], weights: Sequence[Tensor], pairs: list[int], options: Options
) -> bool:
    """Whether the clouds are large, and few pairs of leaves hold the plan: on a CPU where they are
    locally of few dimensions."""
    sizes, on_gpu = [w.shape[1] for w in weights], points[0].is_cuda
    wanted = options.balanced() and options.objective == "regularized"
    least = MULTISCALE_FROM_CUDA if on_gpu else MULTISCALE_FROM
    if not wanted or min(sizes) * max(sizes) < least or min(sizes) <= max(NEIGHBOURS):
        return False
    if on_gpu:
        return _pays_on_gpu(points, weights, pairs, options)
    if not _check.readable(points[0]) or _without_direction(points, weights, options):
        return False
    return max(map(local_dimension, points)) <= MULTISCALE_LOCAL


def _pays_on_gpu(
    points: Sequence[Tensor], weights: Sequence[Tensor], pairs: list[int], options: Options
) -> bool:
    """Whether the engine's CUDA kernels have what is asked for, and few pairs are near. They wait
    for the device once per problem, and so does this: not while a graph is recorded."""
    if options.cost != "sqeuclidean" or options.learns_eps() or _check.traced(points[0]):
        return False
    if points[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (*points, *weights))
    if learns and len(pairs) == 2 and options.backward != "envelope":
        return False  # potentials may be given back, whose gradient is implicit
    return max(near_share(x, options.eps) for x in points) <= CUDA_NEAR


def _without_direction(
    points: Sequence[Tensor], weights: Sequence[Tensor], options: Options
) -> bool:
    """Whether a point of positive weight has norm 0 under cosine, which is no distance there."""
    if options.cost != "cosine" or not _check.readable(points[0]):
        return False
    pairs = zip(points, weights, strict=True)
    return any(bool(((x == 0).all(-1) & (w > 0)).any()) for x, w in pairs)


def _sampled_distances(x: Tensor) -> Iterable[Tensor]:
    """(n,) from each of a sample of points of the first problem to all of its points."""
    x = (x if x.dim() == 2 else x[0]).detach().float()
    chosen = torch.randint(len(x), (SAMPLED,), generator=torch.Generator().manual_seed(0))
    return (torch.linalg.vector_norm(x - x[i], dim=-1) for i in chosen.tolist())


@torch.no_grad()
def local_dimension(x: Tensor) -> float:
    """The dimension of a cloud near its points: the exponent with which the number of neighbours
    grows with the distance, in the mean of a sample."""
    near, far = NEIGHBOURS
    found = []
    for distance in _sampled_distances(x):
        first, last = distance.topk(far + 1, largest=False).values[[near, far]].tolist()
        growth = math.log(last / first) if 0 < first < last < math.inf else 0.0
        found.append(min(math.log(far / near) / growth, x.shape[-1]) if growth else 0.0)
    return statistics.fmean(found)


@torch.no_grad()
def near_share(x: Tensor, eps: float | Tensor) -> float:
    """The part of a cloud that a plan with itself at ``eps``, and leaves of points, bring near to a
    point, in the mean of a sample."""
    found = []
    for distance in _sampled_distances(x):
        leaf = distance.topk(NEIGHBOURS[0] + 1, largest=False).values[-1]
        found.append((distance <= (REACH * eps) ** 0.5 + LEAVES * leaf).float().mean())
    return float(torch.stack(found).mean())


def _streams(
    points: Sequence[Tensor], weights: Sequence[Tensor], pairs: list[int], options: Options
) -> bool:
    """Whether to solve without cost matrices."""
    if not isinstance(options.cost, str):
        return streams_function(weights, pairs, options)
    on_cpu = points[0].device.type == "cpu"
    possible = on_cpu or ops.CUDA_KERNELS
    if options.method == "streamed" and not possible:
        raise NotImplementedError(
            'method="streamed" on a GPU needs a build with CUDA kernels, got points on '
            f"{points[0].device}"
        )
    if options.method != "auto" or not possible:
        return options.method == "streamed"
    sizes = [(weights[i].shape[1], weights[j].shape[1]) for i, j in as_pairs(pairs)]
    chosen = choose_method(
        points,
        sizes,
        weights[0].element_size(),
        many_passes_back=options.follows_iterations() or options.solves_system(),
    )
    return chosen == "streamed"


def streams_function(weights: Sequence[Tensor], pairs: list[int], options: Options) -> bool:
    """Whether a cost function is called on blocks of rows: where its matrices exceed the budget,
    and the gradient that is asked for is available so."""
    if options.method != "auto":
        return options.method == "streamed"
    learns = torch.is_grad_enabled() and (options.follows_iterations() or options.solves_system())
    if learns or torch.compiler.is_compiling():
        return False
    entries = sum(weights[i].numel() * weights[j].shape[1] for i, j in as_pairs(pairs))
    return exceeds_budget(entries * weights[0].element_size(), weights[0].device)


def choose_method(
    points: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    itemsize: int,
    *,
    many_passes_back: bool = False,
) -> str:
    """``"dense"`` or ``"streamed"`` for pairs of ``sizes`` (n, m) over ``points`` (B, n, d).

    ``many_passes_back``: whether the gradient will go over the costs again and again.
    """
    shape, device = points[0].shape, points[0].device
    if device.type == "cuda":
        forced = os.environ.get("OTLOSS_CUDA_REGIME") or "auto"
        if forced != "auto":
            return "streamed" if forced == "streamed" else "dense"
    bytes_of = [n * m * itemsize for n, m in sizes]
    total = sum(bytes_of) * (shape[0] if len(shape) == 3 else 1)
    if exceeds_budget(total, device):
        return "streamed"
    table = STREAMED_BACK_FROM if many_passes_back else STREAMED_FROM
    least = [least for dims, least in table[device.type].items() if shape[-1] <= dims]
    return "streamed" if least and max(bytes_of) > min(least) else "dense"


def exceeds_budget(total: int, device: torch.device) -> bool:
    """Whether cost matrices of ``total`` bytes are too large to store."""
    return total > dense_budget and total > budget(device)  # asks the device only if need be


def budget(device: torch.device) -> int:
    """Bytes that the cost matrices of a call may take together."""
    if device.type == "cuda" and dense_budget == DEFAULT_BUDGET:
        return int(CUDA_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return dense_budget


def block_rows(across: Tensor) -> int:
    """Rows of a block over ``across``, (m,) or (B, m)."""
    return -(-BLOCK_BYTES // (across.numel() * across.element_size()))


def in_blocks(
    of_block: Callable[[slice], tuple[Tensor, ...]],
    count: int,
    across: Tensor,
    reads: Iterable[Tensor] = (),
) -> list[tuple[Tensor, ...]]:
    """``of_block(rows)`` for ``count`` rows over ``across`` (B, m), some at a time. What is made on
    the way is not kept for the gradient but made again, from ``reads`` as they were."""
    step = block_rows(across)
    blocks = [slice(i, min(i + step, count)) for i in range(0, count, step)]
    if not torch.is_grad_enabled():
        return [of_block(rows) for rows in blocks]
    tracked = () if torch.compiler.is_compiling() else reads
    versions = [(t, t._version) for t in tracked if not t.is_inference()]

    def made(rows: slice) -> tuple[Tensor, ...]:
        if any(t._version != version for t, version in versions):
            raise RuntimeError(
                "a tensor that the gradient is made from has been modified by an inplace operation "
                "since: take the gradient before, or give a copy"
            )
        return of_block(rows)

    return [checkpoint(made, rows, use_reentrant=False) for rows in blocks]
