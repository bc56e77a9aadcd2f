"""The options of a solve, each once: what it means, its default and its check.

They are checked when a loss or a module is made, before any tensor is looked at.
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any, Final, Literal, NamedTuple, TypedDict, TypeVar, get_args

import torch
from torch import Tensor

from otloss import _check
from otloss._check import describe
from otloss.costs import COSTS, Cost

__all__ = [
    "Backward",
    "EnergyMethod",
    "LossOptions",
    "Method",
    "Objective",
    "Options",
    "Precision",
    "check_cost",
    "check_eps",
    "check_options",
    "choice",
    "number",
]

Name = TypeVar("Name", bound=str)
Objective = Literal["regularized", "transport"]
Backward = Literal["auto", "envelope", "implicit", "unrolled"]
Method = Literal["auto", "dense", "streamed", "reference", "multiscale"]
EnergyMethod = Literal["auto", "dense", "streamed", "reference"]
Precision = Literal["float32", "tf32"]
OBJECTIVES: Final = get_args(Objective)  # their numbers are those of csrc/kernels.h
BACKWARDS: Final = get_args(Backward)
METHODS: Final = get_args(Method)
ENERGY_METHODS: Final = get_args(EnergyMethod)
PRECISIONS: Final = get_args(Precision)

Unbalanced = float | tuple[float | None, float | None] | None


class LossOptions(TypedDict, total=False):
    """The keyword arguments that losses share, for type checkers."""

    cost: Cost
    objective: Objective
    unbalanced: Unbalanced
    tol: float
    max_iters: int
    n_iters: int | None
    backward: Backward
    method: Method
    precision: Precision
    symmetric: bool | None


class Options(NamedTuple):
    """The checked keyword arguments of a solve."""

    # Regularisation, in units of cost: a float, or a tensor () or (B,) of float64, see eps.py.
    eps: Any
    cost: Cost
    objective: str  # what the value is: with the entropy or without
    rho_x: float  # the penalty that holds the plan to a; infinite is a constraint
    rho_y: float  # likewise to b
    tol: float  # the L1 marginal error over the total mass that ends a solve
    max_iters: int  # sweeps that end it too, with a warning
    n_iters: int  # exactly this number of iterations; -1: until converged
    backward: str  # which gradient
    method: str  # whether cost matrices are stored
    precision: str  # of inner products, where costs are not stored
    symmetric: bool | None  # of a cost function: c(x, y) = c(y, x); None: as its matrices say

    def balanced(self) -> bool:
        return self.rho_x == math.inf and self.rho_y == math.inf

    def learns_eps(self) -> bool:
        """Whether a derivative in eps may be wanted."""
        return isinstance(self.eps, Tensor) and self.eps.requires_grad and torch.is_grad_enabled()

    def gradient(self) -> str:
        """``backward``, where it is left open the mode that is exact for what was asked for.

        For the regularized value "implicit" and "envelope" are the same gradient.
        """
        if self.backward != "auto":
            return self.backward
        return "unrolled" if self.n_iters >= 0 else "implicit"

    def follows_iterations(self) -> bool:
        """Whether the gradient is that of the iterations that ran, not of the solution."""
        return self.gradient() == "unrolled"

    def holds_plan(self) -> bool:
        """Whether the gradient is that of a plan that is held constant."""
        return self.objective == "transport" and self.gradient() == "envelope"

    def solves_system(self) -> bool:
        """Whether the gradient of the value takes a linear system."""
        return self.objective == "transport" and self.gradient() == "implicit"


def check_options(
    eps: Any,
    *,
    cost: Any = "sqeuclidean",
    objective: Any = "regularized",
    unbalanced: Any = None,
    tol: Any = 1e-3,
    max_iters: Any = 1000,
    n_iters: Any = None,
    backward: Any = "auto",
    method: Any = "auto",
    precision: Any = "float32",
    symmetric: Any = None,
) -> Options:
    """Checks everything that a solve takes besides tensors."""
    given = (
        eps, cost, objective, unbalanced, tol, max_iters, n_iters, backward, method, precision,
        symmetric,
    )  # fmt: skip
    plain = isinstance(eps, float) and isinstance(cost, str)
    if plain and not torch.compiler.is_compiling():
        try:
            return _checked_before(*given)
        except TypeError:  # of what cannot be kept, or is wrong: then the check says it
            pass
    return _checked(*given)


def _checked(
    eps: Any, cost: Any, objective: Any, unbalanced: Any, tol: Any, max_iters: Any, n_iters: Any,
    backward: Any, method: Any, precision: Any, symmetric: Any,
) -> Options:  # fmt: skip
    rho_x, rho_y = _penalties(unbalanced)
    checked = Options(
        eps=check_eps(eps),
        cost=check_cost(cost),
        objective=choice("objective", objective, OBJECTIVES),
        rho_x=rho_x,
        rho_y=rho_y,
        tol=number("tol", tol),
        max_iters=count("max_iters", max_iters),
        n_iters=-1 if n_iters is None else count("n_iters", n_iters),
        backward=choice("backward", backward, BACKWARDS),
        method=choice("method", method, METHODS),
        precision=choice("precision", precision, PRECISIONS),
        symmetric=_symmetric(symmetric, cost),
    )
    if checked.backward == "unrolled" and n_iters is None:
        raise ValueError(
            'backward="unrolled" differentiates a fixed number of iterations: give n_iters, '
            "which was None"
        )
    return checked


# Checks take some percent of a small call.
_checked_before = functools.lru_cache(maxsize=64, typed=True)(_checked)


def check_eps(value: Any) -> float | Tensor:
    if not isinstance(value, Tensor):
        return number("eps", value)
    eps, finite = _check.floating("eps", value), "eps must be finite and > 0"
    if eps.dim() > 1 or eps.numel() == 0:
        raise ValueError(f"eps must have shape () or (B,), got {describe(eps)}")
    if _check.transformed():  # checked again where it is read
        return eps.double()
    good = ((eps.detach() > 0) & eps.detach().isfinite()).all()
    if _check.unread(eps):
        torch._assert_async(good, finite)
    elif _check.readable(eps) and not bool(good):
        raise ValueError(f"{finite}, got {eps.detach().tolist()}")
    return eps.double()


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {describe(value)}")
    try:
        result = float(value)
    except OverflowError:  # of an int, which has no infinity
        raise ValueError(f"{name} must be finite and > 0, got more than 1.8e308") from None
    # comparisons, which torch.compile can trace where math.isfinite it cannot
    if not -math.inf < result < math.inf or result <= 0:
        hint = "; None makes the marginal a constraint" if name == "unbalanced" else ""
        raise ValueError(f"{name} must be finite and > 0, got {value!r}{hint}")
    return result


def count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}: {value!r}")
    result = int(value)
    if result < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if result >= 2**63:
        raise ValueError(f"{name} must be less than 2**63, got {value}")
    return result


def choice(name: str, value: Any, allowed: tuple[Name, ...]) -> Name:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def check_cost(value: Any) -> Cost:
    if isinstance(value, str):
        return choice("cost", value, tuple(COSTS))
    if not callable(value):
        raise TypeError(
            f"cost must be a name or a function (x, y) -> C, got {type(value).__name__}"
        )
    return value


def _symmetric(value: Any, cost: Any) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"symmetric must be True, False or None, got {value!r}")
    if value is not None and isinstance(cost, str):
        raise ValueError(
            f"symmetric is for a cost given as a function, got symmetric={value} and "
            f"cost={cost!r}, which is symmetric"
        )
    return value


def _penalties(value: Any) -> tuple[float, float]:
    """``(rho_x, rho_y)``, infinite where the marginal is a hard constraint."""
    if value is None:
        return math.inf, math.inf
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(
            "unbalanced must be one number or a pair (rho_x, rho_y) with None for a hard "
            f"constraint, got {value!r}"
        )
    x, y = (math.inf if rho is None else number("unbalanced", rho) for rho in pair)
    return x, y
