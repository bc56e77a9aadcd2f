"""The operations: schemas, the native library that serves them, and their shapes for tracing.

Every operation takes lists: a loss is a set of OT problems over a set of clouds, and all of them
run in one call. ``pairs`` is flat, ``[i0, j0, i1, j1, ...]``, and names clouds; a pair ``(i, i)``
is a cloud against itself. All tensors carry a batch dimension.

    cost               clouds (B, n, d), weights (B, n) or none      -> costs (B, n, m) per pair
    cost_backward      gradients of costs                            -> gradients of wanted clouds
    solve              costs, weights                                -> loss (B,),
                       status (P, B, 4), potentials f and g per pair, their trace if asked
    envelope_backward  gradient of the loss                          -> gradients of costs, weights
    unrolled_backward  gradients of the loss, f, g; traces           -> gradients of costs, weights
    implicit_backward  gradients of the loss, f, g                   -> gradients of costs, weights,
                       status (P, B, 2): iterations and relative residual of the linear system
    solve_points       points, weights                               -> as solve, and costs per
                       pair if they are to be stored (`dense`)
    envelope_backward_points    gradient of the loss, costs or none  -> gradients of wanted clouds
    unrolled_backward_points    the two before without costs         -> gradients of wanted clouds,
    implicit_backward_points                                            weights (, status)

``tf32`` allows inner products of points with 11 bits, where costs are not stored.

The loss is the sum over the pairs of a coefficient times OT of the pair. Cloud 0 is held to its
weights by ``rho_x``, every other by ``rho_y``; infinite is a constraint.

Without the native library (a pure-Python install) ``otloss.reference`` serves them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from otloss import reference

__all__ = [
    "CUDA_KERNELS",
    "NATIVE",
    "build_info",
    "cost",
    "cost_backward",
    "describe_plan",
    "envelope_backward",
    "envelope_backward_points",
    "implicit_backward",
    "implicit_backward_points",
    "solve",
    "solve_points",
    "unrolled_backward",
    "unrolled_backward_points",
]

# Fields of one row of ``status``; csrc/kernels.h lists the same.
ITERATIONS, ERROR, CONVERGED, MAX_COST = range(4)

_library = torch.library.Library("otloss", "DEF")
_library.define(
    "cost(Tensor[] points, Tensor[] weights, int[] pairs, int kind) -> Tensor[]",
)
_library.define(
    "cost_backward(Tensor[] grad_costs, Tensor[] costs, Tensor[] points, Tensor[] weights, "
    "int[] pairs, int kind, int[] wanted) -> Tensor[]",
)
_library.define(
    "solve(Tensor[] costs, Tensor[] weights, int[] pairs, float[] coefficients, Tensor[] init, "
    "float eps, float rho_x, float rho_y, float tol, int max_iters, int n_iters, int objective, "
    "bool trace) "
    "-> (Tensor, Tensor, Tensor[], Tensor[], Tensor[])",
)
_library.define(
    "envelope_backward(Tensor grad_loss, Tensor[] costs, Tensor[] weights, int[] pairs, "
    "float[] coefficients, Tensor[] f, Tensor[] g, float eps, float rho_x, float rho_y, "
    "int objective, int[] want_cost, bool want_weights) -> (Tensor[], Tensor[], Tensor[])",
)
_library.define(
    "unrolled_backward(Tensor grad_loss, Tensor[] grad_f, Tensor[] grad_g, Tensor[] costs, "
    "Tensor[] weights, int[] pairs, float[] coefficients, Tensor[] init, Tensor[] traces, "
    "float eps, float rho_x, float rho_y, int objective, int[] want_cost, bool want_weights) "
    "-> (Tensor[], Tensor[], Tensor[])",
)
_library.define(
    "implicit_backward(Tensor grad_loss, Tensor[] grad_f, Tensor[] grad_g, Tensor[] costs, "
    "Tensor[] weights, int[] pairs, float[] coefficients, Tensor[] f, Tensor[] g, float eps, "
    "float rho_x, float rho_y, int objective, int[] want_cost, bool want_weights) "
    "-> (Tensor[], Tensor[], Tensor[], Tensor)",
)
_library.define(
    "solve_points(Tensor[] points, Tensor[] weights, int[] pairs, float[] coefficients, "
    "Tensor[] init, int kind, bool dense, float eps, float rho_x, float rho_y, float tol, "
    "int max_iters, int n_iters, int objective, bool trace, bool tf32=False) "
    "-> (Tensor, Tensor, Tensor[], Tensor[], Tensor[], Tensor[])",
)
_library.define(
    "envelope_backward_points(Tensor grad_loss, Tensor[] costs, Tensor[] points, "
    "Tensor[] weights, int[] pairs, float[] coefficients, Tensor[] f, Tensor[] g, int kind, "
    "float eps, int[] wanted, bool tf32=False) -> Tensor[]",
)
_library.define(
    "unrolled_backward_points(Tensor grad_loss, Tensor[] grad_f, Tensor[] grad_g, "
    "Tensor[] points, Tensor[] weights, int[] pairs, float[] coefficients, Tensor[] init, "
    "Tensor[] traces, int kind, float eps, float rho_x, float rho_y, int objective, "
    "int[] wanted, bool want_weights) -> (Tensor[], Tensor[], Tensor[])",
)
_library.define(
    "implicit_backward_points(Tensor grad_loss, Tensor[] grad_f, Tensor[] grad_g, "
    "Tensor[] points, Tensor[] weights, int[] pairs, float[] coefficients, Tensor[] f, "
    "Tensor[] g, int kind, float eps, float rho_x, float rho_y, int objective, int[] wanted, "
    "bool want_weights) -> (Tensor[], Tensor[], Tensor[], Tensor)",
)


def _load_native() -> Any:
    """The compiled module, whose import registers its kernels; None for a pure-Python install."""
    if importlib.util.find_spec("otloss._C") is not None:
        native = importlib.import_module("otloss._C")
        if not native.build_info()["cuda_architectures"]:
            for name in reference.OPERATIONS:
                _library.impl(name, getattr(reference, name), "CUDA")
        return native
    for name in reference.OPERATIONS:
        _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    warnings.warn(
        f"otloss in {os.path.dirname(__file__)} has no compiled kernels: every operation runs in "
        "plain torch, slowly. In a checkout, which Python started there imports before what is "
        "installed, `make build` compiles them; else install without OTLOSS_BUILD_NATIVE=0.",
        stacklevel=3,
    )
    return None


_native = _load_native()
NATIVE = _native is not None
CUDA_KERNELS = NATIVE and bool(_native.build_info()["cuda_architectures"])


def build_info() -> dict[str, str]:
    """Compiler, SIMD level and CUDA architectures of the native library; empty without it."""
    return dict(_native.build_info()) if NATIVE else {}


def describe_plan(like: Tensor, problems: int, n: int, m: int, d: int = 0) -> str:
    """How so many solves of ``n`` x ``m`` on the GPU of ``like`` are laid out.

    ``d``: coordinates of the points that costs are made from, 0 where they are stored.
    """
    double = like.dtype == torch.float64
    return str(_native.describe_plan(like.device.index, double, problems, n, m, d))


cost = torch.ops.otloss.cost.default
cost_backward = torch.ops.otloss.cost_backward.default
solve = torch.ops.otloss.solve.default
envelope_backward = torch.ops.otloss.envelope_backward.default
unrolled_backward = torch.ops.otloss.unrolled_backward.default
implicit_backward = torch.ops.otloss.implicit_backward.default
solve_points = torch.ops.otloss.solve_points.default
envelope_backward_points = torch.ops.otloss.envelope_backward_points.default
unrolled_backward_points = torch.ops.otloss.unrolled_backward_points.default
implicit_backward_points = torch.ops.otloss.implicit_backward_points.default


# ------------------------------------------------------------------------ shapes, for tracing


@torch.library.register_fake("otloss::cost", lib=_library)
def _(points: list[Tensor], weights: list[Tensor], pairs: list[int], kind: int) -> list[Tensor]:
    return [
        points[i].new_empty(points[i].shape[0], points[i].shape[1], points[j].shape[1])
        for i, j in reference.as_pairs(pairs)
    ]


@torch.library.register_fake("otloss::cost_backward", lib=_library)
def _(
    grad_costs: list[Tensor],
    costs: list[Tensor],
    points: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    kind: int,
    wanted: list[int],
) -> list[Tensor]:
    return [torch.empty_like(points[c]) for c in wanted]


@torch.library.register_fake("otloss::solve", lib=_library)
def _(
    costs: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    init: list[Tensor],
    eps: float,
    rho_x: float,
    rho_y: float,
    tol: float,
    max_iters: int,
    n_iters: int,
    objective: int,
    trace: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    B, P = costs[0].shape[0], len(costs)
    f = [torch.empty_like(weights[i]) for i, _ in reference.as_pairs(pairs)]
    g = [torch.empty_like(weights[j]) for _, j in reference.as_pairs(pairs)]
    traces = [c.new_empty(B, n_iters, c.shape[1] + c.shape[2]) for c in costs] if trace else []
    status = costs[0].new_empty(P, B, 4, dtype=torch.float64)
    return costs[0].new_empty(B), status, f, g, traces


def _empty_gradients(
    costs: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    want_cost: list[int],
    want_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    grad_costs = [_like(c, bool(w)) for c, w in zip(costs, want_cost, strict=True)]
    return grad_costs, *_empty_weight_gradients(weights, pairs, want_weights)


def _empty_weight_gradients(
    weights: list[Tensor], pairs: list[int], wanted: bool
) -> tuple[list[Tensor], list[Tensor]]:
    grad_a = [_like(weights[i], wanted) for i in pairs[::2]]
    grad_b = [_like(weights[j], wanted) for j in pairs[1::2]]
    return grad_a, grad_b


def _like(t: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(t) if wanted else t.new_empty(0)


@torch.library.register_fake("otloss::envelope_backward", lib=_library)
def _(
    grad_loss: Tensor,
    costs: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    f: list[Tensor],
    g: list[Tensor],
    eps: float,
    rho_x: float,
    rho_y: float,
    objective: int,
    want_cost: list[int],
    want_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return _empty_gradients(costs, weights, pairs, want_cost, want_weights)


@torch.library.register_fake("otloss::unrolled_backward", lib=_library)
def _(
    grad_loss: Tensor,
    grad_f: list[Tensor],
    grad_g: list[Tensor],
    costs: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    init: list[Tensor],
    traces: list[Tensor],
    eps: float,
    rho_x: float,
    rho_y: float,
    objective: int,
    want_cost: list[int],
    want_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return _empty_gradients(costs, weights, pairs, want_cost, want_weights)


@torch.library.register_fake("otloss::implicit_backward", lib=_library)
def _(
    grad_loss: Tensor,
    grad_f: list[Tensor],
    grad_g: list[Tensor],
    costs: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    f: list[Tensor],
    g: list[Tensor],
    eps: float,
    rho_x: float,
    rho_y: float,
    objective: int,
    want_cost: list[int],
    want_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    status = grad_loss.new_empty(len(costs), grad_loss.shape[0], 2, dtype=torch.float64)
    return *_empty_gradients(costs, weights, pairs, want_cost, want_weights), status


@torch.library.register_fake("otloss::solve_points", lib=_library)
def _(
    points: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    init: list[Tensor],
    kind: int,
    dense: bool,
    eps: float,
    rho_x: float,
    rho_y: float,
    tol: float,
    max_iters: int,
    n_iters: int,
    objective: int,
    trace: bool,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    B, sides = points[0].shape[0], reference.as_pairs(pairs)
    f = [torch.empty_like(weights[i]) for i, _ in sides]
    g = [torch.empty_like(weights[j]) for _, j in sides]
    traces = (
        [points[0].new_empty(B, n_iters, points[i].shape[1] + points[j].shape[1]) for i, j in sides]
        if trace
        else []
    )
    status = points[0].new_empty(len(sides), B, 4, dtype=torch.float64)
    costs = (
        [points[0].new_empty(B, points[i].shape[1], points[j].shape[1]) for i, j in sides]
        if dense
        else []
    )
    return points[0].new_empty(B), status, f, g, traces, costs


@torch.library.register_fake("otloss::envelope_backward_points", lib=_library)
def _(
    grad_loss: Tensor,
    costs: list[Tensor],
    points: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    f: list[Tensor],
    g: list[Tensor],
    kind: int,
    eps: float,
    wanted: list[int],
    tf32: bool = False,
) -> list[Tensor]:
    return [torch.empty_like(points[c]) for c in wanted]


@torch.library.register_fake("otloss::unrolled_backward_points", lib=_library)
def _(
    grad_loss: Tensor,
    grad_f: list[Tensor],
    grad_g: list[Tensor],
    points: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    init: list[Tensor],
    traces: list[Tensor],
    kind: int,
    eps: float,
    rho_x: float,
    rho_y: float,
    objective: int,
    wanted: list[int],
    want_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    grads = [torch.empty_like(points[c]) for c in wanted]
    return grads, *_empty_weight_gradients(weights, pairs, want_weights)


@torch.library.register_fake("otloss::implicit_backward_points", lib=_library)
def _(
    grad_loss: Tensor,
    grad_f: list[Tensor],
    grad_g: list[Tensor],
    points: list[Tensor],
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    f: list[Tensor],
    g: list[Tensor],
    kind: int,
    eps: float,
    rho_x: float,
    rho_y: float,
    objective: int,
    wanted: list[int],
    want_weights: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    grads = [torch.empty_like(points[c]) for c in wanted]
    status = grad_loss.new_empty(len(f), grad_loss.shape[0], 2, dtype=torch.float64)
    return grads, *_empty_weight_gradients(weights, pairs, want_weights), status
