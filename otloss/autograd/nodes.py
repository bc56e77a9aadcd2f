"""The nodes that a loss or a result hangs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otloss import _check, ops
from otloss import method as methods
from otloss.autograd import empty_bins
from otloss.autograd.failed import failed, marked
from otloss.autograd.first_order import gradients
from otloss.autograd.second_order import CostGradient, refuse_higher_order, solve_gradient
from otloss.autograd.settings import (
    Inputs,
    Places,
    Seeds,
    Settings,
    Wanted,
    batched,
    implementation,
    is_envelope,
    unbatched,
)
from otloss.costs import COSTS
from otloss.reference.operations import as_pairs

__all__ = ["CostMatrices", "Solve", "evaluate"]

_STREAMED = (
    'this derivative of method="streamed" needs cost matrices, here {size:.2g} GB, more than '
    'otloss.method.dense_budget: raise that or use method="dense"'
)


class CostMatrices(torch.autograd.Function):
    """``(pairs, kind, method, clouds, *points, *weights) -> costs``, (B, n, m) per pair.

    ``points`` are (n, d) or (B, n, d) of any float dtype; their gradients come back in it.
    ``weights`` (B, n), if given, only say which points are padding.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        # Unpacked here, because torch.compile leaves `ctx` out of the call of a function that has
        # as many parameters as there are arguments, and *tensors is one parameter.
        pairs, kind, method, clouds, *tensors = arguments
        points = [batched(x) for x in tensors[:clouds]]
        costs = implementation(method).cost(points, list(tensors[clouds:]), pairs, kind)
        ctx.pairs, ctx.kind, ctx.method, ctx.clouds = pairs, kind, method, clouds
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *costs)
        return tuple(costs)

    @staticmethod
    def backward(ctx: Any, *grad_costs: Tensor | None) -> Any:
        _check.not_batched(grad_costs)
        saved = ctx.saved_tensors
        tensors, costs = saved[: len(saved) - len(grad_costs)], saved[-len(grad_costs) :]
        inputs, weights = tensors[: ctx.clouds], list(tensors[ctx.clouds :])
        given = [p for p, grad in enumerate(grad_costs) if grad is not None]
        pairs = [c for p in given for c in ctx.pairs[2 * p : 2 * p + 2]]
        wanted = [c for c in range(ctx.clouds) if ctx.needs_input_grad[4 + c] and c in pairs]
        result: list[Tensor | None] = [None] * len(tensors)
        if wanted:
            points = [batched(x) for x in inputs]
            grads = _points_gradient(
                [grad for grad in grad_costs if grad is not None],
                [costs[p].detach() for p in given],
                points,
                weights,
                pairs,
                ctx.kind,
                ctx.method,
                wanted,
            )
            for c, grad in zip(wanted, grads, strict=True):
                result[c] = unbatched(grad, inputs[c])
        return None, None, None, None, *result


def _points_gradient(
    grad_costs: Sequence[Tensor],
    costs: Sequence[Tensor],
    points: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    kind: int,
    method: str,
    wanted: list[int],
) -> Sequence[Tensor]:
    """Gradients of the wanted clouds; differentiable where a graph is being made."""
    grad_costs = [grad.contiguous() for grad in grad_costs]
    if torch.is_grad_enabled():
        sizes = [len(part) for part in (points, weights, costs, grad_costs)]
        tensors = (*points, *weights, *costs, *grad_costs)
        return CostGradient.apply(pairs, kind, method, wanted, sizes, *tensors)
    return implementation(method).cost_backward(
        grad_costs, list(costs), points, weights, pairs, kind, wanted
    )


class Solve(torch.autograd.Function):
    """``(settings, sizes, *costs, *points, *weights, *init) -> (loss, status)``, or with
    ``settings.potentials`` ``(loss, status, *f, *g)``. Without ``settings.combined`` the terms of
    the loss, (P, B) in float64, are in its place.

    ``costs`` (B, n, m) one per pair, or ``points`` (n, d) or (B, n, d) one per cloud; ``weights``
    (B, n) one per cloud; ``init`` potentials f, g of each pair in turn or nothing; ``sizes`` counts
    each. ``loss`` (B,) or (), ``status`` (P, B, 5) as in ``otloss.ops``.

    From points and without ``settings.dense`` no cost matrix is stored, and first derivatives make
    none. Second derivatives need them.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, sizes: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, solution = evaluate(settings, sizes, tensors)
        ctx.settings, ctx.sizes = settings, sizes
        ctx.failed = failed(settings, outputs[0], tensors[sum(sizes[:2])].dtype)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[1])
        seen = settings.places.costs if settings.places else []
        # The inputs themselves, not their contiguous copies: these know where they came from.
        ctx.save_for_backward(*tensors, *solution, *(seen[p] for p in settings.live if seen))
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None, *grad_potentials: Any) -> Any:
        _check.not_batched((grad_loss, *grad_potentials))
        s, needed, saved = ctx.settings, ctx.needs_input_grad[2:], ctx.saved_tensors
        result: list[Tensor | None] = [None] * len(needed)
        given, points, weights, *_ = ctx.sizes
        inputs = _inputs(saved[: len(needed)], ctx.sizes)
        seeds = _seeds(s, inputs.weights, grad_loss, grad_potentials)
        if seeds is None:
            return None, None, *result
        live, solution = s.live, saved[len(needed) :]
        s, seeds, inputs = s.of_live(), seeds.of_pairs(live), inputs.of_pairs(live)
        if s.places:
            kept = len(solution) - len(inputs.costs)
            solution, seen = solution[:kept], list(solution[kept:])
            s = s._replace(places=Places(seen, inputs.points, inputs.init, s.places.present))
        if points and s.dense:
            P = len(live)
            solution, made = solution[:-P], list(solution[-P:])
            if not is_envelope(s, seeds):  # the others read contiguous ones
                made = [C.contiguous() for C in made]
            inputs = Inputs(made, *inputs[1:])
        first_weight = given + points
        wanted = Wanted(
            [k for k, p in enumerate(live) if given and needed[p]],
            [c for c in range(points) if needed[given + c]],
            list(needed[first_weight : first_weight + weights]),
        )
        if torch.is_grad_enabled():
            found = _differentiable(s, seeds, inputs, solution, wanted)
        else:
            found = gradients(s, seeds, inputs, solution, wanted)
        if ctx.failed is not None:
            found = marked(ctx.failed, inputs.weights, wanted, *found)
        of_costs, of_points, of_weights = found
        for k, grad in zip(wanted.costs, of_costs, strict=True):
            result[live[k]] = grad
        for c, grad in zip(wanted.points, of_points, strict=True):
            result[given + c] = unbatched(grad, saved[given + c])
        result[first_weight : first_weight + weights] = of_weights
        return None, None, *result


def evaluate(
    s: Settings, sizes: list[int], tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What ``Solve`` returns, without a node, and what its backward pass needs of the pairs that a
    gradient flows through: (*f, *g, *traces, *made)."""
    inputs, o = _inputs(tensors, sizes), s.options
    loss, status, f, g, traces, made = implementation(o.method).solve(
        *s.arguments(inputs),
        inputs.init,
        ops.number(o.tol),
        o.max_iters,
        o.n_iters,
        s.trace,
        s.dense,
        s.target.solution if s.target else None,
    )
    if s.target:
        s.target.keep(f[-1], status[-1])
    if s.potentials and o.balanced() and o.n_iters < 0:
        f, g = _centred(s, inputs.weights, f, g)
    if not s.combined:
        loss = status[..., ops.TERM].clone()
    elif not s.batched:
        loss = loss[0]
    outputs = loss, status
    solution = tuple(each[p] for each in (f, g, traces, made) if each for p in s.live)
    return (*outputs, *f, *g) if s.potentials else outputs, solution


def _inputs(tensors: Sequence[Tensor], sizes: list[int]) -> Inputs:
    """As the operations take them."""
    points, weights = sizes[0], sizes[0] + sizes[1]
    init = weights + sizes[2]
    return Inputs(
        [C.contiguous() for C in tensors[:points]],
        [batched(x) for x in tensors[points:weights]],
        [w.contiguous() for w in tensors[weights:init]],
        [v.contiguous() for v in tensors[init:]],
    )


def _seeds(
    s: Settings,
    weights: Sequence[Tensor],
    grad_loss: Tensor | None,
    grad_potentials: Sequence[Tensor | None],
) -> Seeds | None:
    """Gradients of the loss and, if there are any, of every f and every g; None for nothing."""
    through = any(grad is not None for grad in grad_potentials)
    if grad_loss is None and not through:
        return None
    if through and s.backward == "envelope":
        raise NotImplementedError(
            'backward="envelope" has gradients of `value` only; potentials, plans and what '
            'depends on them need backward="auto", "implicit" or, with n_iters, "unrolled"'
        )
    if grad_loss is None:
        grad_loss = weights[0].new_zeros(weights[0].shape[0])
    if s.combined:
        grad_loss = grad_loss.reshape(-1)
    given: list[Tensor] = []
    if through:
        like = [weights[c] for c in (*s.pairs[::2], *s.pairs[1::2])]
        given = [
            torch.zeros_like(w) if grad is None else grad.contiguous()
            for grad, w in zip(grad_potentials, like, strict=True)
        ]
    half, dtype = len(given) // 2, weights[0].dtype
    if grad_loss.dtype != dtype:  # a call that changes nothing takes 1% of a small loss
        grad_loss = grad_loss.to(dtype)
    return Seeds(grad_loss.contiguous(), given[:half], given[half:])


def _centred(
    s: Settings, weights: list[Tensor], f: list[Tensor], g: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same solution with <a, f> = <b, g>: of (f + t, g - t), all solutions, one is returned."""
    all_f, all_g = [], []
    for p, (i, j) in enumerate(as_pairs(s.pairs)):
        a, b = weights[i], weights[j]
        excess = (b * g[p]).sum(-1, True) - (a * f[p]).sum(-1, True)
        shift = excess / (a.sum(-1, True) + b.sum(-1, True))
        all_f.append(torch.where(a > 0, f[p] + shift, 0.0))
        all_g.append(torch.where(b > 0, g[p] - shift, 0.0))
    return all_f, all_g


# --------------------------------------------------------------------------- as nodes of a graph


def _differentiable(
    s: Settings, seeds: Seeds, inputs: Inputs, solution: Sequence[Tensor], wanted: Wanted
) -> tuple[Sequence[Tensor], Sequence[Tensor], list[Tensor | None]]:
    """As ``gradients``, for ``create_graph=True``: gradients that are nodes of a graph."""
    if s.places:
        return _beside_empty_bins(s, s.places, seeds, inputs, solution, wanted)
    return _as_nodes(s, seeds, inputs, solution, wanted)


def _beside_empty_bins(
    s: Settings,
    places: Places,
    seeds: Seeds,
    inputs: Inputs,
    solution: Sequence[Tensor],
    wanted: Wanted,
) -> tuple[Sequence[Tensor], Sequence[Tensor], list[Tensor | None]]:
    """Of weights at empty bins there is no second derivative: asking for one raises."""
    weights = inputs.weights
    empty = empty_bins.masks(places, weights, [w.requires_grad for w in weights])
    has = empty_bins.some(empty)

    def first_order(t: Tensor, c: int, *, given: bool) -> Tensor:
        return empty_bins.FirstOrder.apply(t, empty[c], given) if has[c] else t

    held = [first_order(w, c, given=False) for c, w in enumerate(weights)]
    inputs = inputs._replace(weights=held)
    of_costs, of_points, of_weights = _as_nodes(s, seeds, inputs, solution, wanted)
    kept = [
        None if grad is None else first_order(grad, c, given=True)
        for c, grad in enumerate(of_weights)
    ]
    return of_costs, of_points, kept


def _as_nodes(
    s: Settings, seeds: Seeds, inputs: Inputs, solution: Sequence[Tensor], wanted: Wanted
) -> tuple[Sequence[Tensor], Sequence[Tensor], list[Tensor | None]]:
    if not inputs.points:
        of_costs, of_weights = solve_gradient(s, seeds, inputs, solution, wanted)
        return of_costs, [], of_weights
    size = _dense_bytes(s, inputs.points)
    if not s.dense and size > methods.budget(inputs.points[0].device):
        return _first_order_only(s, seeds, inputs, solution, wanted, size)
    points, weights, pairs = inputs.points, inputs.weights, as_pairs(s.pairs)
    kind, method = COSTS[str(s.options.cost)], s.options.method
    costs = list(CostMatrices.apply(s.pairs, kind, method, len(points), *points, *weights))
    through = [p for p, (i, j) in enumerate(pairs) if i in wanted.points or j in wanted.points]
    of_costs, of_weights = solve_gradient(
        s,
        seeds,
        inputs._replace(costs=costs, points=[]),
        solution,
        Wanted(through, [], wanted.weights),
    )
    if not wanted.points:
        return [], [], of_weights
    of_points = _points_gradient(
        of_costs,
        [costs[p].detach() for p in through],
        points,
        weights,
        [c for p in through for c in pairs[p]],
        kind,
        method,
        wanted.points,
    )
    return [], of_points, of_weights


def _first_order_only(
    s: Settings,
    seeds: Seeds,
    inputs: Inputs,
    solution: Sequence[Tensor],
    wanted: Wanted,
    size: int,
) -> tuple[Sequence[Tensor], Sequence[Tensor], list[Tensor | None]]:
    """Gradients without cost matrices, of which a further derivative raises."""
    solution = [t.detach() for t in solution]
    _, of_points, of_weights = gradients(s, seeds, inputs, solution, wanted)
    given = [*of_points, *(grad for grad in of_weights if grad is not None)]
    sources = (*inputs.points, *inputs.weights, seeds.loss, *seeds.f, *seeds.g)
    refused = iter(refuse_higher_order(given, sources, _STREAMED.format(size=size / 1e9)))
    of_points = [next(refused) for _ in of_points]
    return [], of_points, [None if grad is None else next(refused) for grad in of_weights]


def _dense_bytes(s: Settings, points: Sequence[Tensor]) -> int:
    """What the cost matrices of all pairs take, stored."""
    sizes = [points[i].shape[1] * points[j].shape[1] for i, j in as_pairs(s.pairs)]
    return sum(sizes) * points[0].shape[0] * points[0].element_size()
