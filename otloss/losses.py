"""The losses that need a solver, and their limit for a large eps."""

from __future__ import annotations

from torch import Tensor

from otloss import _check, _options
from otloss._options import (
    Backward,
    EnergyMethod,
    LossOptions,
    Method,
    Objective,
    Precision,
    Unbalanced,
    check_options,
)
from otloss.combination import DEBIASED, LOSS, MINIBATCH, combine
from otloss.costs import Cost
from otloss.energy import energy
from otloss.problem import check_clouds
from otloss.transforms import inside

__all__ = [
    "energy_distance",
    "minibatch_energy_distance",
    "sinkhorn_divergence",
    "sinkhorn_loss",
]

# Where minibatch_energy_distance differs from the other losses.
MINIBATCH_DEFAULTS = LossOptions(cost="cosine", objective="transport", backward="envelope")


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: Cost = "sqeuclidean",
    objective: Objective = "regularized",
    unbalanced: Unbalanced = None,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    backward: Backward = "auto",
    method: Method = "auto",
    precision: Precision = "float32",
    symmetric: bool | None = None,
) -> Tensor:
    r"""The Sinkhorn divergence: entropic optimal transport without its bias.

    .. math:: S_\varepsilon(a, b) = OT_\varepsilon(a, b) - \tfrac12 OT_\varepsilon(a, a)
              - \tfrac12 OT_\varepsilon(b, b)

    Non-negative, and zero exactly when the weighted clouds are equal. As ``eps`` goes to 0 it tends
    to exact optimal transport, as ``eps`` grows to :func:`energy_distance` with this cost.

    With ``unbalanced`` each OT is the unbalanced one of :func:`sinkhorn_loss`. The self terms
    OT(a, a) and OT(b, b) use rho_x and rho_y on both sides, respectively. The regularized objective
    gets the term :math:`\tfrac\varepsilon2 (\sum_i a_i - \sum_j b_j)^2` more; then S is
    non-negative for any totals.

    Args:
        x, y: clouds (n, d) and (m, d), or batches (B, n, d) and (B, m, d), in which (1, n, d) is
            one cloud for all. float16 and bfloat16 are computed in float32, float64 stays float64.
            Floats of different precision are promoted, weights included; under autocast a mixture
            is computed in float32.
        eps: regularisation, in units of cost, absolute. A few percent of the mean cost: sharp, near
            exact optimal transport. The mean cost or more: blurred, near :func:`energy_distance`.
            A tensor () or (B,) gives each problem its own, and has a gradient.
        a, b: weights (n,) and (m,), or (B, n) and (B, m), of equal total unless ``unbalanced``;
            default uniform. A point of weight 0 changes nothing, and its coordinates receive
            gradient 0. Its weight has a one-sided derivative where they are finite (an empty bin),
            and gradient 0 where they are NaN or infinite (padding).
        cost: ``"sqeuclidean"`` |x - y|^2 (no 1/2), ``"euclidean"`` |x - y|, ``"cosine"``
            1 - <x, y> / (|x| |y|), or a differentiable function ``(x, y) -> C``, which gets a
            point of positive weight in place of one of weight 0.
        objective: ``"regularized"``: OT_eps as above, the divergence of Feydy et al.;
            ``"transport"``: each term is <P_eps, C>, without the entropy. Genevay et al.'s
            W̄ = 2W(a,b) - W(a,a) - W(b,b) is twice this divergence with ``"transport"``.
        unbalanced: penalty rho on the KL divergence of the plan's marginals from a and b, in units
            of cost, absolute. A number, or a pair ``(rho_x, rho_y)`` in which None makes a side a
            constraint. Mass moves over costs up to a few rho; the rest stays. Default None:
            balanced.
        tol: stop when the L1 marginal error over the total mass is at most this. The relative error
            of the gradient is about one to five times ``tol`` between clouds about their own size
            apart, and larger the closer they are, see docs/solver.md.
        max_iters: upper bound on the sweeps; a solve that reaches it warns with a
            :class:`ConvergenceWarning`. On CUDA and in compiled code, where a warning would wait
            for the device, :func:`last_status` tells.
        n_iters: run this number of iterations (an update of f, then of g) from zero potentials at
            ``eps``, with no stopping test; ``max_iters`` is then ignored.
        backward: what is differentiated, see docs/gradients.md.

            - ``"envelope"``: the value at fixed potentials, exact at convergence for the
              regularized objective; for ``"transport"`` it holds the plan constant.
            - ``"implicit"``: the optimality conditions, exact at convergence for both objectives.
            - ``"unrolled"``: the ``n_iters`` iterations, exactly.
            - ``"auto"`` (default): unrolled with ``n_iters``, else implicit; for the regularized
              objective implicit equals envelope.
        method: ``"dense"`` stores the cost matrices. ``"streamed"`` computes costs from the points
            in every sweep, memory O((n + m) d); a cost function is called on some rows of x and all
            of y, and has the envelope gradient. ``"multiscale"`` computes those that hold something
            of the plan: large clouds in up to 8 dimensions, squared or cosine cost; on a GPU for
            the regularized objective and its envelope gradient. ``"reference"`` is plain torch.
            ``"auto"`` streams if the matrices exceed the memory budget
            ``otloss.method.dense_budget`` or would be slower, and takes "multiscale" where a sample
            of the points says that it pays; see docs/large-point-clouds.md.
        precision: ``"tf32"`` allows inner products from 11 bits of each coordinate. It applies to
            streamed solves on CUDA, float32 or half inputs, in more than 16 dimensions, and changes
            nothing elsewhere. Default ``"float32"``: full accuracy.
        symmetric: of a cost function, whether c(x, y) = c(y, x) for clouds of equal size, which
            makes the terms OT(a, a) and OT(b, b) cheap. Default None: their matrices are compared
            with their transposes; on CUDA and under torch.compile, where that would wait for the
            device, they are solved like any other pair.

    Returns:
        Shape () or (B,), float32 or float64. Twice differentiable in x, y, a and b; gradients have
        the dtype of the inputs.

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected.
        NotImplementedError: a derivative that is not available, with what to use instead.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]], requires_grad=True)
        >>> loss = otloss.sinkhorn_divergence(x, x.detach() + 2, eps=0.5)  # a translation by 2
        >>> loss.backward()
        >>> print(f"{loss.item():.2f}", x.grad.round(decimals=2).tolist())
        4.00 [[-2.0], [-2.0]]

    References:
        Genevay, Peyré, Cuturi, *Learning generative models with Sinkhorn divergences* (2018);
        Feydy et al., *Interpolating between optimal transport and MMD* (2019); Séjourné et al.,
        *Sinkhorn divergences for unbalanced optimal transport* (2019).
    """
    options = check_options(
        eps, cost=cost, objective=objective, unbalanced=unbalanced, tol=tol, max_iters=max_iters,
        n_iters=n_iters, backward=backward, method=method, precision=precision,
        symmetric=symmetric,
    )  # fmt: skip
    return combine({"x": x, "y": y}, {"a": a, "b": b}, DEBIASED, options)


def sinkhorn_loss(
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: Cost = "sqeuclidean",
    objective: Objective = "regularized",
    unbalanced: Unbalanced = None,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    backward: Backward = "auto",
    method: Method = "auto",
    precision: Precision = "float32",
) -> Tensor:
    r"""Entropic optimal transport, without debiasing.

    .. math:: OT_\varepsilon(a, b) = \min_{P 1 = a,\; P^T 1 = b}
              \langle P, C\rangle + \varepsilon\, KL(P \,|\, a \otimes b)

    With ``unbalanced`` penalties replace the constraints: :math:`\rho_x KL(P 1 \,|\, a)` and
    :math:`\rho_y KL(P^T 1 \,|\, b)` with :math:`KL(p \,|\, q) = \sum p \log (p / q) - p + q`. Mass
    too far from everything is not transported, and the totals of a and b may differ.

    As a training loss it is biased: it pulls the model towards the mean of the data, more so for
    larger ``eps``. :func:`sinkhorn_divergence` has no such bias.

    Args, returns and raises: as :func:`sinkhorn_divergence`, without ``symmetric``.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> print(f"{otloss.sinkhorn_loss(x, x, eps=0.5):.2f}")  # not 0: a divergence is
        0.28

    References:
        Cuturi, *Sinkhorn distances: lightspeed computation of optimal transport* (2013); Chizat et
        al., *Scaling algorithms for unbalanced optimal transport problems* (2018).
    """
    options = check_options(
        eps, cost=cost, objective=objective, unbalanced=unbalanced, tol=tol, max_iters=max_iters,
        n_iters=n_iters, backward=backward, method=method, precision=precision,
    )  # fmt: skip
    return combine({"x": x, "y": y}, {"a": a, "b": b}, LOSS, options)


def minibatch_energy_distance(
    x1: Tensor,
    x2: Tensor,
    y1: Tensor,
    y2: Tensor,
    eps: float | Tensor,
    *,
    cost: Cost = "cosine",
    objective: Objective = "transport",
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    backward: Backward = "envelope",
    method: Method = "auto",
    precision: Precision = "float32",
) -> Tensor:
    r"""The minibatch energy distance of OT-GAN, from two minibatches of each distribution.

    .. math:: L = W(x_1, y_1) + W(x_1, y_2) + W(x_2, y_1) + W(x_2, y_2)
              - 2 W(x_1, x_2) - 2 W(y_1, y_2)

    with W = <P_eps, C>. This is twice the paper's squared distance D²_MED. Its expectation
    over minibatches is a distance between the distributions, so its gradient is unbiased; plain
    optimal transport between minibatches is not. All six problems are solved together.

    Args:
        x1, x2: two minibatches (n, d) of one distribution, or batches (B, n, d).
        y1, y2: two minibatches (m, d) of the other.
        eps: regularisation, in units of cost. The paper uses 0.002 with the cosine cost, for which
            eps >= 1 makes every plan nearly uniform.
        cost: ``"cosine"`` (the paper, on critic features), ``"euclidean"``, ``"sqeuclidean"`` or a
            function.
        objective: ``"transport"`` (the paper) or ``"regularized"``.
        backward: ``"envelope"`` (the paper, and the default) holds the plans constant in the
            gradient; ``"implicit"``, ``"unrolled"`` and ``"auto"`` as in
            :func:`sinkhorn_divergence`.
        tol, max_iters, n_iters, method, precision: as in :func:`sinkhorn_divergence`.

    Returns:
        () or (B,); differentiable in the four minibatches.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`sinkhorn_divergence`.

    Example:
        >>> features = torch.eye(2).repeat(8, 1).chunk(4)  # four minibatches of two classes
        >>> print(f"{otloss.minibatch_energy_distance(*features, eps=0.002):.2f}")
        0.00

    References:
        Salimans, Zhang, Radford, Metaxas, *Improving GANs using optimal transport* (2018).
    """
    options = check_options(
        eps, cost=cost, objective=objective, tol=tol, max_iters=max_iters,
        n_iters=n_iters, backward=backward, method=method, precision=precision,
    )  # fmt: skip
    return combine({"x1": x1, "x2": x2, "y1": y1, "y2": y2}, {}, MINIBATCH, options)


def energy_distance(
    x: Tensor,
    y: Tensor,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: Cost = "euclidean",
    method: EnergyMethod = "auto",
) -> Tensor:
    r"""The limit of the Sinkhorn divergence for large eps: an MMD with kernel -cost.

    .. math:: E(a, b) = \langle a, C_{xy} b\rangle - \tfrac12 \langle a, C_{xx} a\rangle
              - \tfrac12 \langle b, C_{yy} b\rangle

    With ``"euclidean"`` it is half of Székely's energy distance, and a distance between
    distributions; with ``"sqeuclidean"`` it is only the squared distance between the means.

    Args:
        x, y, a, b, cost: as in :func:`sinkhorn_divergence`.
        method: ``"dense"``, ``"reference"``, ``"streamed"`` (blocks of rows of the cost matrices,
            memory O((n + m) d)) or ``"auto"``: dense unless these exceed the memory budget.

    Returns:
        () or (B,); differentiable, also twice. In float32 it is off by some 1e-8 of the mean cost
        from x to y, of which little is left between clouds that are close.

    Raises:
        ValueError, TypeError: as :func:`sinkhorn_divergence`.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
        >>> print(f"{otloss.energy_distance(x, y):.2f}")  # 2 - 0.5 / 2 - 0.5 / 2
        1.50

    References:
        Székely and Rizzo, *Energy statistics* (2013); Feydy et al. (2019).
    """
    method = _options.choice("method", method, _options.ENERGY_METHODS)
    options = check_options(1.0, cost=cost, method=method)
    if _check.transformed():
        return inside(
            lambda clouds, weights, o: (energy(check_clouds(clouds, weights), o.cost, o.method),),
            {"x": x, "y": y}, {"a": a, "b": b}, options, DEBIASED.pairs,
        )[0]  # fmt: skip
    return energy(check_clouds({"x": x, "y": y}, {"a": a, "b": b}), cost, method)
