"""Losses of a batch whose points are spread over processes: each holds some rows of each cloud.

ranks   exchanges between processes, in which what one of them raises, all raise
call    the arguments, checked and agreed on; the clouds whole
engine  one problem, its rows spread, as the solver of ``otloss/reference`` reads it
loss    the sum over pairs of clouds, and its gradient
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from otloss._options import Backward, Objective, Unbalanced, check_options
from otloss.combination import DEBIASED, MINIBATCH
from otloss.costs import Cost
from otloss.distributed.loss import combine

__all__ = ["minibatch_energy_distance", "sinkhorn_divergence"]


def sinkhorn_divergence(
    x_local: Tensor,
    y_local: Tensor,
    eps: float,
    group: dist.ProcessGroup | None = None,
    *,
    a_local: Tensor | None = None,
    b_local: Tensor | None = None,
    cost: Cost = "sqeuclidean",
    objective: Objective = "regularized",
    unbalanced: Unbalanced = None,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    backward: Backward = "envelope",
    symmetric: bool | None = None,
) -> Tensor:
    """:func:`otloss.sinkhorn_divergence` of the clouds of all ranks, concatenated.

    All ranks of the group call it together, with the same settings. Each gets the whole loss, and
    the gradient of its own points and weights: what one process would get for these rows, to
    rounding with ``n_iters`` and within ``tol`` otherwise, since Newton's step is left out here. So
    summing the gradients of parameters over the ranks gives the gradient of the loss;
    DistributedDataParallel averages them, which is the same for a loss multiplied by the number of
    ranks.

    Args:
        x_local, y_local: this rank's points (n_local, d) and (m_local, d), or (B, n_local, d) and
            (B, m_local, d). Their numbers may differ from rank to rank, and be 0.
        eps: regularisation, in units of cost, absolute.
        group: of torch.distributed; default all ranks. On GPUs each process must have chosen its
            device by ``torch.cuda.set_device``.
        a_local, b_local: this rank's weights (n_local,) and (m_local,), or (B, n_local) and
            (B, m_local), given on all ranks or on none; default uniform over all points. Their
            totals over the ranks are equal unless ``unbalanced``. A weight of 0 receives the
            derivative for more mass, or 0 if its point is NaN or infinite.
        cost: a name or a function, as in :func:`otloss.sinkhorn_divergence`. A function gets some
            rows of one cloud and the whole other one, so entry i, j must depend on points i and j
            only. Its parameters receive gradients whose sum over the ranks is the whole one.
        objective, unbalanced, tol, max_iters, n_iters: as in :func:`otloss.sinkhorn_divergence`.
        backward: ``"envelope"``, the one gradient that is available: that of the value at fixed
            potentials. It exchanges nothing.
        symmetric: of a cost function, whether c(x, y) = c(y, x), which makes the terms OT(a, a)
            and OT(b, b) cheap. Default None: they are solved like any other pair.

    Returns:
        () or (B,), the same on every rank; differentiable once in the points and weights.

    Raises:
        ValueError, TypeError, NotImplementedError: a wrong argument, named, or one that differs
            between the ranks; also other gradients and second derivatives. What one rank raises,
            all raise.
        RuntimeError: another rank was interrupted, its cost function failed, or it has died.

    Example:
        >>> from torch import distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> x = torch.tensor([[0.0], [1.0]])  # this rank's points
        >>> print(f"{otloss.distributed.sinkhorn_divergence(x, x + 2, eps=0.5):.2f}")
        4.00
        >>> dist.destroy_process_group()

    References:
        Salimans et al., *Improving GANs using optimal transport* (2018): why large batches.
    """
    return combine(
        {"x_local": x_local, "y_local": y_local},
        {"a_local": a_local, "b_local": b_local},
        DEBIASED,
        group,
        lambda: check_options(
            eps, cost=cost, objective=objective, unbalanced=unbalanced, tol=tol,
            max_iters=max_iters, n_iters=n_iters, backward=backward, symmetric=symmetric,
        ),
    )  # fmt: skip


def minibatch_energy_distance(
    x1_local: Tensor,
    x2_local: Tensor,
    y1_local: Tensor,
    y2_local: Tensor,
    eps: float,
    group: dist.ProcessGroup | None = None,
    *,
    cost: Cost = "cosine",
    objective: Objective = "transport",
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    backward: Backward = "envelope",
) -> Tensor:
    """:func:`otloss.minibatch_energy_distance` of the minibatches of all ranks, concatenated.

    Ranks, shapes, gradients and errors are as in :func:`sinkhorn_divergence`; the formula and the
    other arguments as in :func:`otloss.minibatch_energy_distance`.

    Example:
        >>> from torch import distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> features = torch.eye(2).repeat(8, 1).chunk(4)  # this rank's part of four minibatches
        >>> print(f"{otloss.distributed.minibatch_energy_distance(*features, eps=0.002):.2f}")
        0.00
        >>> dist.destroy_process_group()
    """
    names = ("x1_local", "x2_local", "y1_local", "y2_local")
    return combine(
        dict(zip(names, (x1_local, x2_local, y1_local, y2_local), strict=True)),
        {},
        MINIBATCH,
        group,
        lambda: check_options(
            eps, cost=cost, objective=objective, tol=tol, max_iters=max_iters, n_iters=n_iters,
            backward=backward,
        ),
    )  # fmt: skip
