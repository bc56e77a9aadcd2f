"""Cost matrices of clouds, as a node of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from otloss import _check
from otloss.autograd.settings import batched, implementation, unbatched

__all__ = ["CostMatrices"]


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
            seeds = [grad.contiguous() for grad in grad_costs if grad is not None]
            clouds = [costs[p] for p in given], [batched(x) for x in inputs], weights, pairs
            # Where a graph is made, by products that autograd knows.
            how = "reference" if torch.is_grad_enabled() else ctx.method
            grads = implementation(how).cost_backward(seeds, *clouds, ctx.kind, wanted)
            for c, grad in zip(wanted, grads, strict=True):
                result[c] = unbatched(grad, inputs[c])
        return None, None, None, None, *result
