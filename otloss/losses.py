"""The losses: sums of OT values over pairs of clouds, solved together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from otloss import _check, _options
from otloss._options import LossOptions, Options, Unbalanced, check_options
from otloss.costs import Cost
from otloss.method import streams
from otloss.problem import Problem, build_costs, check_clouds
from otloss.result import Solved
from otloss.solve import run

__all__ = [
    "energy_distance",
    "minibatch_energy_distance",
    "sinkhorn_divergence",
    "sinkhorn_loss",
]


class Combination(NamedTuple):
    """A loss: the sum of coefficient * OT over pairs of clouds, flat ``[i0, j0, i1, j1, ...]``."""

    pairs: list[int]
    coefficients: list[float]
    # of eps (sum a - sum b)^2, added where the regularized problems are unbalanced
    mass_term: float = 0.0


LOSS = Combination([0, 1], [1.0])
DEBIASED = Combination([0, 1, 0, 0, 1, 1], [1.0, -0.5, -0.5], mass_term=0.5)
MINIBATCH = Combination([0, 2, 0, 3, 1, 2, 1, 3, 0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0, -2.0, -2.0])
# Where minibatch_energy_distance differs from the other losses.
MINIBATCH_DEFAULTS = LossOptions(cost="cosine", objective="transport", backward="envelope")


@dataclass
class Memory:
    """Potentials of the last call, to start the next one from."""

    potentials: list[Tensor] = field(default_factory=list)

    def start(self, problem: Problem, pairs: list[int]) -> list[Tensor]:
        """f and g of each pair in turn; nothing where the shapes have changed."""
        sides = [problem.weights[c] for c in pairs]
        kept = len(self.potentials) == len(sides) and all(
            v.shape == w.shape and v.dtype == w.dtype and v.device == w.device
            for v, w in zip(self.potentials, sides, strict=True)
        )
        return self.potentials if kept else []

    def keep(self, solved: Solved) -> None:
        if torch.is_inference_mode_enabled():  # its tensors are of no use to a later training step
            return
        self.potentials = [v for f, g in zip(solved.f, solved.g, strict=True) for v in (f, g)]


def combine(
    clouds: dict[str, Tensor],
    weights: dict[str, Tensor | None],
    combination: Combination,
    options: Options,
    memory: Memory | None = None,
) -> Tensor:
    """What every loss here is."""
    problem = check_clouds(clouds, weights, balanced=options.balanced())
    pairs, coefficients, mass_term = combination
    dense = not streams(problem.points, problem.weights, pairs, options)
    named = isinstance(options.cost, str)
    costs = None if named else build_costs(problem, pairs, options.cost, options.method)
    init: Sequence[Tensor] = [] if memory is None else memory.start(problem, pairs)
    solved = run(problem, costs, pairs, coefficients, options, init, dense=dense)
    if memory is not None:
        memory.keep(solved)
    loss = solved.loss
    if mass_term and options.objective == "regularized" and not options.balanced():
        # Not the plain totals: nothing flows to a point of weight 0.
        a, b = (torch.where(w > 0, w, 0.0).sum(-1) for w in problem.weights)
        term = mass_term * options.eps * (a - b).square()
        loss = loss + (term if problem.batched else term[0])
    return loss


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: Cost = "sqeuclidean",
    objective: str = "regularized",
    unbalanced: Unbalanced = None,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    backward: str = "auto",
    method: str = "auto",
    precision: str = "float32",
) -> Tensor:
    r"""The Sinkhorn divergence: entropic optimal transport without its bias.

    .. math:: S_\varepsilon(a, b) = OT_\varepsilon(a, b) - \tfrac12 OT_\varepsilon(a, a)
              - \tfrac12 OT_\varepsilon(b, b)

    Non-negative, and zero exactly when the weighted clouds are equal. It tends to optimal transport
    as ``eps`` goes to 0 and to :func:`energy_distance` of the same cost as ``eps`` grows.

    With ``unbalanced`` each OT is that of :func:`sinkhorn_loss`, a cloud against itself with its
    own strength on both sides, and the regularized objective has the further term
    :math:`\tfrac\varepsilon2 (\sum_i a_i - \sum_j b_j)^2`. It is non-negative whatever the totals.

    Args:
        x, y: clouds (n, d) and (m, d), or batches (B, n, d) and (B, m, d). float16 and bfloat16
            are computed in float32, float64 stays float64.
        eps: regularisation, in units of cost, absolute. A few percent of the mean cost is sharp,
            the mean cost is blurred.
        a, b: weights (n,) and (m,), or (B, n) and (B, m), of equal total unless ``unbalanced``;
            default uniform. A point of weight 0 is padding: it changes nothing and receives
            gradient 0.
        cost: ``"sqeuclidean"`` |x - y|^2 (no 1/2), ``"euclidean"`` |x - y|, ``"cosine"``
            1 - <x, y> / (|x| |y|), or a differentiable function ``(x, y) -> C``.
        objective: ``"regularized"``: OT_eps as above, the divergence of Feydy et al.;
            ``"transport"``: each term is <P_eps, C>, without the entropy. Genevay et al.'s
            W̄ = 2W(a,b) - W(a,a) - W(b,b) is twice this divergence with ``"transport"``.
        unbalanced: strength rho of the KL penalty that holds the plan's marginals to a and b, in
            units of cost, absolute: one number, or a pair ``(rho_x, rho_y)`` with None for a hard
            constraint. Mass is moved over costs up to a few rho. Default None, balanced.
        tol: stop when the L1 marginal error over the total mass is at most this. With the default
            the gradient was within 0.4% of the exact one on every workload of docs/solver.md; its
            error is about one to five times ``tol``.
        max_iters: stop there with a :class:`ConvergenceWarning`.
        n_iters: instead, run exactly so many iterations from zero potentials at this ``eps``.
        backward: ``"envelope"``: the gradient at fixed potentials, exact at convergence for the
            regularized objective; with ``"transport"`` the plan is held constant.
            ``"implicit"``: differentiates the optimality conditions, exact at convergence for both
            objectives. ``"unrolled"``: the exact derivative of the ``n_iters`` iterations.
            ``"auto"``: unrolled with ``n_iters``, else implicit, which is the envelope for the
            regularized objective. See docs/gradients.md.
        method: ``"dense"`` (cost matrices kept), ``"streamed"`` (never stored, memory O((n + m) d);
            named costs), ``"reference"`` (plain torch) or ``"auto"``: dense unless the matrices
            exceed ``otloss.method.dense_budget`` or are slower.
        precision: ``"tf32"`` allows inner products of points with 11 bits of each coordinate, for
            float32 and half inputs. Only streamed solves on CUDA in more than 16 dimensions, and
            their envelope gradients, use that; elsewhere it changes nothing. ``"float32"``, the
            default, is as accurate there as anywhere.

    Returns:
        () or (B,), float32 or float64; differentiable in x, y, a and b, twice. Gradients come back
        in the inputs' dtype.

    Raises:
        ValueError, TypeError: a wrong argument, named, with what is expected.
        NotImplementedError: a derivative that is not available, with what to use instead.

    References:
        Genevay, Peyré, Cuturi, *Learning generative models with Sinkhorn divergences* (2018);
        Feydy et al., *Interpolating between optimal transport and MMD* (2019); Séjourné et al.,
        *Sinkhorn divergences for unbalanced optimal transport* (2019).
    """
    options = check_options(
        eps, cost=cost, objective=objective, unbalanced=unbalanced, tol=tol, max_iters=max_iters,
        n_iters=n_iters, backward=backward, method=method, precision=precision,
    )  # fmt: skip
    return combine({"x": x, "y": y}, {"a": a, "b": b}, DEBIASED, options)


def sinkhorn_loss(
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: Cost = "sqeuclidean",
    objective: str = "regularized",
    unbalanced: Unbalanced = None,
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    backward: str = "auto",
    method: str = "auto",
    precision: str = "float32",
) -> Tensor:
    r"""Entropic optimal transport, without debiasing.

    .. math:: OT_\varepsilon(a, b) = \min_{P 1 = a,\; P^T 1 = b}
              \langle P, C\rangle + \varepsilon\, KL(P \,|\, a \otimes b)

    With ``unbalanced`` the constraints are penalties, :math:`\rho_x KL(P 1 \,|\, a)` and
    :math:`\rho_y KL(P^T 1 \,|\, b)` with :math:`KL(p \,|\, q) = \sum p \log (p / q) - p + q`:
    points too far from everything are left out, and the totals of a and b may differ.

    As a training loss it shrinks the model towards the mean of the data, the more the larger
    ``eps``; :func:`sinkhorn_divergence` does not.

    Args, returns and raises: as :func:`sinkhorn_divergence`.

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
    eps: float,
    *,
    cost: Cost = "cosine",
    objective: str = "transport",
    tol: float = 1e-3,
    max_iters: int = 1000,
    n_iters: int | None = None,
    backward: str = "envelope",
    method: str = "auto",
    precision: str = "float32",
) -> Tensor:
    r"""The minibatch energy distance of OT-GAN, from two minibatches of each distribution.

    .. math:: L = W(x_1, y_1) + W(x_1, y_2) + W(x_2, y_1) + W(x_2, y_2)
              - 2 W(x_1, x_2) - 2 W(y_1, y_2)

    with W = <P_eps, C>. This is twice the paper's squared distance D²_MED. Unlike optimal transport
    between minibatches, its gradient is unbiased for a distance between the distributions. All six
    problems are solved together.

    Args:
        x1, x2: two minibatches (n, d) of one distribution, or batches (B, n, d).
        y1, y2: two minibatches (m, d) of the other.
        eps: regularisation, in units of cost. The paper uses 0.002 on cosine costs; 1 or more there
            makes every plan uniform.
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
    method: str = "auto",
) -> Tensor:
    r"""The limit of the Sinkhorn divergence for large eps: an MMD with kernel -cost.

    .. math:: E(a, b) = \langle a, C_{xy} b\rangle - \tfrac12 \langle a, C_{xx} a\rangle
              - \tfrac12 \langle b, C_{yy} b\rangle

    With ``"euclidean"`` it is half of Székely's energy distance, and a distance between
    distributions; with ``"sqeuclidean"`` it is only the squared distance between the means.

    Args:
        x, y, a, b, cost: as in :func:`sinkhorn_divergence`.
        method: ``"dense"``, ``"reference"`` or ``"auto"``.

    Returns:
        () or (B,); differentiable, also twice.

    Raises:
        ValueError, TypeError: as :func:`sinkhorn_divergence`.

    References:
        Székely and Rizzo, *Energy statistics* (2013); Feydy et al. (2019).
    """
    cost, method = _options.cost(cost), _options.choice("method", method, _options.METHODS)
    problem = check_clouds({"x": x, "y": y}, {"a": a, "b": b})
    pairs, coefficients, _ = DEBIASED
    costs = build_costs(problem, pairs, cost, method)
    weights, padded = problem.weights, problem.padded
    terms = [
        coefficient * _mean_cost(C, weights[i], weights[j], padded)
        for coefficient, C, i, j in zip(coefficients, costs, pairs[::2], pairs[1::2], strict=True)
    ]
    loss = terms[0] + terms[1] + terms[2]
    if _check.readable(loss) and not bool(loss.detach().isfinite().all()):
        _check.finite("x", x)
        _check.finite("y", y)
    return loss if problem.batched else loss[0]


def _mean_cost(C: Tensor, a: Tensor, b: Tensor, padded: bool) -> Tensor:
    if padded:  # so that 0 * inf, from padding, is 0
        C = torch.where((a.unsqueeze(-1) * b.unsqueeze(-2)).detach() > 0, C, 0.0)
    # No matrix product: autocast would round it, or its gradient.
    return (a * (C * b.unsqueeze(-2)).sum(-1)).sum(-1)
