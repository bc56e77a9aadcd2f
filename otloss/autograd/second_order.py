"""Second derivatives: gradients as nodes of a graph.

The forward of a node here is the operation that computes the gradient. Its backward repeats the
gradient in plain torch and differentiates that. Third derivatives raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otloss import reference
from otloss._options import OBJECTIVES
from otloss.autograd.first_order import gradients, sum_over_pairs
from otloss.autograd.settings import (
    Inputs,
    Seeds,
    Settings,
    Wanted,
    implementation,
    is_envelope,
)
from otloss.reference import operations
from otloss.reference.operations import as_pairs

__all__ = ["CostGradient", "SolveGradient", "refuse_higher_order", "split"]


def refuse_higher_order(
    grads: list[Tensor], inputs: Sequence[Tensor], message: str
) -> list[Tensor]:
    """Gradients whose own derivative raises, when a graph of the pass is being made."""
    if not torch.is_grad_enabled():
        return grads
    return list(_Refuse.apply(message, len(grads), *grads, *inputs))


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(ctx.message)


_THIRD_ORDER = (
    "third derivatives of otloss losses are not available; autograd through "
    "otloss.reference.fixed_iterations has every order, for small problems"
)


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def _vector_jacobian(
    outputs: list[Tensor],
    inputs: list[Tensor],
    grads: Sequence[Tensor | None],
    sources: Sequence[Tensor],
) -> list[Tensor | None]:
    """d(sum of <output, grad>)/d(inputs), where an output and its gradient both exist."""
    given = [
        (out, grad)
        for out, grad in zip(outputs, grads, strict=True)
        if grad is not None and out.requires_grad
    ]
    if not given:
        return [None] * len(inputs)
    results = torch.autograd.grad(
        [out for out, _ in given], inputs, [grad.detach() for _, grad in given], allow_unused=True
    )
    found = [r for r in results if r is not None]
    graph = [g for g in grads if g is not None]
    kept = iter(refuse_higher_order(found, [*sources, *graph], _THIRD_ORDER))
    return [None if r is None else next(kept) for r in results]


# ------------------------------------------------------------------------------ of cost matrices


class CostGradient(torch.autograd.Function):
    """The gradient of ``CostMatrices``, differentiable in the points and in ``grad_costs``.

    ``(pairs, kind, method, want_points, sizes, *points, *weights, *costs, *grad_costs)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pairs: list[int],
        kind: int,
        method: str,
        want_points: list[int],
        sizes: list[int],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        points, weights, costs, grad_costs = split(tensors, sizes)
        ctx.arguments = pairs, kind, method, want_points, sizes
        ctx.save_for_backward(*tensors)
        return tuple(
            implementation(method).cost_backward(
                grad_costs, costs, points, weights, pairs, kind, want_points
            )
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        pairs, kind, method, want_points, sizes = ctx.arguments
        saved = ctx.saved_tensors
        weights = split(saved, sizes)[1]
        with torch.enable_grad():
            leaves = _leaves(saved)
            points, _, costs, grad_costs = split(leaves, sizes)
            counted = reference.without_padding(points, weights)
            outputs = _cost_gradients(counted, costs, grad_costs, pairs, kind)
        inputs = [*points, *costs, *grad_costs]
        found = _vector_jacobian([outputs[c] for c in want_points], inputs, grads, saved)
        P = len(costs)
        of_points, of_costs, of_grads = found[: -2 * P], found[-2 * P : -P], found[-P:]
        given = [p for p in range(P) if of_costs[p] is not None]
        if given:  # the costs are functions of the points
            through = implementation(method).cost_backward(
                [of_costs[p] for p in given],
                [costs[p].detach() for p in given],
                [x.detach() for x in points],
                weights,
                [c for p in given for c in pairs[2 * p : 2 * p + 2]],
                kind,
                list(range(len(points))),
            )
            of_points = [b if a is None else a + b for a, b in zip(of_points, through, strict=True)]
        return None, None, None, None, None, *of_points, *[None] * (len(weights) + P), *of_grads


def _cost_gradients(
    points: list[Tensor], costs: list[Tensor], grad_costs: list[Tensor], pairs: list[int], kind: int
) -> list[Tensor]:
    """The gradient of every cloud by products that autograd knows."""
    totals = [torch.zeros_like(x) for x in points]
    for (i, j), C, W in zip(as_pairs(pairs), costs, grad_costs, strict=True):
        grad_x, grad_y = reference.cost_gradient(W, C, points[i], points[j], kind)
        totals[i] = totals[i] + grad_x
        totals[j] = totals[j] + grad_y
    return totals


# ------------------------------------------------------------------------------------ of a solve


def split(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(tensors[start : start + size]))
        start += size
    return parts


def solve_gradient(
    s: Settings, seeds: Seeds, inputs: Inputs, solution: Sequence[Tensor], wanted: Wanted
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Of the wanted costs and of every cloud's weights where wanted, as nodes of a graph."""
    parts: list[list[Tensor]] = [[seeds.loss], seeds.f, seeds.g]
    parts += [inputs.costs, inputs.weights, inputs.init, [t.detach() for t in solution]]
    tensors = [t for part in parts for t in part]
    found = iter(SolveGradient.apply(s, [len(part) for part in parts], wanted, *tensors))
    costs = [next(found) for _ in wanted.costs]
    return costs, [next(found) if w else None for w in wanted.weights]


class SolveGradient(torch.autograd.Function):
    """The gradient of ``Solve`` on cost matrices: ``(settings, sizes, wanted, *tensors)``."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, sizes: list[int], wanted: Wanted, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.settings, ctx.sizes, ctx.wanted = settings, sizes, wanted
        ctx.save_for_backward(*tensors)
        seeds, inputs, solution = _parts(tensors, sizes)
        costs, _, weights = gradients(settings, seeds, inputs, solution, wanted)
        return tuple(g.clone() for g in (*costs, *weights) if g is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        s, saved, sizes, wanted = ctx.settings, ctx.saved_tensors, ctx.sizes, ctx.wanted
        variable = sum(sizes[:5])  # the rest, start and solution, follow from the inputs
        with torch.enable_grad():
            leaves = _leaves(saved[:variable])
            parts = _parts([*leaves, *saved[variable:]], sizes)
            repeat = _unrolled_in_torch if s.backward == "unrolled" else _implicit_in_torch
            costs, grad_a, grad_b = repeat(s, *parts)
            weights = sum_over_pairs(s.pairs, grad_a, grad_b, wanted.weights)
            outputs = [costs[p] for p in wanted.costs]
            outputs += [grad for grad in weights if grad is not None]
        result = _vector_jacobian(outputs, leaves, grads, saved)
        first = sum(sizes[:4])
        for k in range(first, first + sizes[4]):  # weights, where those of 0 are in the totals
            grad = result[k]
            result[k] = None if grad is None else torch.where(saved[k] > 0, grad, 0.0)
        return None, None, None, *result, *[None] * (len(saved) - variable)


def _parts(tensors: Sequence[Tensor], sizes: list[int]) -> tuple[Seeds, Inputs, list[Tensor]]:
    loss, f, g, costs, weights, init, solution = split(tensors, sizes)
    return Seeds(loss[0], f, g), Inputs(costs, [], weights, init), solution


def _unrolled_in_torch(
    s: Settings, seeds: Seeds, inputs: Inputs, solution: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The unrolled gradient by autograd through the iterations, at the memory of all of them."""
    costs, _, weights, init = inputs
    o = s.options
    eps, objective = o.eps, OBJECTIVES.index(o.objective)
    results: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for p, (i, j) in enumerate(as_pairs(s.pairs)):
        C, a, b = (t.view_as(t) for t in (costs[p], weights[i], weights[j]))
        start = init[2 * p + 1] if init else torch.zeros_like(b)
        marginals = reference.marginals_of(o.rho_x, o.rho_y, i, j)
        f, g = reference.fixed_iterations(C, a, b, start, eps, o.n_iters, marginals)[:2]
        value = reference.value(eps, C, f, g, a, b, objective, marginals)
        total = (s.coefficients[p] * seeds.of_value(p) * value).sum()
        if seeds.f:
            total = total + (seeds.f[p] * f).sum() + (seeds.g[p] * g).sum()
        for result, grad in zip(
            results, torch.autograd.grad(total, (C, a, b), create_graph=True), strict=True
        ):
            result.append(grad)
    return results


def _implicit_in_torch(
    s: Settings, seeds: Seeds, inputs: Inputs, solution: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The envelope or implicit gradient as a formula in the potentials, which are functions too."""
    P = len(inputs.costs)
    both = Potentials.apply(s, P, *inputs.costs, *inputs.weights, *solution[: 2 * P])
    f, g, every = list(both[:P]), list(both[P:]), list(range(P))
    problem: tuple[Any, ...] = (*s.arguments(inputs), f, g, every, [], True)
    if is_envelope(s, seeds):
        costs, _, grad_a, grad_b = operations.envelope_backward(seeds.loss, *problem)
    else:
        costs, _, grad_a, grad_b, _ = operations.implicit_backward(*seeds, *problem)
    return costs, grad_a, grad_b


class Potentials(torch.autograd.Function):
    """The solution as a function of the problem: returns the potentials given, with their gradient.

    ``(settings, problems, *costs, *weights, *f, *g) -> (*f, *g)``
    """

    @staticmethod
    def forward(ctx: Any, settings: Settings, problems: int, *tensors: Tensor) -> Any:
        ctx.settings, ctx.problems = settings, problems
        ctx.save_for_backward(*tensors)
        return tuple(t.clone() for t in tensors[-2 * problems :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        P, saved = ctx.problems, ctx.saved_tensors
        clouds = len(saved) - 3 * P
        s = ctx.settings
        # By the optimality conditions, and with no part of the value in it.
        options = s.options._replace(objective="regularized")
        s = s._replace(backward="implicit", options=options, places=None)
        costs, weights, solution = split(saved, [P, clouds, 2 * P])
        given = [grad.contiguous() for grad in grads]
        seeds = Seeds(saved[0].new_zeros(saved[0].shape[0]), given[:P], given[P:])
        wanted = Wanted(list(range(P)), [], [True] * clouds)
        of_costs, _, of_weights = gradients(
            s, seeds, Inputs(costs, [], weights, []), solution, wanted
        )
        return None, None, *of_costs, *of_weights, *[None] * (2 * P)
