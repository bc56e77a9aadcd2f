"""Shapes of what operations give: of graphs traced without data, and of what is packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from otloss import ops
from otloss.reference.arguments import Arguments, as_pairs, read


@torch.library.register_fake("otloss::cost", lib=ops.library)
def _(points: list[Tensor], weights: list[Tensor], pairs: list[int], kind: int) -> list[Tensor]:
    sides = [(points[i], points[j]) for i, j in as_pairs(pairs)]
    return [x.new_empty(*x.shape[:2], y.shape[1]) for x, y in sides]


@torch.library.register_fake("otloss::cost_backward", lib=ops.library)
def _(*arguments: Any) -> list[Tensor]:
    _, _, points, *_, wanted = arguments
    return [torch.empty_like(points[c]) for c in wanted]


@torch.library.register_fake("otloss::solve", lib=ops.library)
def _(*arguments: Any) -> tuple[Any, ...]:
    problem, (init, _, _, n_iters, trace, dense, *rest) = read(arguments)
    sides = [(problem.weights[i], problem.weights[j]) for i, j in as_pairs(problem.pairs)]
    B = problem.weights[0].shape[0]
    single = bool(problem.points) and problem.points[0].dim() == 2
    loss = problem.weights[0].new_empty([] if single else [B])
    status = loss.new_empty(len(sides), B, 5, dtype=torch.float64)
    if dense and not (trace or init or problem.costs):
        packed = _empty_packed(problem, *rest)
        if packed:
            return loss, status, packed[:1], [], [], [], packed[1:]
    f, g = [torch.empty_like(a) for a, _ in sides], [torch.empty_like(b) for _, b in sides]
    traces, made = list[Tensor](), list[Tensor]()
    if trace:
        traces = [loss.new_empty(B, n_iters, a.shape[1] + b.shape[1]) for a, b in sides]
    if dense and not problem.costs:
        made = [_empty_rows(a, b.shape[1]) for a, b in sides]
    return loss, status, f, g, traces, made, _empty_prepared(problem.points, problem.multiscale)


def _empty_rows(a: Tensor, m: int) -> Tensor:
    """(B, n, m) as the kernels make it: on a CPU rows start on cache lines."""
    on_lines = ops.NATIVE and a.device.type == "cpu"
    return a.new_empty(*a.shape, _whole(m, a) if on_lines else m)[..., :m]


def _whole(m: int, like: Tensor) -> int:
    """m entries up to whole cache lines."""
    line = 64 // like.element_size()
    return -(-m // line) * line


def _empty_packed(problem: Arguments, pack: bool = False, target: Any = None) -> list[Tensor]:
    """Potentials and what was prepared, of a solve that packs them; or none."""
    w = problem.weights
    if not (pack and ops.NATIVE) or w[0].is_cuda:
        return []
    made = problem.pairs[:-2] if target is not None else problem.pairs
    potentials = sum(w[c].numel() for c in problem.pairs)
    entries = places_of_costs(problem.points, w, made)[-1]
    fits = entries * w[0].element_size() < ops.native.most_packed
    return [w[0].new_empty(potentials), w[0].new_empty(entries)] if fits else []


def places_of_costs(points: list[Tensor], weights: list[Tensor], pairs: list[int]) -> list[int]:
    """Where the cost of each pair begins in what is packed, at last where it ends."""
    places = [_whole(_count(points), weights[0])]
    for i, j in as_pairs(pairs):
        places.append(places[-1] + weights[i].numel() * _whole(weights[j].shape[1], weights[0]))
    return places


def _empty_prepared(points: list[Tensor], multiscale: bool) -> list[Tensor]:
    if not ops.NATIVE or multiscale or not points or points[0].is_cuda:
        return []
    count = _count(points)
    kept = count * points[0].element_size() <= ops.native.most_kept
    return [points[0].new_empty(count)] if kept else []


def _count(points: list[Tensor]) -> int:
    """Entries of prepared clouds: coordinates, and a norm for each point."""
    return sum(x[..., 0].numel() for x in points) * (points[0].shape[-1] + 1)


def _gradients(
    problem: Arguments, want_costs: list[int], want_points: list[int], want_weights: bool
) -> tuple[list[Tensor], ...]:
    pairs = problem.pairs if want_weights else []
    return (
        [torch.empty_like(problem.costs[p]) for p in want_costs],
        [torch.empty_like(problem.points[c]) for c in want_points],
        [torch.empty_like(problem.weights[i]) for i in pairs[::2]],
        [torch.empty_like(problem.weights[j]) for j in pairs[1::2]],
    )


@torch.library.register_fake("otloss::envelope_backward", lib=ops.library)
def _(grad_loss: Tensor, *arguments: Any) -> tuple[list[Tensor], ...]:
    problem, (_, _, *wanted) = read(arguments)
    return _gradients(problem, *wanted[:3])


@torch.library.register_fake("otloss::unrolled_backward", lib=ops.library)
def _(grad_loss: Tensor, _f: Any, _g: Any, *arguments: Any) -> tuple[list[Tensor], ...]:
    problem, (_, _, *wanted) = read(arguments)
    return _gradients(problem, *wanted)


@torch.library.register_fake("otloss::implicit_backward", lib=ops.library)
def _(grad_loss: Tensor, _f: Any, _g: Any, *arguments: Any) -> tuple[Any, ...]:
    problem, (_, _, *wanted) = read(arguments)
    shape = len(problem.coefficients), problem.weights[0].shape[0], 2
    status = grad_loss.new_empty(shape, dtype=torch.float64)
    return *_gradients(problem, *wanted), status


@torch.library.register_fake("otloss::plan_product", lib=ops.library)
def _(*arguments: Any) -> list[Tensor]:
    problem, (_, _, v) = read(arguments)
    rows = [problem.weights[i] for i in problem.pairs[::2]]
    return [x.new_empty(*a.shape, x.shape[2]) for a, x in zip(rows, v, strict=True)]


@torch.library.register_fake("otloss::plan_gap", lib=ops.library)
def _(*arguments: Any) -> tuple[list[Tensor], ...]:
    _, (f, g, _, _) = read(arguments)
    return *([torch.empty_like(v) for v in vs] for vs in (f, g)), [
        v.new_empty(len(v), 2) for v in f
    ]


@torch.library.register_fake("otloss::extend", lib=ops.library)
def _(*arguments: Any) -> list[Tensor]:
    problem, _ = read(arguments)
    return [torch.empty_like(problem.weights[i]) for i in problem.pairs[::2]]


@torch.library.register_fake("otloss::grid_means", lib=ops.library)
def _(axes: list[Tensor], eps: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(u)


@torch.library.register_fake("otloss::grid_solve", lib=ops.library)
def _(*arguments: Any) -> tuple[Any, ...]:
    _, _, weights, pairs, *_ = arguments
    status = weights[0].new_empty(len(pairs) // 2, len(weights[0]), 5, dtype=torch.float64)
    return status, *([torch.empty_like(weights[c]) for c in pairs[side::2]] for side in (0, 1))


@torch.library.register_fake("otloss::grid_adjoint", lib=ops.library)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    a, b = arguments[3:5]
    return torch.empty_like(a), torch.empty_like(b), a.new_empty(len(a), 2)
