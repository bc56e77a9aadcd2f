"""The node that a loss or a result hangs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otloss import _check, ops
from otloss.autograd.first_order import gradients
from otloss.autograd.second_order import differentiable_gradients
from otloss.autograd.settings import (
    Gradients,
    Inputs,
    Seeds,
    Settings,
    Wanted,
    batched,
    implementation,
    mode,
    unbatched,
)
from otloss.reference.arguments import as_pairs
from otloss.reference.marginals import centred
from otloss.shapes import places_of_costs

__all__ = ["Solve", "evaluate"]


class Solve(torch.autograd.Function):
    """``(settings, sizes, *costs, *points, *weights, *init) -> (loss, status)``, or with
    ``settings.potentials`` ``(loss, status, *f, *g)``. Without ``settings.combined`` the terms of
    the loss, (P, B) in float64, are in its place.

    ``costs`` (B, n, m), or (1, n, m) for all problems, one per pair, or ``points`` (n, d) or
    (B, n, d) one per cloud; ``weights`` (B, n) one per cloud; ``init`` potentials f, g of each pair
    in turn or nothing; ``sizes`` counts each. ``loss`` (B,) or (), ``status`` (P, B, 5) as in
    ``otloss.ops``.

    From points and without ``settings.dense`` no cost matrix is stored, and first derivatives make
    none. Second derivatives need them.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, sizes: list[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, solution, prepared = evaluate(settings, sizes, tensors)
        ctx.settings, ctx.sizes, ctx.solved = settings, sizes, len(solution)
        ctx.loss = None if _check.readable(outputs[0]) else outputs[0].detach()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[1])
        # The inputs themselves, not their contiguous copies: these know where they came from. And
        # what else is read of them, so that a change in place is seen.
        places = settings.places.costs if settings.places else []
        ctx.save_for_backward(*tensors, *places, *solution, *prepared)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None, *grad_potentials: Any) -> Any:
        _check.not_batched((grad_loss, *grad_potentials))
        s, needed, saved = ctx.settings, ctx.needs_input_grad[2:], ctx.saved_tensors
        result: list[Tensor | None] = [None] * len(needed)
        given, points, weights, *_ = ctx.sizes
        first_order = not torch.is_grad_enabled()
        inputs = _inputs(saved[: len(needed)], ctx.sizes, single=s.single and first_order)
        seeds = _seeds(s, inputs.weights, grad_loss, grad_potentials)
        if seeds is None:
            return None, None, *result
        live, solution = s.live, saved[len(needed) + (len(s.places.costs) if s.places else 0) :]
        solution, prepared = solution[: ctx.solved], solution[ctx.solved :]
        packed = len(solution) == 1
        if packed and not first_order:
            solution = _unpacked(s, inputs, *solution, *prepared)
            packed, prepared = False, ()
        if not packed:
            s, seeds, inputs = s.of_live(), seeds.of_pairs(live), inputs.of_pairs(live)
        if points and s.dense and not packed:
            P = len(live)
            solution, made = solution[:-P], list(solution[-P:])
            if mode(s, seeds) != "envelope":  # the others read contiguous ones
                made = [C.contiguous() for C in made]
            inputs = Inputs(made, *inputs[1:])
        first_weight = given + points
        wanted = Wanted(
            [k for k, p in enumerate(live) if given and needed[p]],
            [c for c in range(points) if needed[given + c]],
            list(needed[first_weight : first_weight + weights]),
        )
        if first_order:
            found = gradients(s, seeds, inputs, solution, wanted, *prepared)
        else:
            found = differentiable_gradients(s, seeds, inputs, solution, wanted)
        if ctx.loss is not None:  # where data is read, a failure raises
            found = _failed_are_nan(s, ctx.loss, inputs.weights, wanted, found)
        of_costs, of_points, of_weights = found
        for k, grad in zip(wanted.costs, of_costs, strict=True):
            result[live[k]] = grad.sum_to_size(saved[live[k]].shape)
        for c, grad in zip(wanted.points, of_points, strict=True):
            result[given + c] = unbatched(grad, saved[given + c])
        result[first_weight : first_weight + weights] = of_weights
        return None, None, *result


def _failed_are_nan(
    s: Settings, loss: Tensor, weights: list[Tensor], wanted: Wanted, found: Gradients
) -> Gradients:
    """NaN in the gradients of problems that failed, whatever the kernels make of potentials that
    are NaN, but not for padding."""
    of_problems = loss.reshape(-1) if s.combined else loss.sum(0)
    # Not 0 * loss, which a compiler takes for 0.
    mark = torch.where(of_problems.isfinite(), 0.0, torch.nan).to(weights[0].dtype)
    of_rows, of_matrices = mark[:, None], mark[:, None, None]
    present = s.places.present if s.places else [w > 0 for w in weights]
    return Gradients(
        [grad + of_matrices for grad in found.costs],
        [
            torch.where(weights[c][:, : grad.shape[-2], None] > 0, grad + of_matrices, 0.0)
            for c, grad in zip(wanted.points, found.points, strict=True)
        ],
        [
            None if grad is None else torch.where(there, grad + of_rows, 0.0)
            for there, grad in zip(present, found.weights, strict=True)
        ],
    )


def _unpacked(
    s: Settings, inputs: Inputs, potentials: Tensor, prepared: Tensor
) -> tuple[Tensor, ...]:
    """(*f, *g, *made) of the pairs that a gradient flows through."""
    sides = [inputs.weights[c] for c in s.pairs]
    places = places_of_costs(inputs.points, inputs.weights, s.pairs)
    parts = potentials.split([w.numel() for w in sides])
    each = [v.view_as(w) for v, w in zip(parts, sides, strict=True)]
    rows = [prepared[places[p] : places[p + 1]].view(*sides[2 * p].shape, -1) for p in s.live]
    made = [C[..., : sides[2 * p + 1].shape[1]] for C, p in zip(rows, s.live, strict=True)]
    return (*(each[2 * p] for p in s.live), *(each[2 * p + 1] for p in s.live), *made)


def evaluate(
    s: Settings, sizes: list[int], tensors: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[Tensor]]:
    """What ``Solve`` returns, without a node, and what its backward pass needs: of the pairs that a
    gradient flows through (*f, *g, *traces, *made), or of all pairs one tensor, packed; and of the
    clouds what was prepared."""
    inputs, o = _inputs(tensors, sizes, single=s.single), s.options
    loss, status, f, g, traces, made, prepared = implementation(o.method).solve(
        *s.arguments(inputs),
        inputs.init,
        s.tol,
        o.max_iters,
        o.n_iters,
        s.trace,
        s.dense,
        s.packs(),
        s.target.solution if s.target else None,
    )
    if s.target and s.target.is_wanted():
        s.target.keep(f[-1], status[-1])
    exact = o.method == "multiscale"  # centred in double, before potentials are rounded
    if s.potentials and o.balanced() and o.n_iters < 0 and not exact:
        w, sides = inputs.weights, zip(f, g, as_pairs(s.pairs), strict=True)
        f, g = zip(*(centred(f, g, w[i], w[j]) for f, g, (i, j) in sides), strict=True)
    if not s.combined:
        loss = status[..., ops.TERM].clone()
    elif not (s.batched or s.single):
        loss = loss[0]
    outputs = loss, status
    if not g:
        return outputs, tuple(f), prepared
    solution = tuple(each[p] for each in (f, g, traces, made) if each for p in s.live)
    return (*outputs, *f, *g) if s.potentials else outputs, solution, prepared


def _inputs(tensors: Sequence[Tensor], sizes: list[int], *, single: bool) -> Inputs:
    """As the operations take them."""
    points, weights = sizes[0], sizes[0] + sizes[1]
    init = weights + sizes[2]
    clouds = tensors[points:weights]
    others = [
        [t.contiguous() for t in some] if some else []  # an empty comprehension takes time, too
        for some in (tensors[:points], tensors[weights:init], tensors[init:])
    ]
    return Inputs(others[0], list(clouds) if single else [batched(x) for x in clouds], *others[1:])


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
    if through and s.options.gradient() == "envelope":
        raise NotImplementedError(
            'backward="envelope" has gradients of `value` only; potentials, plans and what '
            'depends on them need backward="auto", "implicit" or, with n_iters, "unrolled"'
        )
    if grad_loss is None:
        grad_loss = weights[0].new_zeros(weights[0].shape[0])
    if s.combined and not (s.single and grad_loss.dim() == 0 and not torch.is_grad_enabled()):
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
