"""GeomLoss's ``SamplesLoss``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from otloss import _check, losses
from otloss._options import EnergyMethod, choice, number
from otloss.cost_matrices import cost_matrix
from otloss.costs import Cost
from otloss.simple import distance_of, mmd
from otloss.solve import solve_sample

__all__ = ["SamplesLoss"]

LOSSES = ("sinkhorn", "gaussian", "laplacian", "energy")
METHODS: dict[str, EnergyMethod] = {
    "auto": "auto",
    "tensorized": "dense",
    "online": "streamed",
    "multiscale": "auto",
}
# By p: GeomLoss's cost, as a factor times a cost of otloss.
COSTS = {1: (1.0, "euclidean"), 2: (0.5, "sqeuclidean")}


class SamplesLoss(nn.Module):
    r"""``geomloss.SamplesLoss``: a loss between weighted clouds, called with ``(x, y)``,
    ``(a, x, b, y)`` or ``(labels_x, a, x, labels_y, b, y)``.

    With the cost :math:`C = |x - y|^p / p`, eps = blur^p and rho = reach^p, ``"sinkhorn"`` is
    :func:`otloss.sinkhorn_divergence` or, not ``debias``, :func:`otloss.sinkhorn_loss`. For p = 2
    that C is half of ``"sqeuclidean"``::

        SamplesLoss("sinkhorn", p=2, blur=s)  =  sinkhorn_divergence(x, y, 2 * s**2) / 2
        SamplesLoss("sinkhorn", p=1, blur=s)  =  sinkhorn_divergence(x, y, s, cost="euclidean")

    Kernel losses are half of :func:`otloss.mmd` with ``bandwidth=blur``.

    Args:
        loss: ``"sinkhorn"``, ``"gaussian"``, ``"laplacian"`` or ``"energy"``.
        p: 1 or 2; with ``cost`` any number, of which blur^p and reach^p are made.
        blur: of the plan, or of the kernel; in units of the points.
        reach: how far mass goes, in units of the points; None: balanced.
        cost: a function from clouds (B, n, d) and (B, m, d) to C (B, n, m).
        debias: whether self terms are subtracted.
        potentials: return the potentials (F, G), (B, n) and (B, m), in place of the value; B is 1
            for single clouds. Balanced ones are determined up to (F + t, G - t).
        backend: ``"tensorized"`` stores cost matrices, ``"online"`` does not, ``"auto"`` and
            ``"multiscale"`` leave it to the size.
        scaling: without effect, with a warning if given: a solve goes to its tolerance ``tol``,
            whatever the way.
        diameter, truncate, cluster_scale, verbose and the labels: without effect.
        tol, max_iters: as in :func:`otloss.sinkhorn_divergence`.

    Returns:
        () or (B,), differentiable, also twice.

    Raises:
        NotImplementedError: ``loss="hausdorff"``, ``kernel=`` or a cost as a KeOps formula.
        ValueError, TypeError: a wrong argument, named, with what is expected.

    Example:
        >>> from otloss.compat.geomloss import SamplesLoss  # instead of geomloss's
        >>> loss = SamplesLoss("sinkhorn", p=2, blur=0.1)
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> print(f"{loss(x, x + 2):.2f}")  # half of the squared distance
        2.00
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: float = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: Callable[[Tensor, Tensor], Tensor] | None = None,
        kernel: None = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
        *,
        tol: float = 1e-3,
        max_iters: int = 1000,
    ) -> None:
        super().__init__()
        if loss == "hausdorff":
            raise NotImplementedError('loss="hausdorff" has no counterpart in otloss')
        if kernel is not None:
            raise NotImplementedError("kernel= has no counterpart in otloss: see otloss.mmd")
        if isinstance(cost, str):
            raise NotImplementedError(f"cost must be a function, not a KeOps formula, got {cost!r}")
        if scaling != 0.5:
            warnings.warn(
                "scaling= has no effect: a solve goes to its tolerance, tol=", stacklevel=2
            )
        choice("loss", loss, LOSSES)
        choice("backend", backend, tuple(METHODS))
        if loss == "sinkhorn" and cost is None and p not in COSTS:
            raise ValueError(f"p must be 1 or 2, or cost= be given, got {p!r}")
        self.loss, self.p, self.blur, self.reach = loss, p, blur, reach
        self.cost, self.debias, self.potentials, self.backend = cost, debias, potentials, backend
        self.tol, self.max_iters = tol, max_iters

    def forward(self, *args: Any) -> Any:
        a, x, b, y = self._arguments(args)
        _check.same_space("x", _check.points("x", x), "y", _check.points("y", y))
        a, b = _weights("a", a, "x", x), _weights("b", b, "y", y)
        single = x.dim() == 2
        if single:
            x, y, a, b = (None if t is None else t.unsqueeze(0) for t in (x, y, a, b))
        of_loss = self._sinkhorn if self.loss == "sinkhorn" else self._kernel
        value = of_loss(x, y, a, b)
        return value[0] if single and not self.potentials else value

    def _arguments(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(args) == 6:
            labels_x, a, x, labels_y, b, y = args
            labels = labels_x is not None or labels_y is not None
            if labels and self.backend not in ("auto", "multiscale"):
                raise ValueError(
                    f"labels are for auto and multiscale, got backend={self.backend!r}"
                )
            return a, x, b, y
        if len(args) == 4:
            return args
        if len(args) == 2:
            return None, args[0], None, args[1]
        raise ValueError(
            "SamplesLoss takes (x, y), (a, x, b, y) or (labels_x, a, x, labels_y, b, y), got "
            f"{len(args)} arguments"
        )

    def _sinkhorn(self, x: Tensor, y: Tensor, a: Any, b: Any) -> Any:
        factor, cost = self._cost()
        blur = number("blur", self.blur)
        reach = None if self.reach is None else number("reach", self.reach)
        options: Any = {
            "eps": blur**self.p / factor,
            "unbalanced": None if reach is None else reach**self.p / factor,
            "cost": cost,
            "tol": self.tol,
            "max_iters": self.max_iters,
            "method": METHODS[self.backend],
        }
        if not self.potentials:
            of_pair = losses.sinkhorn_divergence if self.debias else losses.sinkhorn_loss
            return factor * of_pair(x, y, a=a, b=b, **options)
        F, G = solve_sample(x, y, a=a, b=b, **options).potentials
        if self.debias:
            F = F - solve_sample(x, x, a=a, b=a, **options).potentials[0]
            G = G - solve_sample(y, y, a=b, b=b, **options).potentials[0]
        return factor * F, factor * G

    def _cost(self) -> tuple[float, Cost]:
        return COSTS[int(self.p)] if self.cost is None else (1.0, self.cost)

    def _kernel(self, x: Tensor, y: Tensor, a: Any, b: Any) -> Any:
        blur = None if self.loss == "energy" else self.blur
        if not self.potentials and self.loss == "energy":
            return losses.energy_distance(x, y, a=a, b=b, method=METHODS[self.backend])
        if not self.potentials:
            return 0.5 * mmd(x, y, self.loss, blur, a=a, b=b)
        distance = distance_of(self.loss, blur)
        a, b = (
            x.new_full(t.shape[:-1], 1 / t.shape[-2]) if w is None else w
            for w, t in ((a, x), (b, y))
        )

        def mean(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
            return (cost_matrix(s, t, distance) * w.unsqueeze(-2)).sum(-1)

        apart = (a.sum(-1) - b.sum(-1)).unsqueeze(-1)  # what the 1 of the kernel 1 - distance adds
        return (
            mean(x, y, b) - mean(x, x, a) + apart,
            mean(y, x, a) - mean(y, y, b) - apart,
        )


def _weights(name: str, w: Any, cloud: str, x: Tensor) -> Any:
    """Weights (n,) or (B, n), which may come with a last dimension of 1."""
    if w is None:
        return None
    if _check.floating(name, w).dim() == x.dim() and w.shape[-1] == 1:
        w = w.squeeze(-1)
    _check.weights(name, w, tuple(x.shape[:-1]), cloud, x)
    return w
