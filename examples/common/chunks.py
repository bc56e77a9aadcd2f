"""The gradient of a loss of a whole batch, in the memory of a chunk of it.

An optimal-transport loss does not split into a sum over samples, so gradients of chunks cannot
simply be added up. But it sees the networks only through their features, which are small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def backward(
    parts: Sequence[Callable[[], Tensor]], loss: Callable[[Tensor], Tensor], chunked: bool
) -> Tensor:
    """Value of ``loss(torch.cat([part() for part in parts]))``; its gradient goes to the weights.

    Each part computes the features (n_k, d) of one chunk. ``chunked``: all are computed without a
    graph first, the loss is differentiated with respect to them, and then each chunk is computed
    once more, with the random numbers that it had, to carry its rows of that gradient to the
    weights. Memory: the features of all and the graph of one chunk. Without, everything is
    computed once, in the memory of the graph of all.
    """
    if not chunked:
        value = loss(torch.cat([part() for part in parts]))
        value.backward()
        return value.detach()
    states, pieces = [], []
    with torch.no_grad():
        for part in parts:
            states.append((torch.get_rng_state(), torch.cuda.get_rng_state_all()))
            pieces.append(part())
    features = torch.cat(pieces).requires_grad_()
    value = loss(features)
    (gradient,) = torch.autograd.grad(value, features)
    rows = gradient.split([len(piece) for piece in pieces])
    with torch.random.fork_rng():  # after which random numbers go on as if computed once
        for part, (on_cpu, on_gpus), cotangent in zip(parts, states, rows, strict=True):
            torch.set_rng_state(on_cpu)
            torch.cuda.set_rng_state_all(on_gpus)
            part().backward(cotangent)
    return value.detach()
