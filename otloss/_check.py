"""Argument checks: a wrong call raises at once and says what was given and what is expected.

Checks that must read data are made on the CPU only: on CUDA they would stall the device.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "ConvergenceWarning",
    "compute_dtype",
    "finite",
    "finite_gradient",
    "finite_value",
    "matrix",
    "not_converged",
    "points",
    "readable",
    "resolution",
    "same_space",
    "weights",
]

DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What to do about a cloud of one axis, or of four.
FLATTER: Final = {1: "; numbers are points (n, 1)", 4: "; images are points after x.flatten(1)"}


class ConvergenceWarning(UserWarning):
    """The solver stopped at ``max_iters`` before its marginal error was below ``tol``."""


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
    return repr(value)


def transformed() -> bool:
    """Whether the call is inside of torch.func's vmap, grad or jacrev."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def no_transforms() -> None:
    """For what has no rule for torch.func."""
    if transformed():
        raise NotImplementedError(
            "this function of otloss does not work inside torch.func.vmap, grad, jacrev or jvp, as "
            "the losses, cost_matrix, solve and solve_sample do: give a batch (B, n, d) in place "
            "of vmap and differentiate with torch.autograd.grad"
        )


def not_batched(grads: Sequence[Tensor | None]) -> None:
    """The nodes have no rule for the vmap inside of torch.autograd.grad."""
    if torch.compiler.is_compiling():
        return
    for grad in grads:
        if grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad):
            raise NotImplementedError(
                "gradients of otloss cannot be taken with is_grads_batched=True, nor by "
                "torch.autograd.functional with vectorize=True: use torch.func.jacrev, or "
                "torch.func.vmap of torch.func.grad, or take them one at a time"
            )


# -------------------------------------------------------------------------------------- tensors


def floating(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be a floating-point tensor (float16, bfloat16, float32 or float64), got "
            f"{describe(value)}"
        )
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one: pad clouds to one size with points "
            "of weight 0"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    return value


def points(name: str, value: Any, part: bool = False) -> Tensor:
    """A cloud (n, d) or (B, n, d), not empty; or a part of one, which may have no points."""
    no_transforms()
    x = cloud(name, value)
    if 0 in (x.shape[:-2] + x.shape[-1:] if part else x.shape):
        raise ValueError(f"{name} must not be empty, got {describe(x)}")
    return x


def cloud(name: str, value: Any) -> Tensor:
    if isinstance(value, list | tuple):
        kind = type(value).__name__
        raise TypeError(
            f"{name} must be a torch.Tensor, got {kind}: otloss.pad makes one of a list of clouds"
        )
    x = floating(name, value)
    if x.dim() not in (2, 3):
        given = describe(x) + FLATTER.get(x.dim(), "")
        raise ValueError(f"{name} must have shape (n, d) or (B, n, d), got {given}")
    return x


def same_space(reference_name: str, reference: Tensor, name: str, value: Tensor) -> None:
    """The two clouds must be comparable: batch, dimension, device."""
    if value.dim() != reference.dim():
        raise ValueError(
            f"{reference_name} and {name} must both be single clouds or both batches, got "
            f"{describe(reference)} and {describe(value)}; one cloud for a whole batch is (1, n, d)"
        )
    if value.dim() == 3 and value.shape[0] != reference.shape[0]:
        raise ValueError(
            f"{reference_name} and {name} must have the same batch size B, got "
            f"{reference.shape[0]} and {value.shape[0]}"
        )
    if value.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"{reference_name} and {name} must have the same dimension d, got "
            f"{reference.shape[-1]} and {value.shape[-1]}"
        )
    same_device(reference_name, reference, name, value)


def same_device(reference_name: str, reference: Tensor, name: str, value: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(
            f"{reference_name} and {name} must be on one device, got {reference.device} and "
            f"{value.device}"
        )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32; a mixture under autocast is float32."""
    doubles = [t.dtype == torch.float64 for t in tensors]
    if any(doubles) and (all(doubles) or not torch.is_autocast_enabled(tensors[0].device.type)):
        return torch.float64
    return torch.float32


def matrix(value: Any) -> Tensor:
    no_transforms()
    C = floating("C", value)
    if C.dim() not in (2, 3):
        raise ValueError(f"C must have shape (n, m) or (B, n, m), got {describe(C)}")
    if 0 in C.shape:
        raise ValueError(f"C must not be empty, got {describe(C)}")
    return C


def traced(t: Tensor) -> bool:
    """Whether there is no data to look at: in compiled code, and of fake tensors."""
    return torch.compiler.is_compiling() or isinstance(t, FakeTensor)


def readable(t: Tensor) -> bool:
    """Whether looking at the data costs no synchronisation and breaks no graph."""
    return t.is_cpu and not traced(t)


def unread(t: Tensor) -> bool:
    """Whether compiled code may raise when it runs. On a GPU that would be the context's end."""
    return t.is_cpu and traced(t)


def weights(
    name: str,
    value: Any,
    shape: tuple[int, ...],
    like_name: str,
    like: Tensor,
    part: bool = False,
) -> None:
    """One weight per point, in a batch one row for all problems or for each; of a part of a cloud
    all may be 0."""
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        raise TypeError(
            f"{name} must be floating-point weights, got a mask: give "
            "mask / mask.sum(-1, keepdim=True)"
        )
    w = floating(name, value)
    if tuple(w.shape) not in (shape, (1, *shape[1:]) if len(shape) == 2 else shape):
        raise ValueError(
            f"{name} must have shape {shape}, one weight per point of {like_name}, got "
            f"{describe(w)}"
        )
    same_device(like_name, like, name, w)
    negative = f"{name} must be non-negative"
    if unread(w):
        torch._assert_async((w.detach() >= 0).all(), negative)
    if not readable(w) or w.numel() == 0:
        return
    least, largest = (float(v) for v in w.detach().aminmax())
    if math.isnan(least) or least < 0:
        raise ValueError(f"{negative}, but its least value is {least}")
    if math.isinf(largest):
        raise ValueError(f"{name} must be finite, but its largest value is {largest}")
    if not part and not bool((w.detach().sum(-1) > 0).all()):
        raise ValueError(f"{name} must have a positive total, but its weights are all 0")


def same_mass(a: Tensor, b: Tensor, given: Sequence[Tensor | None], note: str = "") -> None:
    """Balanced transport needs equal totals, to the rounding of the weights that were ``given``."""
    if not a.is_cpu:
        return
    x, y = a.detach().sum(-1).double(), b.detach().sum(-1).double()
    tolerance = max([1e-4, *(2 * torch.finfo(w.dtype).eps for w in given if w is not None)])
    excess = (x - y).abs() - tolerance * x
    equal = (excess <= 0).all()
    demand = "a and b must have the same total mass for balanced transport"
    if unread(a):
        torch._assert_async(equal, demand)
    elif not bool(equal):
        worst = int(excess.argmax())
        of = f" in problem {worst} of {len(x)}" if len(x) > 1 else ""
        raise ValueError(
            f"{demand}, got {x[worst]:.6g} and {y[worst]:.6g}{of}; normalise them or give "
            f"unbalanced={note}"
        )


def finite(name: str, value: Tensor) -> None:
    """Raises where NaN or infinity stands in the data."""
    bad = ~torch.isfinite(value.detach())
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        first = value.detach()[where].item()
        raise ValueError(
            f"{name} must be finite, but {name}{list(where)} is {first}; "
            f"{int(bad.sum())} of {bad.numel()} values are NaN or infinite"
        )


def finite_value(of: str, value: Tensor, inputs: Iterable[tuple[str, Tensor]] = ()) -> None:
    """Raises on the CPU where a value is NaN or infinite, of inputs that are, or too large."""
    if readable(value) and not bool(value.detach().isfinite().all()):
        for name, x in inputs:
            finite(name, x)
        raise ValueError(
            f"costs must be finite in {of}, and sums not overflow {value.dtype}: scale data down"
        )


def finite_gradient(grad: Tensor | None) -> None:
    """Warns where a cost function has no finite derivative."""
    if grad is not None and readable(grad) and not bool(grad.isfinite().all()):
        warnings.warn(
            f"the gradient of cost= is NaN or infinite at {int((~grad.isfinite()).sum())} of "
            f"{grad.numel()} coordinates. A square root at 0, as of |x - x|, has no finite "
            'derivative: use cost="euclidean" or torch.cdist, or add a small constant inside',
            stacklevel=depth_of_caller(),
        )


def resolution(eps: float | Tensor, max_cost: float | Tensor, dtype: torch.dtype) -> None:
    """Below this eps, (f + g - C) / eps has no correct digit in the dtype, or f and g underflow."""
    about = torch.finfo(dtype)
    unit, small = 4 * about.eps, about.tiny / about.eps
    if isinstance(max_cost, Tensor):  # compiled code has not read it
        below = f"eps is below what {dtype} can resolve against the costs"
        torch._assert_async(~((unit * max_cost).clamp(min=small) > eps).any(), below)
        return
    least = max(unit * max_cost, small)
    if eps < least:
        masks = f"write infinite ones, or smaller ones: at most {eps / unit:.3g}"
        scale = (
            "larger scale"
            if least == small
            else f"smaller scale. If large costs forbid pairs, {masks}"
        )
        raise ValueError(
            f"eps={eps:g} is below what {dtype} can resolve against costs up to {max_cost:g} "
            f"(least: {least:.3g}); use float64, a larger eps, or data of {scale}"
        )


def distances(problem: Any, degree: int, means: float | Tensor) -> None:
    """Raises where points of positive weight differ, but the squares of their distances lose digits
    to underflow. ``means``: of the costs of each problem, the distances to the power ``degree``, or
    a bound; they say whether to look. Degree 0: of other costs, which are not looked at."""
    if degree:
        powers(problem, 2.0, means ** (2 / degree), spare=1e8)


def powers(problem: Any, p: float, means: float | Tensor, spare: float = 1.0) -> None:
    """The same for the power p of distances, and its values below ``spare`` times the least."""
    w = problem.weights[0]
    limit = spare * torch.finfo(w.dtype).tiny
    if not unread(w):
        means = means.detach().amin() if isinstance(means, Tensor) else means
        if not readable(w) or means >= limit:
            return
    sides = [
        (x.detach(), w.detach()[..., : x.shape[-2], None] > 0)  # without dummies
        for x, w in zip(problem.points, problem.weights, strict=True)
    ]
    most = torch.stack([torch.where(there, x, -torch.inf).amax(-2) for x, there in sides])
    least = torch.stack([torch.where(there, x, torch.inf).amin(-2) for x, there in sides])
    apart = (most.amax(0) - least.amin(0)).amax(-1)
    near = (apart > 0) & (apart < (4 * limit) ** (1 / p))
    kind = "squares of distances" if p == 2 else f"distances to the power {p:g}"
    message = f"{kind} underflow {w.dtype}: points of {' and '.join(problem.names)} are "
    if unread(w):
        torch._assert_async(~near.any(), message + "too near to each other. Scale the data up")
    elif bool(near.any()):
        raise ValueError(f"{message}at most {float(apart[near][0]):.3g} apart. Scale the data up")


def not_converged(
    options: Any, iterations: int, error: float, max_cost: float, dtype: torch.dtype
) -> None:
    """Warns, at the line outside otloss that made the call."""
    message = f"Sinkhorn stopped after {iterations} iterations at a marginal error of {error:.2e}, "
    if error <= options.tol:  # but the solver doubts the value
        message += (
            f"within tol={options.tol:g}, but mass may still have to go far, up to a cost of "
            f"{max_cost:.3g}, so that the value can be off by much. Raise max_iters (now "
            f"{options.max_iters}), or lower tol, or see duality_gap of a result."
        )
    elif iterations < options.max_iters:  # potentials are of the size of the costs
        least = options.eps * error / options.tol
        message += (
            f"above tol={options.tol:g}. {dtype} resolves no smaller one here, against costs up to "
            f"{max_cost:.3g}: use {'' if dtype == torch.float64 else 'float64, '}an eps of about "
            f"{least:.2g} or more (now {options.eps:g}), or a larger tol."
        )
    else:
        message += (
            f"above tol={options.tol:g}. Raise max_iters (now {options.max_iters}), eps (now "
            f"{options.eps:g}; the largest cost is {max_cost:.3g}) or tol."
        )
    warnings.warn(message, ConvergenceWarning, stacklevel=depth_of_caller())


def depth_of_caller() -> int:
    """The ``stacklevel`` that points a warning at the first frame outside otloss and torch."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back and _package(frame) in ("otloss", "torch", "importlib"):
        frame = frame.f_back
        depth += _package(frame) != "importlib"  # warnings counts no frames of an import
    return depth


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
