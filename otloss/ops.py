"""The operations: schemas, and the native library that serves them.

A loss is a set of OT problems over a set of clouds, and all of them run in one call. ``pairs`` is
flat, ``[i0, j0, i1, j1, ...]``, and names the clouds of each problem; a pair ``(i, i)`` is a cloud
against itself. All tensors carry a batch dimension. The native kernels also take single clouds
(n, d), with weights (1, n): then the loss is (), and gradients of points are (n, d).

    cost               clouds                                 -> C (B, n, m) per pair
    cost_backward      gradients of costs                     -> gradients of the wanted clouds
    solve              problems                               -> loss (B,), status (P, B, 5), f and
                       g per pair, their traces if asked, costs if they were made and stored,
                       and on a CPU what it ``prepared`` of the points, up to 16 MiB
    envelope_backward  gradient of the loss, at fixed f and g, and what was prepared -> gradients
    unrolled_backward  gradients of the loss, f, g; traces    -> gradients
    implicit_backward  gradients of the loss, f, g            -> gradients, status (P, B, 2):
                       iterations and relative residual of the linear system
    plan_product       f, g and v (B, m, c) per pair          -> P v (B, n, c), of multiscale,
                       v and it in float64
    plan_gap           f, g and marginals, of multiscale      -> sums of the plan, and how far it
                                                                 is from one of the marginals
    extend             g                                      -> f at other points, of multiscale
    grid_means         log-weights and channels on a grid     -> log-sum-exps, means with weights
    grid_solve         densities on a grid                    -> status (P, B, 5), f and g per pair
    grid_adjoint       gradients of f and g on a grid         -> of the densities, status (B, 2)

Problems come as cost matrices, as points, or both: where there are no matrices, costs are made from
the points on the way. A given matrix may be (1, n, m), one for all problems; its
gradients are (B, n, m). Gradients are those of the pairs in ``want_costs`` and of the clouds in
``want_points``, in that order, and with ``want_weights`` of both sides' weights of every pair.

The loss is the sum over the pairs of a coefficient times OT of the pair, its terms: fields of
``status``, in float64. The gradient of the loss (B,) may be one for each term, (P, B). Totals of
weights that are 1 but for rounding are taken as 1. On a CPU both clouds of a balanced pair may have
one weight more than costs or points: those of dummy points, at cost 0 from all others and with a
forbidden pair between them. f, g and gradients of weights are with the dummies, those of costs and
points without; costs made from points are not stored then. ``rho`` holds rho_x and
rho_y: cloud 0 is held to its weights by rho_x, every other by rho_y; infinite is a constraint, and
without ``rho`` all are.
Numbers of the solver are float64 tensors on the CPU, so that a traced graph does not depend on
their values. ``eps`` is one for all problems or, on a CPU, (B,). ``tf32`` allows inner products of
points with 11 bits, where costs are not stored.
``multiscale`` leaves out pairs of points that hold nothing of the plan: from points, by the native
library alone; on a GPU for the regularized value and its envelope gradient.

``pack``: on a CPU, where costs are made and stored, fewer and larger tensors may be given back: all
potentials as one ``f``, f and g of each pair in turn, without ``g``; and the costs in the tensor of
what was prepared. ``envelope_backward`` of the same pairs takes both as they are.

``target``, of float64 on a CPU, is the solution of the last pair, a cloud against itself, from an
earlier call: (B, n + 5), its potential and its status. Its cost is not made.

Without the native library (a pure-Python install) ``otloss.reference`` serves them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, inf

from otloss import reference
from otloss._check import depth_of_caller
from otloss.reference.arguments import Arguments

__all__ = [
    "CUDA_KERNELS",
    "NATIVE",
    "build_info",
    "cost",
    "cost_backward",
    "describe_plan",
    "envelope_backward",
    "extend",
    "grid_adjoint",
    "grid_means",
    "grid_solve",
    "implicit_backward",
    "makes_plain_tensors",
    "number",
    "plan_gap",
    "plan_product",
    "problems",
    "serve_in_plain_torch",
    "set_progress",
    "solve",
    "unrolled_backward",
]

# Fields of one row of ``status``; csrc/kernels.h lists the same.
ITERATIONS, ERROR, CONVERGED, MAX_COST, TERM = range(5)

# csrc/bindings reads arguments in the order of these.
_CLOUDS = "Tensor[] points, Tensor[] weights, int[] pairs, int kind"
_PROBLEM = f"Tensor[] costs, {_CLOUDS}, float[] coefficients, Tensor eps, Tensor? rho, "
_PROBLEM += "int objective, bool tf32, bool multiscale"
_SEEDS = "Tensor grad_loss, Tensor[] grad_f, Tensor[] grad_g"
_WANTED = "int[] want_costs, int[] want_points, bool want_weights"
_GRADIENTS = "Tensor[] grad_costs, Tensor[] grad_points, Tensor[] grad_a, Tensor[] grad_b"
_SCHEMAS = f"""
cost({_CLOUDS}) -> Tensor[]
cost_backward(Tensor[] grad_costs, Tensor[] costs, {_CLOUDS}, int[] want_points) -> Tensor[]
solve({_PROBLEM}, Tensor[] init, Tensor tol, int max_iters, int n_iters, bool trace, bool dense, \
bool pack=False, Tensor? target=None) \
-> (Tensor loss, Tensor status, Tensor[] f, Tensor[] g, Tensor[] traces, Tensor[] made, \
Tensor[] prepared)
envelope_backward(Tensor grad_loss, {_PROBLEM}, Tensor[] f, Tensor[] g, {_WANTED}, \
Tensor? prepared=None) -> ({_GRADIENTS})
unrolled_backward({_SEEDS}, {_PROBLEM}, Tensor[] init, Tensor[] traces, {_WANTED}) -> ({_GRADIENTS})
implicit_backward({_SEEDS}, {_PROBLEM}, Tensor[] f, Tensor[] g, {_WANTED}) \
-> ({_GRADIENTS}, Tensor status)
plan_product({_PROBLEM}, Tensor[] f, Tensor[] g, Tensor[] v) -> Tensor[]
plan_gap({_PROBLEM}, Tensor[] f, Tensor[] g, Tensor[] to_a, Tensor[] to_b) \
-> (Tensor[] rows, Tensor[] columns, Tensor[] numbers)
extend({_PROBLEM}, Tensor[] g) -> Tensor[]
grid_means(Tensor[] axes, Tensor eps, Tensor v, Tensor u) -> (Tensor, Tensor)
grid_solve(Tensor[] axes, float[] spacing, Tensor[] weights, int[] pairs, Tensor eps, Tensor? rho, \
Tensor[] init, Tensor tol, int max_iters) -> (Tensor status, Tensor[] f, Tensor[] g)
grid_adjoint(Tensor[] axes, Tensor eps, Tensor? rho, Tensor a, Tensor b, Tensor f, Tensor g, \
Tensor grad_f, Tensor grad_g) -> (Tensor grad_a, Tensor grad_b, Tensor status)
"""
library = torch.library.Library("otloss", "DEF")
for _schema in _SCHEMAS.strip().splitlines():
    library.define(_schema)


def _grid_solve(*arguments: Any) -> Any:
    return reference.grid.solve(torch.ops.otloss.grid_means.default, *arguments)


def _load_native() -> Any:
    """The compiled module, whose import registers its kernels; None for a pure-Python install."""
    if importlib.util.find_spec("otloss._C") is not None:
        native = importlib.import_module("otloss._C")
        library.impl("grid_solve", _grid_solve, "CUDA")  # a plain solver over the kernel of means
        if not native.build_info()["cuda_architectures"]:
            for name in (*reference.OPERATIONS, "grid_means"):
                library.impl(name, getattr(reference, name), "CUDA")
        return native
    for name in (*reference.OPERATIONS, *reference.GRID_OPERATIONS):
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    warnings.warn(
        f"otloss in {os.path.dirname(__file__)} has no compiled kernels: every operation runs in "
        "plain torch, slowly. In a checkout, which Python started there imports before what is "
        "installed, `make build` compiles them; else install without OTLOSS_BUILD_NATIVE=0.",
        stacklevel=depth_of_caller(),
    )
    return None


native = _load_native()
NATIVE = native is not None
CUDA_KERNELS = NATIVE and bool(native.build_info()["cuda_architectures"])


def serve_in_plain_torch(key: str) -> None:
    """From here on, in place of the kernels of a dispatch key."""
    for name in (*reference.OPERATIONS, "grid_means"):
        library.impl(name, getattr(reference, name), key, allow_override=True)


def build_info() -> dict[str, str]:
    """Compiler, SIMD level and CUDA architectures of the native library; empty without it."""
    return dict(native.build_info()) if NATIVE else {}


def describe_plan(like: Tensor, problems: int, n: int, m: int, d: int = 0) -> str:
    """How a number of solves of ``n`` x ``m`` is laid out on the GPU of ``like``.

    ``d``: coordinates of the points that costs are made from, 0 where they are stored.
    """
    double = like.dtype == torch.float64
    return str(native.describe_plan(like.device.index, double, problems, n, m, d))


def set_progress(function: Callable[[int, float], None] | None) -> None:
    """``function(sweeps, error)`` is called while solves on a CPU take long, with 0 sweeps when an
    operation ends that called it."""
    if NATIVE:
        native.set_progress(function)


def number(value: float | Tensor) -> Tensor:
    """A number of the solver as operations take it: () float64 on the CPU; eps also (B,)."""
    if isinstance(value, Tensor):
        return value.reshape(-1 if value.dim() else ()).double().cpu().contiguous()
    if makes_plain_tensors():
        return _number(value)
    if torch.compiler.is_compiling():
        # A product stays symbolic in the graph, so that another value needs no other graph.
        return torch.ones((), dtype=torch.float64, device="cpu") * value
    return _number.__wrapped__(value)


def makes_plain_tensors() -> bool:
    """Whether what is made now can serve later calls: a graph that is traced has tensors of its
    own, and so has a dispatch mode, as of fake tensors."""
    return not (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())


@functools.lru_cache(maxsize=64)
def _number(value: float) -> Tensor:
    """Kept, because making one takes a few percent of a small call."""
    with torch.inference_mode(False):
        return torch.scalar_tensor(value, dtype=torch.float64, device="cpu")


def penalties(rho_x: float, rho_y: float) -> Tensor | None:
    """``rho``: (2,) likewise, None if both sides are constraints."""
    if rho_x == rho_y == inf:
        return None
    if torch.compiler.is_compiling():
        return torch.stack([number(rho_x), number(rho_y)])
    return torch.tensor((rho_x, rho_y), dtype=torch.float64, device="cpu")


def problems(
    weights: list[Tensor],
    pairs: list[int],
    coefficients: list[float],
    eps: float,
    *,
    costs: list[Tensor] | None = None,
    points: list[Tensor] | None = None,
    kind: int = 0,
    rho: tuple[float, float] = (inf, inf),
    objective: int = 0,
    tf32: bool = False,
    multiscale: bool = False,
) -> Arguments:
    """What operations on a set of problems take."""
    clouds = (points or [], weights, pairs, kind)
    numbers = number(eps), penalties(*rho)
    return Arguments(costs or [], *clouds, coefficients, *numbers, objective, tf32, multiscale)


cost = torch.ops.otloss.cost.default
cost_backward = torch.ops.otloss.cost_backward.default
solve = torch.ops.otloss.solve.default
envelope_backward = torch.ops.otloss.envelope_backward.default
unrolled_backward = torch.ops.otloss.unrolled_backward.default
implicit_backward = torch.ops.otloss.implicit_backward.default
plan_product = torch.ops.otloss.plan_product.default
plan_gap = torch.ops.otloss.plan_gap.default
extend = torch.ops.otloss.extend.default
grid_adjoint = torch.ops.otloss.grid_adjoint.default
grid_means = torch.ops.otloss.grid_means.default
grid_solve = torch.ops.otloss.grid_solve.default


@torch.library.impl("otloss::grid_adjoint", "CompositeExplicitAutograd", lib=library)
def _(axes: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    tensors = [t for t in (*axes, *arguments) if t is not None]
    if any(t.numel() > 0 and t.untyped_storage().nbytes() == 0 for t in tensors):
        raise RuntimeError("otloss: tensors must have memory")  # torch would read it all the same
    return reference.grid.adjoint(grid_means, axes, *arguments)
