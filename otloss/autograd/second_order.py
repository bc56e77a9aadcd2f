"""Second derivatives: the gradient as a node, whose own gradient is made in plain torch.

Costs and the solution are nodes there, functions of what the solve was given; torch differentiates
everything else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from otloss import _check
from otloss import method as methods
from otloss._options import OBJECTIVES
from otloss.autograd.cost_matrices import CostMatrices
from otloss.autograd.empty_bins import FirstOrder, masks, some
from otloss.autograd.first_order import gradients, of_clouds
from otloss.autograd.settings import Gradients, Inputs, Seeds, Settings, Wanted, mode
from otloss.costs import COSTS
from otloss.reference import operations
from otloss.reference.arguments import as_pairs
from otloss.reference.marginals import bordered, marginals_of, value
from otloss.reference.solver import fixed_iterations

__all__ = ["differentiable_gradients", "refuse_higher_order"]

_THIRD_ORDER = (
    "third derivatives of otloss losses are not available; autograd through "
    "otloss.reference.fixed_iterations has every order, for small problems"
)
_STREAMED = (
    'this derivative of method="streamed" needs cost matrices, here {size:.2g} GB, more than '
    'otloss.method.dense_budget: raise that or use method="dense"'
)


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


def differentiable_gradients(
    s: Settings, seeds: Seeds, inputs: Inputs, solution: Sequence[Tensor], wanted: Wanted
) -> Gradients:
    """As ``gradients``, for ``create_graph=True``.

    Of weights at empty bins there is no second derivative: asking for one raises.
    """
    weights = inputs.weights
    if s.places:
        empty = masks(s.places, weights, wanted.weights)
        weights = _first_order(weights, empty, False)
    parts = [seeds.loss], seeds.f, seeds.g, *inputs._replace(weights=weights), solution
    sizes = [len(part) for part in parts]
    found = iter(_Gradients.apply(s, wanted, sizes, *itertools.chain(*parts)))
    costs, points = ([next(found) for _ in each] for each in wanted[:2])
    of_weights = list(found)
    if s.places:
        of_weights = _first_order(of_weights, empty, True)
    return Gradients(costs, points, of_weights)


def _first_order(tensors: Sequence[Any], empty: Sequence[Tensor], given: bool) -> list[Any]:
    return [
        t if t is None or not there else FirstOrder.apply(t, e, given)
        for t, e, there in zip(tensors, empty, some(empty), strict=True)
    ]


class _Gradients(torch.autograd.Function):
    """``gradients`` as a node: by the kernels, and differentiated by way of ``_in_torch``."""

    @staticmethod
    def forward(ctx: Any, s: Settings, wanted: Wanted, sizes: list[int], *tensors: Tensor) -> Any:
        ctx.arguments = s, wanted, sizes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(itertools.chain(*gradients(s, *_parts(sizes, tensors), wanted)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        _check.not_batched(grads)
        s, wanted, sizes = ctx.arguments
        s = s._replace(places=None)  # what it fills in is constant here
        needed, again = ctx.needs_input_grad[3:], torch.is_grad_enabled()
        with torch.enable_grad():
            # Views: one input may have been computed from another.
            tensors = [
                t.view_as(t) if again else t.detach().requires_grad_(want)
                for t, want in zip(ctx.saved_tensors, needed, strict=True)
            ]
            made = itertools.chain(*_in_torch(s, *_parts(sizes, tensors), wanted))
            given = [
                (of, grad)
                for of, grad in zip(made, grads, strict=True)
                if of is not None and grad is not None and of.requires_grad
            ]
        result: list[Tensor | None] = [None] * len(tensors)
        if given:
            outputs, seeds = zip(*given, strict=True)
            wants = [k for k, want in enumerate(needed) if want]
            found = torch.autograd.grad(
                outputs, [tensors[k] for k in wants], seeds, create_graph=again, allow_unused=True
            )
            for k, grad in zip(wants, found, strict=True):
                result[k] = grad
        return None, None, None, *result


def _parts(sizes: list[int], tensors: Sequence[Tensor]) -> tuple[Seeds, Inputs, list[Tensor]]:
    rest = iter(tensors)
    (loss,), f, g, *inputs, solution = (list(itertools.islice(rest, size)) for size in sizes)
    return Seeds(loss, f, g), Inputs(*inputs), solution


def _in_torch(
    s: Settings, seeds: Seeds, inputs: Inputs, solution: Sequence[Tensor], wanted: Wanted
) -> Gradients:
    """As ``gradients``, differentiable."""
    P, points, pairs = len(s.coefficients), inputs.points, as_pairs(s.pairs)
    if points and not s.dense:
        size = sum(points[i].shape[1] * points[j].shape[1] for i, j in pairs)
        size *= points[0].shape[0] * points[0].element_size()
        if size > methods.budget(points[0].device):
            raise NotImplementedError(_STREAMED.format(size=size / 1e9))
    weights = inputs.weights
    # Those of 0 are in totals, and have no gradient there either.
    counts = [torch.where(w > 0, w, 0.0) for w in weights]
    costs = [C.expand(len(weights[0]), -1, -1) for C in inputs.costs]
    kind = COSTS[str(s.options.cost)] if points else 0
    own = [  # without dummies
        w[:, : x.shape[-2]].contiguous() for w, x in zip(weights, points, strict=False)
    ]
    if points:
        how = s.options.method
        costs = list(CostMatrices.apply(s.pairs, kind, how, len(points), *points, *own))
    whole = costs
    if costs[0].shape[1] < weights[pairs[0][0]].shape[1]:
        whole = [bordered(C, s.options.eps) for C in costs]
    problem = inputs._replace(costs=whole, points=[], weights=counts)
    of_costs, *of_sides = IN_TORCH[mode(s, seeds)](s, seeds, problem, solution)
    of_costs = [
        of_C[:, : C.shape[1], : C.shape[2]] for of_C, C in zip(of_costs, costs, strict=True)
    ]
    potentials = solution[:P], solution[P : 2 * P]
    of_weights = of_clouds(s, seeds, weights, potentials, of_sides, wanted.weights)
    of_points = list[Tensor]()
    if wanted.points:
        clouds = points, own, s.pairs, kind
        of_points = operations.cost_backward(of_costs, costs, *clouds, wanted.points)
    return Gradients([of_costs[p] for p in wanted.costs], of_points, of_weights)


OfPairs = tuple[list[Tensor], list[Tensor], list[Tensor]]  # of costs and both weights


def _envelope(s: Settings, seeds: Seeds, inputs: Inputs, solution: Sequence[Tensor]) -> OfPairs:
    problem = _at_solution(s, inputs, solution)
    costs, _, grad_a, grad_b = operations.envelope_backward(seeds.loss, *problem)
    return costs, grad_a, grad_b


def _implicit(s: Settings, seeds: Seeds, inputs: Inputs, solution: Sequence[Tensor]) -> OfPairs:
    problem = _at_solution(s, inputs, solution)
    costs, _, grad_a, grad_b, _ = operations.implicit_backward(*seeds, *problem)
    return costs, grad_a, grad_b


def _at_solution(s: Settings, inputs: Inputs, solution: Sequence[Tensor]) -> tuple[Any, ...]:
    """The arguments of an operation on the solution, which is a function of the problem."""
    P = len(inputs.costs)
    both = Potentials.apply(s, P, *inputs.costs, *inputs.weights, *solution[: 2 * P])
    return *s.arguments(inputs), list(both[:P]), list(both[P:]), list(range(P)), [], True


def _unrolled(s: Settings, seeds: Seeds, inputs: Inputs, solution: Sequence[Tensor]) -> OfPairs:
    """By autograd through the iterations, at the memory of all of them."""
    o, found = s.options, []
    objective = OBJECTIVES.index(o.objective)
    for p, (i, j) in enumerate(as_pairs(s.pairs)):
        C, a, b = (
            t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in (inputs.costs[p], inputs.weights[i], inputs.weights[j])
        )
        start = inputs.init[2 * p + 1] if inputs.init else torch.zeros_like(b)
        marginals = marginals_of(o.rho_x, o.rho_y, i, j)
        f, g = fixed_iterations(C, a, b, start, o.eps, o.n_iters, marginals)[:2]
        scale = s.coefficients[p] * seeds.of_value(p)
        total = (scale * value(o.eps, C, f, g, a, b, objective, marginals)).sum()
        if seeds.f:
            total = total + (seeds.f[p] * f).sum() + (seeds.g[p] * g).sum()
        found.append(torch.autograd.grad(total, (C, a, b), create_graph=True))
    costs, grad_a, grad_b = (list(each) for each in zip(*found, strict=True))
    return costs, grad_a, grad_b


# Each mode in plain torch: gradients of all costs, and of both weights of every pair.
IN_TORCH: Final = {"envelope": _envelope, "implicit": _implicit, "unrolled": _unrolled}


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
        costs, weights, solution = (
            [t.detach().contiguous() for t in part]
            for part in (saved[:P], saved[P : -2 * P], saved[-2 * P :])
        )
        # By the optimality conditions, and with no part of the value in it.
        options = ctx.settings.options._replace(objective="regularized", backward="implicit")
        s = ctx.settings._replace(options=options, places=None)
        given = [grad.detach().contiguous() for grad in grads]
        seeds = Seeds(given[0].new_zeros(given[0].shape[0]), given[:P], given[P:])
        wanted = Wanted(list(range(P)), [], [True] * len(weights))
        found = gradients(s, seeds, Inputs(costs, [], weights, []), solution, wanted)
        grads_of = [*found.costs, *(grad for grad in found.weights if grad is not None)]
        refused = refuse_higher_order(grads_of, [*saved, *grads], _THIRD_ORDER)
        return None, None, *refused, *[None] * (2 * P)
