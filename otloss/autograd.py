"""The differentiable operations, each a ``torch.autograd.Function`` over the registered ones.

``CostMatrices`` turns clouds into cost matrices and ``Solve`` turns cost matrices and weights into
values and potentials: a callable cost or a given matrix enters ``Solve`` directly. ``SolvePoints``
is both in one, for the named costs, with cost matrices or without.

The backward passes are functions of their own, ``CostGradient`` and ``SolveGradient``, so that they
can be differentiated again: their forward is the native kernel, their backward repeats the gradient
in plain torch and differentiates that. It costs nothing unless a second derivative is asked for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otloss import _check, ops, reference, schedule

__all__ = ["CostMatrices", "Settings", "Solve", "SolvePoints"]


class Settings(NamedTuple):
    """What a solve is told besides tensors, as plain values that the tracer understands."""

    pairs: list[int]  # flat: [i0, j0, i1, j1, ...]
    coefficients: list[float]  # the loss is the sum of coefficient * value over the pairs
    eps: float
    rho_x: float
    rho_y: float
    tol: float
    max_iters: int
    n_iters: int  # -1: until converged
    objective: int
    backward: str
    plain: bool  # method="reference"
    potentials: bool  # whether f and g are differentiable outputs: for results, not for losses
    trace: bool  # keep the potentials of every iteration, for backward="unrolled"
    dense: bool  # store the cost matrices
    batched: bool  # the loss is (B,), not ()
    tf32: bool = False  # allows inner products with 11 bits, where costs are not stored
    system: list[Tensor] | None = None  # receives the status of the implicit gradient's system

    @property
    def balanced(self) -> bool:
        return math.isinf(self.rho_x) and math.isinf(self.rho_y)

    @property
    def solver(self) -> tuple[float, float, float, float, int, int, int, bool]:
        """What the operations that solve take last."""
        limits = (self.tol, self.max_iters, self.n_iters)
        return (self.eps, self.rho_x, self.rho_y, *limits, self.objective, self.trace)


def _implementation(plain: bool) -> ModuleType:
    return reference if plain else ops


def _refuse_higher_order(
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
_STREAMED = (
    'this derivative of method="streamed" needs cost matrices, here {size:.2g} GB, more than '
    'otloss.schedule.dense_budget: raise that or use method="dense"'
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
    kept = iter(_refuse_higher_order(found, [*sources, *graph], _THIRD_ORDER))
    return [None if r is None else next(kept) for r in results]


# ------------------------------------------------------------------------------- cost matrices


def _batched(x: Tensor) -> Tensor:
    """(B, n, d), contiguous, in the dtype that is computed in."""
    if x.dim() == 2:
        x = x.unsqueeze(0)
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return x.contiguous()


class CostMatrices(torch.autograd.Function):
    """``(pairs, kind, plain, clouds, *points, *weights) -> costs``, (B, n, m) per pair.

    ``points`` are (n, d) or (B, n, d) of any float dtype; their gradients come back in it.
    ``weights`` (B, n), if given, only say which points are padding.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        # Unpacked here, because torch.compile leaves `ctx` out of the call of a function that has
        # as many parameters as there are arguments, and *tensors is one parameter.
        pairs, kind, plain, clouds, *tensors = arguments
        points = [_batched(x) for x in tensors[:clouds]]
        costs = _implementation(plain).cost(points, list(tensors[clouds:]), pairs, kind)
        ctx.pairs, ctx.kind, ctx.plain, ctx.clouds = pairs, kind, plain, clouds
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *costs)
        return tuple(costs)

    @staticmethod
    def backward(ctx: Any, *grad_costs: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        tensors, costs = saved[: len(saved) - len(grad_costs)], saved[-len(grad_costs) :]
        inputs, weights = tensors[: ctx.clouds], list(tensors[ctx.clouds :])
        given = [p for p, grad in enumerate(grad_costs) if grad is not None]
        pairs = [c for p in given for c in ctx.pairs[2 * p : 2 * p + 2]]
        wanted = [c for c in range(ctx.clouds) if ctx.needs_input_grad[4 + c] and c in pairs]
        result: list[Tensor | None] = [None] * len(tensors)
        if wanted:
            points = [_batched(x) for x in inputs]
            grads = _points_gradient(
                [grad for grad in grad_costs if grad is not None],
                [costs[p].detach() for p in given],
                points,
                weights,
                pairs,
                ctx.kind,
                ctx.plain,
                wanted,
            )
            for c, grad in zip(wanted, grads, strict=True):
                result[c] = grad.view_as(inputs[c]).to(inputs[c].dtype)
        return None, None, None, None, *result


def _points_gradient(
    grad_costs: Sequence[Tensor],
    costs: Sequence[Tensor],
    points: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    kind: int,
    plain: bool,
    wanted: list[int],
) -> Sequence[Tensor]:
    """Gradients of the wanted clouds; differentiable where a graph is being made."""
    grad_costs = [grad.contiguous() for grad in grad_costs]
    if torch.is_grad_enabled():
        tensors = (*points, *weights, *costs, *grad_costs)
        return CostGradient.apply(pairs, kind, plain, wanted, len(points), len(weights), *tensors)
    return _implementation(plain).cost_backward(
        grad_costs, list(costs), points, weights, pairs, kind, wanted
    )


class CostGradient(torch.autograd.Function):
    """The gradient of ``CostMatrices``, differentiable in the points and in ``grad_costs``.

    ``(pairs, kind, plain, wanted, clouds, weighted, *points, *weights, *costs, *grad_costs)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pairs: list[int],
        kind: int,
        plain: bool,
        wanted: list[int],
        clouds: int,
        weighted: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        points, weights = tensors[:clouds], tensors[clouds : clouds + weighted]
        half = clouds + weighted + len(pairs) // 2
        costs, grad_costs = tensors[clouds + weighted : half], tensors[half:]
        ctx.arguments = pairs, kind, plain, wanted
        ctx.sizes = clouds, weighted
        ctx.save_for_backward(*points, *weights, *grad_costs)
        return tuple(
            _implementation(plain).cost_backward(
                list(grad_costs), list(costs), list(points), list(weights), pairs, kind, wanted
            )
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        pairs, kind, plain, wanted = ctx.arguments
        clouds, weighted = ctx.sizes
        saved, problems = ctx.saved_tensors, len(pairs) // 2
        weights = saved[clouds : clouds + weighted]
        with torch.enable_grad():
            points, grad_costs = _leaves(saved[:clouds]), _leaves(saved[clouds + weighted :])
            costs = CostMatrices.apply(pairs, kind, plain, clouds, *points, *weights)
            counted = reference.without_padding(points, list(weights))
            outputs = _cost_gradients(counted, list(costs), grad_costs, pairs, kind)
        result = _vector_jacobian(
            [outputs[c] for c in wanted], [*points, *grad_costs], grads, saved
        )
        nothing = [None] * (weighted + problems)
        return None, None, None, None, None, None, *result[:clouds], *nothing, *result[clouds:]


def _cost_gradients(
    points: list[Tensor], costs: list[Tensor], grad_costs: list[Tensor], pairs: list[int], kind: int
) -> list[Tensor]:
    """The gradient of every cloud by products that autograd knows."""
    totals = [torch.zeros_like(x) for x in points]
    for (i, j), C, W in zip(reference.as_pairs(pairs), costs, grad_costs, strict=True):
        grad_x, grad_y = reference.cost_gradient(W, C, points[i], points[j], kind)
        totals[i] = totals[i] + grad_x
        totals[j] = totals[j] + grad_y
    return totals


# --------------------------------------------------------------------------------------- solve


class Solve(torch.autograd.Function):
    """``(settings, problems, clouds, *costs, *weights, *init) -> (loss, status, *f, *g)``.

    ``costs`` (B, n, m) one per pair, ``weights`` (B, n) one per cloud, ``init`` potentials f, g of
    each pair in turn or nothing. ``loss`` (B,) or (), ``status`` (P, B, 4) as in ``otloss.ops``.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, problems: int, clouds: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        s = settings
        costs = [C.contiguous() for C in tensors[:problems]]
        weights = [w.contiguous() for w in tensors[problems : problems + clouds]]
        init = [v.contiguous() for v in tensors[problems + clouds :]]
        loss, status, f, g, traces = _implementation(s.plain).solve(
            costs, weights, s.pairs, s.coefficients, init, *s.solver
        )
        if s.potentials and s.balanced and s.n_iters < 0:
            f, g = _centred(s, weights, f, g)
        ctx.settings, ctx.problems, ctx.clouds = s, problems, clouds
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([status] if s.potentials else [status, *f, *g]))
        # The inputs themselves, not their contiguous copies: these know where they came from.
        ctx.save_for_backward(*tensors, *f, *g, *traces)
        return loss if s.batched else loss[0], status, *f, *g

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None, *grad_potentials: Any) -> Any:
        s, P, clouds = ctx.settings, ctx.problems, ctx.clouds
        result: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 3)
        saved, inputs = ctx.saved_tensors, len(result)
        weights = saved[P : P + clouds]
        seeds = _seeds(s, weights, grad_loss, grad_potentials)
        if seeds is None:
            return None, None, None, *result
        want = [int(wanted) for wanted in ctx.needs_input_grad[3 : 3 + P + clouds]]
        grads = _solve_gradient(
            s, seeds, saved[:P], weights, saved[P + clouds : inputs], saved[inputs:], want
        )
        for k, grad in zip([k for k, w in enumerate(want) if w], grads, strict=True):
            result[k] = grad
        return None, None, None, *result


def _seeds(
    s: Settings,
    weights: Sequence[Tensor],
    grad_loss: Tensor | None,
    grad_potentials: Sequence[Tensor | None],
) -> list[Tensor] | None:
    """Gradients of the loss and, if there are any, of every f and every g; None for nothing."""
    through = s.potentials and any(grad is not None for grad in grad_potentials)
    if grad_loss is None and not through:
        return None
    if through and s.backward == "envelope":
        raise NotImplementedError(
            'backward="envelope" has gradients of `value` only; potentials, plans and what '
            'depends on them need backward="auto", "implicit" or, with n_iters, "unrolled"'
        )
    if grad_loss is None:
        grad_loss = weights[0].new_zeros(weights[0].shape[0])
    seeds = [grad_loss.reshape(-1).contiguous()]
    if through:
        like = [weights[c] for c in (*s.pairs[::2], *s.pairs[1::2])]
        seeds += [
            torch.zeros_like(w) if grad is None else grad.contiguous()
            for grad, w in zip(grad_potentials, like, strict=True)
        ]
    return seeds


def _is_envelope(s: Settings, seeds: Sequence[Tensor]) -> bool:
    """Whether the gradient is that at fixed potentials. The implicit one of the value itself is."""
    regularized = s.objective != reference.TRANSPORT
    return s.backward == "envelope" or (
        s.backward == "implicit" and regularized and len(seeds) == 1
    )


def _solve_gradient(
    s: Settings,
    seeds: list[Tensor],
    costs: Sequence[Tensor],
    weights: Sequence[Tensor],
    init: Sequence[Tensor],
    solution: Sequence[Tensor],
    want: list[int],
) -> Sequence[Tensor]:
    """Gradients of the wanted costs and weights; differentiable where a graph is being made."""
    parts = [
        seeds,
        [C.contiguous() for C in costs],
        [w.contiguous() for w in weights],
        [v.contiguous() for v in init],
        list(solution),
    ]
    if not torch.is_grad_enabled():
        return _wanted_gradients(s, parts, want)
    sizes = [len(part) for part in parts]
    parts[-1] = [t.detach() for t in solution]
    return SolveGradient.apply(s, sizes, want, *(t for part in parts for t in part))


def _split(tensors: Sequence[Tensor], sizes: list[int]) -> list[list[Tensor]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(tensors[start : start + size]))
        start += size
    return parts


def _gradients(
    s: Settings, parts: list[list[Tensor]], want_cost: list[int], want_weights: bool
) -> Sequence[list[Tensor]]:
    """Gradients of the costs and of both sides' weights, lists over the pairs, by the kernels.

    ``parts``: seeds, costs, weights, init, [*f, *g, *traces].
    """
    seeds, costs, weights, init, solution = parts
    P, implementation = len(costs), _implementation(s.plain)
    grad_loss, grad_f, grad_g = seeds[0], seeds[1 : P + 1], seeds[P + 1 :]
    f, g, traces = solution[:P], solution[P : 2 * P], solution[2 * P :]
    if s.backward == "unrolled":
        return implementation.unrolled_backward(
            grad_loss, grad_f, grad_g, costs, weights, s.pairs, s.coefficients, init, traces,
            s.eps, s.rho_x, s.rho_y, s.objective, want_cost, want_weights,
        )  # fmt: skip
    if not _is_envelope(s, seeds):
        *grads, status = implementation.implicit_backward(
            grad_loss, grad_f, grad_g, costs, weights, s.pairs, s.coefficients, f, g,
            s.eps, s.rho_x, s.rho_y, s.objective, want_cost, want_weights,
        )  # fmt: skip
        _report_system(s, status, costs[0].dtype)
        return grads
    return implementation.envelope_backward(
        grad_loss, costs, weights, s.pairs, s.coefficients, f, g, s.eps, s.rho_x, s.rho_y,
        s.objective, want_cost, want_weights,
    )  # fmt: skip


def _wanted_gradients(s: Settings, parts: list[list[Tensor]], want: list[int]) -> list[Tensor]:
    """The same for the costs and clouds' weights that are wanted, in one list."""
    P = len(s.coefficients)
    return _of_inputs(s, _gradients(s, parts, want[:P], any(want[P:])), want)


def _of_inputs(s: Settings, grads: Sequence[list[Tensor]], want: list[int]) -> list[Tensor]:
    """Gradients per pair as gradients per wanted cost and cloud."""
    grad_costs, grad_a, grad_b = grads
    P = len(grad_costs)
    totals: list[Tensor | None] = [grad_costs[p] if want[p] else None for p in range(P)]
    totals += _sum_over_pairs(s.pairs, grad_a, grad_b, want[P:])
    return [grad for grad in totals if grad is not None]


def _sum_over_pairs(
    pairs: list[int], grad_a: list[Tensor], grad_b: list[Tensor], wanted: Sequence[int]
) -> list[Tensor | None]:
    """The gradient of each cloud's weights from those of each pair's two sides."""
    total: list[Tensor | None] = [None] * len(wanted)
    for p, (i, j) in enumerate(reference.as_pairs(pairs)):
        for c, grad in ((i, grad_a[p]), (j, grad_b[p])):
            if wanted[c]:
                before = total[c]
                total[c] = grad if before is None else before + grad
    return total


def _report_system(s: Settings, status: Tensor, dtype: torch.dtype) -> None:
    """Keeps the status; warns where conjugate gradients left a residual that shows."""
    if s.system is not None:
        s.system[:] = [status]
    if not _check.readable(status):
        return
    limit = 1e-6 if dtype == torch.float64 else 1e-4
    iterations, residual = status.reshape(-1, 2).amax(0).tolist()
    if not residual <= limit:
        warnings.warn(
            f"the linear system of the implicit gradient was left after {int(iterations)} "
            f"iterations at a relative residual of {residual:.1e}: eps is small for these costs. "
            'Raise eps, use float64, or differentiate the iterations: n_iters and "unrolled".',
            _check.ConvergenceWarning,
            stacklevel=2,
        )


class SolveGradient(torch.autograd.Function):
    """The gradient of ``Solve``, itself differentiable: ``(settings, sizes, want, *tensors)``."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, sizes: list[int], want: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.settings, ctx.sizes, ctx.want = settings, sizes, want
        ctx.save_for_backward(*tensors)
        parts = _split(tensors, sizes)
        return tuple(g.clone() for g in _wanted_gradients(settings, parts, want))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        s, saved, sizes = ctx.settings, ctx.saved_tensors, ctx.sizes
        variable = sum(sizes[:3])  # the rest, start and solution, follow from the inputs
        with torch.enable_grad():
            leaves = _leaves(saved[:variable])
            parts = _split([*leaves, *saved[variable:]], sizes)
            repeat = _unrolled_in_torch if s.backward == "unrolled" else _implicit_in_torch
            outputs = _of_inputs(s, repeat(s, parts), ctx.want)
        result = _vector_jacobian(outputs, leaves, grads, saved)
        return None, None, None, *result, *[None] * (len(saved) - variable)


def _unrolled_in_torch(
    s: Settings, parts: list[list[Tensor]]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The unrolled gradient by autograd through the iterations, at the memory of all of them."""
    seeds, costs, weights, init, _ = parts
    P, grad_loss = len(costs), seeds[0]
    results: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for p, (i, j) in enumerate(reference.as_pairs(s.pairs)):
        C, a, b = (t.view_as(t) for t in (costs[p], weights[i], weights[j]))
        start = init[2 * p + 1] if init else torch.zeros_like(b)
        marginals = reference.marginals_of(s.rho_x, s.rho_y, i, j)
        f, g, *_ = reference.fixed_iterations(C, a, b, start, s.eps, s.n_iters, marginals)
        value = reference.value(s.eps, C, f, g, a, b, s.objective, marginals)
        total = (s.coefficients[p] * grad_loss * value).sum()
        if len(seeds) > 1:
            total = total + (seeds[1 + p] * f).sum() + (seeds[1 + P + p] * g).sum()
        for result, grad in zip(
            results, torch.autograd.grad(total, (C, a, b), create_graph=True), strict=True
        ):
            result.append(grad)
    return results


def _implicit_in_torch(
    s: Settings, parts: list[list[Tensor]]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The envelope or implicit gradient as a formula in the potentials, which are functions too."""
    seeds, costs, weights, _, solution = parts
    P, grad_loss = len(costs), seeds[0]
    both = Potentials.apply(s, P, *costs, *weights, *solution[: 2 * P])
    f, g = list(both[:P]), list(both[P:])
    arguments = (
        costs, weights, s.pairs, s.coefficients, f, g, s.eps, s.rho_x, s.rho_y, s.objective,
        [1] * P, True,
    )  # fmt: skip
    if not _is_envelope(s, seeds):
        grad_f, grad_g = seeds[1 : P + 1], seeds[P + 1 :]
        return reference.implicit_backward(grad_loss, grad_f, grad_g, *arguments)[:3]
    return reference.envelope_backward(grad_loss, *arguments)


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
        inputs = len(saved) - 2 * P
        s = ctx.settings._replace(backward="implicit", objective=0)
        parts = _split(saved, [P, inputs - P, 0, 2 * P])
        no_loss = saved[0].new_zeros(saved[0].shape[0])
        seeds = [no_loss, *(grad.contiguous() for grad in grads)]
        result = _wanted_gradients(s, [seeds, *parts], [1] * inputs)
        return None, None, *result, *[None] * (2 * P)


def _centred(
    s: Settings, weights: list[Tensor], f: list[Tensor], g: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same solution with <a, f> = <b, g>: of (f + t, g - t), all solutions, one is returned."""
    all_f, all_g = [], []
    for p, (i, j) in enumerate(reference.as_pairs(s.pairs)):
        a, b = weights[i], weights[j]
        excess = (b * g[p]).sum(-1, True) - (a * f[p]).sum(-1, True)
        shift = excess / (a.sum(-1, True) + b.sum(-1, True))
        all_f.append(torch.where(a > 0, f[p] + shift, 0.0))
        all_g.append(torch.where(b > 0, g[p] - shift, 0.0))
    return all_f, all_g


class SolvePoints(torch.autograd.Function):
    """``(settings, kind, clouds, *points, *weights, *init) -> (loss, status, *f, *g)``.

    ``CostMatrices`` and ``Solve`` in one node and one operation. Without ``settings.dense`` no cost
    matrix is stored, and first derivatives make none. For second derivatives they are made.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, kind: int, clouds: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        s = settings
        points = [_batched(x) for x in tensors[:clouds]]
        weights = [w.contiguous() for w in tensors[clouds : 2 * clouds]]
        init = [v.contiguous() for v in tensors[2 * clouds :]]
        loss, status, f, g, traces, costs = _implementation(s.plain).solve_points(
            points, weights, s.pairs, s.coefficients, init, kind, s.dense, *s.solver, s.tf32
        )
        if s.potentials and s.balanced and s.n_iters < 0:
            f, g = _centred(s, weights, f, g)
        ctx.settings, ctx.kind, ctx.clouds = s, kind, clouds
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([status] if s.potentials else [status, *f, *g]))
        ctx.save_for_backward(*tensors, *f, *g, *traces, *costs)
        return loss if s.batched else loss[0], status, *f, *g

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None, *grad_potentials: Any) -> Any:
        s, clouds, needed = ctx.settings, ctx.clouds, ctx.needs_input_grad[3:]
        saved, inputs = ctx.saved_tensors, len(needed)
        stored = len(saved) - (len(s.coefficients) if s.dense else 0)
        solved = _Solved(
            ctx.kind,
            [_batched(x) for x in saved[:clouds]],
            [w.contiguous() for w in saved[clouds : 2 * clouds]],
            saved[2 * clouds : inputs],
            saved[inputs:stored],
            saved[stored:],
        )
        seeds = _seeds(s, solved.weights, grad_loss, grad_potentials)
        if seeds is None:
            return None, None, None, *[None] * inputs
        wanted = [c for c in range(clouds) if needed[c]]
        want_weights = needed[clouds : 2 * clouds]
        if not torch.is_grad_enabled():
            gradients = _first_order
        elif s.dense or _fits(s, solved.points):
            gradients = _differentiable
        else:
            gradients = _first_order_only
        grads, grad_weights = gradients(s, seeds, solved, wanted, want_weights)
        result: list[Tensor | None] = [None] * inputs
        for c, grad in zip(wanted, grads, strict=True):
            x = saved[c]
            result[c] = grad.view_as(x).to(x.dtype)
        result[clouds : 2 * clouds] = grad_weights
        return None, None, None, *result


class _Solved(NamedTuple):
    """What ``SolvePoints`` was given, ready for the operations, and what came out."""

    kind: int
    points: list[Tensor]
    weights: list[Tensor]
    init: Sequence[Tensor]
    solution: Sequence[Tensor]  # *f, *g, *traces
    costs: Sequence[Tensor]  # stored, or none


def _dense_bytes(s: Settings, points: Sequence[Tensor]) -> int:
    """What the cost matrices of all pairs take, stored."""
    sizes = [points[i].shape[1] * points[j].shape[1] for i, j in reference.as_pairs(s.pairs)]
    return sum(sizes) * points[0].shape[0] * points[0].element_size()


def _fits(s: Settings, points: Sequence[Tensor]) -> bool:
    return _dense_bytes(s, points) <= schedule.budget(points[0].device)


def _streamed_message(s: Settings, points: Sequence[Tensor]) -> str:
    return _STREAMED.format(size=_dense_bytes(s, points) / 1e9)


_Gradients = tuple[Sequence[Tensor], list[Tensor | None]]  # of the wanted clouds, of the weights


def _first_order(
    s: Settings,
    seeds: list[Tensor],
    solved: _Solved,
    wanted: list[int],
    want_weights: Sequence[bool],
) -> _Gradients:
    """By the kernels."""
    if _is_envelope(s, seeds):
        return _at_fixed_potentials(s, seeds, solved, wanted, want_weights)
    gradients = _through_costs if s.dense else _from_points
    return gradients(s, seeds, solved, wanted, want_weights)


def _at_fixed_potentials(
    s: Settings,
    seeds: list[Tensor],
    solved: _Solved,
    wanted: list[int],
    want_weights: Sequence[bool],
) -> _Gradients:
    """The envelope gradient, from points to points in one operation."""
    kind, points, weights, _, solution, costs = solved
    P, implementation = len(s.coefficients), _implementation(s.plain)
    f, g = list(solution[:P]), list(solution[P : 2 * P])
    grads: list[Tensor] = []
    if wanted:
        grads = implementation.envelope_backward_points(
            seeds[0], list(costs), points, weights, s.pairs, s.coefficients, f, g, kind, s.eps,
            wanted, s.tf32,
        )  # fmt: skip
    if not any(want_weights):
        return grads, [None] * len(weights)
    unread, want_cost = f, [0] * P  # the weights' gradients need no cost matrix
    _, grad_a, grad_b = implementation.envelope_backward(
        seeds[0], unread, weights, s.pairs, s.coefficients, f, g, s.eps, s.rho_x, s.rho_y,
        s.objective, want_cost, True,
    )  # fmt: skip
    return grads, _sum_over_pairs(s.pairs, grad_a, grad_b, want_weights)


def _first_order_only(
    s: Settings,
    seeds: list[Tensor],
    solved: _Solved,
    wanted: list[int],
    want_weights: Sequence[bool],
) -> _Gradients:
    """The same where a graph is being made: differentiating the result raises."""
    solved = solved._replace(solution=[t.detach() for t in solved.solution])
    grads, grad_weights = _first_order(s, seeds, solved, wanted, want_weights)
    given = [*grads, *(grad for grad in grad_weights if grad is not None)]
    message = _streamed_message(s, solved.points)
    refused = iter(_refuse_higher_order(given, (*solved.points, *solved.weights, *seeds), message))
    grads = [next(refused) for _ in grads]
    return grads, [None if grad is None else next(refused) for grad in grad_weights]


def _through_costs(
    s: Settings,
    seeds: list[Tensor],
    solved: _Solved,
    wanted: list[int],
    want_weights: Sequence[bool],
) -> _Gradients:
    """Implicit and unrolled gradients by way of those of the cost matrices."""
    kind, points, weights, init, solution, costs = solved
    implementation, pairs = _implementation(s.plain), reference.as_pairs(s.pairs)
    parts = [seeds, list(costs), weights, list(init), list(solution)]
    given = [p for p, (i, j) in enumerate(pairs) if i in wanted or j in wanted]
    want_cost = [int(p in given) for p in range(len(pairs))]
    grad_costs, grad_a, grad_b = _gradients(s, parts, want_cost, any(want_weights))
    grads: list[Tensor] = []
    if wanted:
        grads = implementation.cost_backward(
            [grad_costs[p] for p in given],
            [costs[p] for p in given],
            points,
            weights,
            [c for p in given for c in pairs[p]],
            kind,
            wanted,
        )
    return grads, _sum_over_pairs(s.pairs, grad_a, grad_b, want_weights)


def _from_points(
    s: Settings,
    seeds: list[Tensor],
    solved: _Solved,
    wanted: list[int],
    want_weights: Sequence[bool],
) -> _Gradients:
    """The same without cost matrices, from points to points in one operation."""
    kind, points, weights, init, solution, _ = solved
    P, implementation = len(s.coefficients), _implementation(s.plain)
    given = (seeds[0], seeds[1 : P + 1], seeds[P + 1 :], points, weights, s.pairs, s.coefficients)
    rest = (kind, s.eps, s.rho_x, s.rho_y, s.objective, wanted, any(want_weights))
    f, g, traces = solution[:P], solution[P : 2 * P], solution[2 * P :]
    if s.backward == "unrolled":
        grads, grad_a, grad_b = implementation.unrolled_backward_points(
            *given, list(init), traces, *rest
        )
    else:
        grads, grad_a, grad_b, status = implementation.implicit_backward_points(*given, f, g, *rest)
        _report_system(s, status, points[0].dtype)
    return grads, _sum_over_pairs(s.pairs, grad_a, grad_b, want_weights)


def _differentiable(
    s: Settings,
    seeds: list[Tensor],
    solved: _Solved,
    wanted: list[int],
    want_weights: Sequence[bool],
) -> _Gradients:
    """The same as nodes of a graph."""
    kind, points, weights, init, solution, _ = solved
    P, solution = len(s.coefficients), [t.detach() for t in solution]
    costs = CostMatrices.apply(s.pairs, kind, s.plain, len(points), *points, *weights)
    want = [int(i in wanted or j in wanted) for i, j in reference.as_pairs(s.pairs)]
    want += [int(w) for w in want_weights]
    results = iter(_solve_gradient(s, seeds, costs, weights, init, solution, want))
    grad_costs = [next(results) for p in range(P) if want[p]]
    grad_weights = [next(results) if w else None for w in want_weights]
    if not wanted:
        return [], grad_weights
    given = [p for p in range(P) if want[p]]
    pairs = [c for p in given for c in s.pairs[2 * p : 2 * p + 2]]
    kept = [costs[p].detach() for p in given]
    grads = _points_gradient(grad_costs, kept, points, weights, pairs, kind, s.plain, wanted)
    return grads, grad_weights
