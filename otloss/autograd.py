"""The differentiable operations, each a ``torch.autograd.Function`` over the registered ones.

``CostMatrices`` turns clouds into cost matrices and ``Solve`` turns cost matrices and weights into
values and potentials. A loss is one after the other; a callable cost or a given matrix enters
``Solve`` directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otloss import ops, reference

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


def _implementation(plain: bool) -> ModuleType:
    return reference if plain else ops


def _refuse_second_order(grads: list[Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients whose own derivative raises, when a graph of the backward pass is being made."""
    if not torch.is_grad_enabled():
        return grads
    return list(_FirstOrderOnly.apply(len(grads), *grads, *inputs))


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            'second derivatives of otloss losses are not available; method="reference" with '
            "autograd through otloss.reference is, for small problems"
        )


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
            grads = _implementation(ctx.plain).cost_backward(
                [grad.contiguous() for grad in grad_costs if grad is not None],
                [costs[p] for p in given],
                [_batched(x) for x in inputs],
                weights,
                pairs,
                ctx.kind,
                wanted,
            )
            grads = _refuse_second_order(grads, inputs)
            for c, grad in zip(wanted, grads, strict=True):
                result[c] = grad.view_as(inputs[c]).to(inputs[c].dtype)
        return None, None, None, None, *result


class Solve(torch.autograd.Function):
    """``(settings, problems, clouds, *costs, *weights, *init) -> (loss, status, *f, *g)``.

    ``costs`` (B, n, m) one per pair, ``weights`` (B, n) one per cloud, ``init`` potentials f, g of
    each pair in turn or nothing. ``loss`` (B,), ``status`` (P, B, 4) as in ``otloss.ops``.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, problems: int, clouds: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        s = settings
        costs = [C.contiguous() for C in tensors[:problems]]
        weights = [w.contiguous() for w in tensors[problems : problems + clouds]]
        init = [v.contiguous() for v in tensors[problems + clouds :]]
        loss, status, f, g, _ = _implementation(s.plain).solve(
            costs,
            weights,
            s.pairs,
            s.coefficients,
            init,
            s.eps,
            s.rho_x,
            s.rho_y,
            s.tol,
            s.max_iters,
            s.n_iters,
            s.objective,
            False,
        )
        ctx.settings, ctx.problems, ctx.clouds = s, problems, clouds
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([status] if s.potentials else [status, *f, *g]))
        ctx.save_for_backward(*costs, *weights, *f, *g)
        return loss, status, *f, *g

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None, *grad_potentials: Any) -> Any:
        s, P, clouds = ctx.settings, ctx.problems, ctx.clouds
        if s.backward != "envelope":
            raise NotImplementedError(
                f'backward="{s.backward}" is not available yet; "envelope" is: the gradient at '
                "fixed potentials"
            )
        if s.potentials and any(grad is not None for grad in grad_potentials):
            raise NotImplementedError(
                "gradients through potentials, plans and other results that depend on them need "
                'backward="implicit" or "unrolled", which are not available yet; '
                "`value` is differentiable"
            )
        result: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 3)
        if grad_loss is None:
            return None, None, None, *result
        saved = ctx.saved_tensors
        costs, weights = list(saved[:P]), list(saved[P : P + clouds])
        f, g = list(saved[P + clouds : 2 * P + clouds]), list(saved[2 * P + clouds :])
        want_cost = [int(wanted) for wanted in ctx.needs_input_grad[3 : 3 + P]]
        want_weight = ctx.needs_input_grad[3 + P : 3 + P + clouds]
        grad_costs, grad_a, grad_b = _implementation(s.plain).envelope_backward(
            grad_loss.contiguous(),
            costs,
            weights,
            s.pairs,
            s.coefficients,
            f,
            g,
            s.eps,
            s.objective,
            want_cost,
            any(want_weight),
        )
        for p in range(P):
            if want_cost[p]:
                result[p] = grad_costs[p]
        result[P : P + clouds] = _sum_over_pairs(s.pairs, grad_a, grad_b, want_weight)
        given = [k for k, grad in enumerate(result) if grad is not None]
        grads = _refuse_second_order(
            [grad for grad in result if grad is not None], (*costs, *weights, grad_loss)
        )
        for k, grad in zip(given, grads, strict=True):
            result[k] = grad
        return None, None, None, *result


def _sum_over_pairs(
    pairs: list[int], grad_a: list[Tensor], grad_b: list[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of each cloud's weights from those of each pair's two sides."""
    total: list[Tensor | None] = [None] * len(wanted)
    for p, (i, j) in enumerate(reference.as_pairs(pairs)):
        for c, grad in ((i, grad_a[p]), (j, grad_b[p])):
            if wanted[c]:
                before = total[c]
                total[c] = grad if before is None else before + grad
    return total


class SolvePoints(torch.autograd.Function):
    """``(settings, kind, clouds, *points, *weights, *init) -> (loss, status, *f, *g)``.

    ``CostMatrices`` and ``Solve`` in one, without ever storing a cost matrix.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, kind: int, clouds: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        s = settings
        points = [_batched(x) for x in tensors[:clouds]]
        weights = [w.contiguous() for w in tensors[clouds : 2 * clouds]]
        init = [v.contiguous() for v in tensors[2 * clouds :]]
        loss, status, f, g, _ = ops.solve_points(
            points,
            weights,
            s.pairs,
            s.coefficients,
            init,
            kind,
            s.eps,
            s.rho_x,
            s.rho_y,
            s.tol,
            s.max_iters,
            s.n_iters,
            s.objective,
            False,
        )
        ctx.settings, ctx.kind, ctx.clouds = s, kind, clouds
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([status] if s.potentials else [status, *f, *g]))
        ctx.save_for_backward(*tensors[:clouds], *weights, *f, *g)
        return loss, status, *f, *g

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None, *grad_potentials: Any) -> Any:
        s, clouds = ctx.settings, ctx.clouds
        if s.backward != "envelope" or (
            s.potentials and any(grad is not None for grad in grad_potentials)
        ):
            raise NotImplementedError(
                'method="streamed" has the gradient of the value at fixed potentials only: use '
                'backward="envelope", or method="dense" for gradients of potentials and plans'
            )
        result: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 3)
        if grad_loss is None:
            return None, None, None, *result
        saved = ctx.saved_tensors
        inputs, weights = saved[:clouds], list(saved[clouds : 2 * clouds])
        half = clouds * 2 + len(s.coefficients)
        f, g = list(saved[2 * clouds : half]), list(saved[half:])
        points, grad_loss = [_batched(x) for x in inputs], grad_loss.contiguous()
        wanted = [c for c in range(clouds) if ctx.needs_input_grad[3 + c]]
        if wanted:
            grads = ops.envelope_backward_points(
                grad_loss, points, weights, s.pairs, s.coefficients, f, g, ctx.kind, s.eps, wanted
            )
            for c, grad in zip(wanted, grads, strict=True):
                result[c] = grad.view_as(inputs[c]).to(inputs[c].dtype)
        want_weight = ctx.needs_input_grad[3 + clouds : 3 + 2 * clouds]
        if any(want_weight):
            unread, want_cost = f, [0] * len(f)  # the weights' gradients need no cost matrix
            _, grad_a, grad_b = ops.envelope_backward(
                grad_loss,
                unread,
                weights,
                s.pairs,
                s.coefficients,
                f,
                g,
                s.eps,
                s.objective,
                want_cost,
                True,
            )
            result[clouds : 2 * clouds] = _sum_over_pairs(s.pairs, grad_a, grad_b, want_weight)
        given = [k for k, grad in enumerate(result) if grad is not None]
        second = _refuse_second_order(
            [grad for grad in result if grad is not None], (*inputs, *weights, grad_loss)
        )
        for k, grad in zip(given, second, strict=True):
            result[k] = grad
        return None, None, None, *result
