"""The operations: schemas, the native library that serves them, and their shapes for tracing.

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
    plan_product       f, g and v (B, m, c) per pair          -> P v (B, n, c), of multiscale
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
from otloss.reference.arguments import Arguments, as_pairs, read

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
    "places_of_costs",
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
_library = torch.library.Library("otloss", "DEF")
for _schema in _SCHEMAS.strip().splitlines():
    _library.define(_schema)


def _grid_solve(*arguments: Any) -> Any:
    return reference.grid.solve(torch.ops.otloss.grid_means.default, *arguments)


def _load_native() -> Any:
    """The compiled module, whose import registers its kernels; None for a pure-Python install."""
    if importlib.util.find_spec("otloss._C") is not None:
        native = importlib.import_module("otloss._C")
        _library.impl("grid_solve", _grid_solve, "CUDA")  # a plain solver over the kernel of means
        if not native.build_info()["cuda_architectures"]:
            for name in (*reference.OPERATIONS, "grid_means"):
                _library.impl(name, getattr(reference, name), "CUDA")
        return native
    for name in (*reference.OPERATIONS, *reference.GRID_OPERATIONS):
        _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    warnings.warn(
        f"otloss in {os.path.dirname(__file__)} has no compiled kernels: every operation runs in "
        "plain torch, slowly. In a checkout, which Python started there imports before what is "
        "installed, `make build` compiles them; else install without OTLOSS_BUILD_NATIVE=0.",
        stacklevel=depth_of_caller(),
    )
    return None


_native = _load_native()
NATIVE = _native is not None
CUDA_KERNELS = NATIVE and bool(_native.build_info()["cuda_architectures"])


def serve_in_plain_torch(key: str) -> None:
    """From here on, in place of the kernels of a dispatch key."""
    for name in (*reference.OPERATIONS, "grid_means"):
        _library.impl(name, getattr(reference, name), key, allow_override=True)


def build_info() -> dict[str, str]:
    """Compiler, SIMD level and CUDA architectures of the native library; empty without it."""
    return dict(_native.build_info()) if NATIVE else {}


def describe_plan(like: Tensor, problems: int, n: int, m: int, d: int = 0) -> str:
    """How a number of solves of ``n`` x ``m`` is laid out on the GPU of ``like``.

    ``d``: coordinates of the points that costs are made from, 0 where they are stored.
    """
    double = like.dtype == torch.float64
    return str(_native.describe_plan(like.device.index, double, problems, n, m, d))


def set_progress(function: Callable[[int, float], None] | None) -> None:
    """``function(sweeps, error)`` is called while solves on a CPU take long, with 0 sweeps when an
    operation ends that called it."""
    if NATIVE:
        _native.set_progress(function)


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


@torch.library.impl("otloss::grid_adjoint", "CompositeExplicitAutograd", lib=_library)
def _(axes: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    tensors = [t for t in (*axes, *arguments) if t is not None]
    if any(t.numel() > 0 and t.untyped_storage().nbytes() == 0 for t in tensors):
        raise RuntimeError("otloss: tensors must have memory")  # torch would read it all the same
    return reference.grid.adjoint(grid_means, axes, *arguments)


# ------------------------------------------------------------------------ shapes, for tracing


@torch.library.register_fake("otloss::cost", lib=_library)
def _(points: list[Tensor], weights: list[Tensor], pairs: list[int], kind: int) -> list[Tensor]:
    sides = [(points[i], points[j]) for i, j in as_pairs(pairs)]
    return [x.new_empty(*x.shape[:2], y.shape[1]) for x, y in sides]


@torch.library.register_fake("otloss::cost_backward", lib=_library)
def _(*arguments: Any) -> list[Tensor]:
    _, _, points, *_, wanted = arguments
    return [torch.empty_like(points[c]) for c in wanted]


@torch.library.register_fake("otloss::solve", lib=_library)
def _(*arguments: Any) -> tuple[Any, ...]:
    problem, (init, _, _, n_iters, trace, dense, *rest) = read(arguments)
    sides = [(problem.weights[i], problem.weights[j]) for i, j in as_pairs(problem.pairs)]
    B = problem.weights[0].shape[0]
    single = bool(problem.points) and problem.points[0].dim() == 2
    loss = problem.weights[0].new_empty([] if single else [B])
    status = loss.new_empty(len(sides), B, 5, dtype=torch.float64)
    if dense and not (trace or init or problem.costs):
        packed = _empty_packed(problem, *rest)
        if packed:
            return loss, status, packed[:1], [], [], [], packed[1:]
    f, g = [torch.empty_like(a) for a, _ in sides], [torch.empty_like(b) for _, b in sides]
    traces, made = list[Tensor](), list[Tensor]()
    if trace:
        traces = [loss.new_empty(B, n_iters, a.shape[1] + b.shape[1]) for a, b in sides]
    if dense and not problem.costs:
        made = [_empty_rows(a, b.shape[1]) for a, b in sides]
    return loss, status, f, g, traces, made, _empty_prepared(problem.points, problem.multiscale)


def _empty_rows(a: Tensor, m: int) -> Tensor:
    """(B, n, m) as the kernels make it: on a CPU rows start on cache lines."""
    on_lines = NATIVE and a.device.type == "cpu"
    return a.new_empty(*a.shape, _whole(m, a) if on_lines else m)[..., :m]


def _whole(m: int, like: Tensor) -> int:
    """m entries up to whole cache lines."""
    line = 64 // like.element_size()
    return -(-m // line) * line


def _empty_packed(problem: Arguments, pack: bool = False, target: Any = None) -> list[Tensor]:
    """Potentials and what was prepared, of a solve that packs them; or none."""
    w = problem.weights
    if not (pack and NATIVE) or w[0].is_cuda:
        return []
    made = problem.pairs[:-2] if target is not None else problem.pairs
    potentials = sum(w[c].numel() for c in problem.pairs)
    entries = places_of_costs(problem.points, w, made)[-1]
    fits = entries * w[0].element_size() < _native.most_packed
    return [w[0].new_empty(potentials), w[0].new_empty(entries)] if fits else []


def places_of_costs(points: list[Tensor], weights: list[Tensor], pairs: list[int]) -> list[int]:
    """Where the cost of each pair begins in what is packed, at last where it ends."""
    places = [_whole(_count(points), weights[0])]
    for i, j in as_pairs(pairs):
        places.append(places[-1] + weights[i].numel() * _whole(weights[j].shape[1], weights[0]))
    return places


def _empty_prepared(points: list[Tensor], multiscale: bool) -> list[Tensor]:
    if not NATIVE or multiscale or not points or points[0].is_cuda:
        return []
    count = _count(points)
    kept = count * points[0].element_size() <= _native.most_kept
    return [points[0].new_empty(count)] if kept else []


def _count(points: list[Tensor]) -> int:
    """Entries of prepared clouds: coordinates, and a norm for each point."""
    return sum(x[..., 0].numel() for x in points) * (points[0].shape[-1] + 1)


def _gradients(
    problem: Arguments, want_costs: list[int], want_points: list[int], want_weights: bool
) -> tuple[list[Tensor], ...]:
    pairs = problem.pairs if want_weights else []
    return (
        [torch.empty_like(problem.costs[p]) for p in want_costs],
        [torch.empty_like(problem.points[c]) for c in want_points],
        [torch.empty_like(problem.weights[i]) for i in pairs[::2]],
        [torch.empty_like(problem.weights[j]) for j in pairs[1::2]],
    )


@torch.library.register_fake("otloss::envelope_backward", lib=_library)
def _(grad_loss: Tensor, *arguments: Any) -> tuple[list[Tensor], ...]:
    problem, (_, _, *wanted) = read(arguments)
    return _gradients(problem, *wanted[:3])


@torch.library.register_fake("otloss::unrolled_backward", lib=_library)
def _(grad_loss: Tensor, _f: Any, _g: Any, *arguments: Any) -> tuple[list[Tensor], ...]:
    problem, (_, _, *wanted) = read(arguments)
    return _gradients(problem, *wanted)


@torch.library.register_fake("otloss::implicit_backward", lib=_library)
def _(grad_loss: Tensor, _f: Any, _g: Any, *arguments: Any) -> tuple[Any, ...]:
    problem, (_, _, *wanted) = read(arguments)
    shape = len(problem.coefficients), problem.weights[0].shape[0], 2
    status = grad_loss.new_empty(shape, dtype=torch.float64)
    return *_gradients(problem, *wanted), status


@torch.library.register_fake("otloss::plan_product", lib=_library)
def _(*arguments: Any) -> list[Tensor]:
    problem, (_, _, v) = read(arguments)
    rows = [problem.weights[i] for i in problem.pairs[::2]]
    return [x.new_empty(*a.shape, x.shape[2]) for a, x in zip(rows, v, strict=True)]


@torch.library.register_fake("otloss::plan_gap", lib=_library)
def _(*arguments: Any) -> tuple[list[Tensor], ...]:
    _, (f, g, _, _) = read(arguments)
    return *([torch.empty_like(v) for v in vs] for vs in (f, g)), [
        v.new_empty(len(v), 2) for v in f
    ]


@torch.library.register_fake("otloss::extend", lib=_library)
def _(*arguments: Any) -> list[Tensor]:
    problem, _ = read(arguments)
    return [torch.empty_like(problem.weights[i]) for i in problem.pairs[::2]]


@torch.library.register_fake("otloss::grid_means", lib=_library)
def _(axes: list[Tensor], eps: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(u)


@torch.library.register_fake("otloss::grid_solve", lib=_library)
def _(*arguments: Any) -> tuple[Any, ...]:
    _, _, weights, pairs, *_ = arguments
    status = weights[0].new_empty(len(pairs) // 2, len(weights[0]), 5, dtype=torch.float64)
    return status, *([torch.empty_like(weights[c]) for c in pairs[side::2]] for side in (0, 1))


@torch.library.register_fake("otloss::grid_adjoint", lib=_library)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    a, b = arguments[3:5]
    return torch.empty_like(a), torch.empty_like(b), a.new_empty(len(a), 2)
