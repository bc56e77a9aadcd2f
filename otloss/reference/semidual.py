"""A point of the semidual, and what one sweep tells about it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from otloss.reference.engine import Engine
from otloss.reference.marginals import (
    SoftMean,
    damping,
    mean_and_magnitude,
    target_marginal,
)

# Where the iterations can start: at most this marginal error, and this residual in units of eps.
# The error alone does not see outliers, whose mass is small but whose potentials are far off.
NEAR_ERROR, NEAR_RESIDUAL = 0.6, 10.0
NO_MASS = 1e-20  # of the total: points with less mass in the target marginal take plain iterations
EXPONENT_LIMIT = 80.0  # of ratios, whose exponential must stay finite in float32


def column_ratio(g: Tensor, t: Tensor, eps: float, rho: float) -> Tensor:
    """The plan's column sums over those of the target marginal b share(g), where T_y(f) = t."""
    return ((g - t) / eps + g / rho).clamp(max=EXPONENT_LIMIT).exp()


def marginal_error(target: Tensor, ratio: Tensor) -> Tensor:
    """L1 distance of the plan's marginal to the target, over the latter's mass."""
    target = target.double()
    return (target * (ratio.double() - 1).abs()).sum(-1) / target.sum(-1)


class Point(NamedTuple):
    """A point of the semidual and what one sweep tells about it."""

    f: Tensor  # (n,) the best for g
    g: Tensor  # (m,)
    next_g: Tensor  # (m,) the plain iteration's
    target: Tensor  # (m,) the target marginal, of the total of b
    ratio: Tensor  # (m,) the plan's column sums over the target
    value: float  # what an accepted step raises
    noise: float  # its rounding error
    error: float  # the marginal error


def evaluate(engine: Engine, eps: float, g: Tensor) -> Point:
    """One sweep at g. Where a side is soft the point is moved by the best translation, which only
    shifts the softmins."""
    rho_x, rho_y, _ = engine.marginals
    f, mean_f, t = engine.iterate(eps, g)
    mean_g = mean_and_magnitude(g, engine.b, rho_y)
    unit = torch.finfo(g.dtype).eps
    if math.isinf(rho_x) and math.isinf(rho_y):
        value, size = (
            float(engine.mass[0] * u + engine.mass[1] * v)
            for u, v in zip(mean_f, mean_g, strict=True)
        )
        noise = 4 * unit * size
    else:
        shift, value, noise = _translation(engine, eps, mean_f, mean_g, unit)
        on_f = damping(rho_x, eps) * shift
        f = torch.where(engine.a > 0, f + on_f, 0.0)
        g = torch.where(engine.b > 0, g - shift, 0.0)
        t = torch.where(engine.b > 0, t - on_f, 0.0)
    target, ratio = target_marginal(g, engine.b, rho_y), column_ratio(g, t, eps, rho_y)
    error = float(marginal_error(target, ratio))
    return Point(f, g, damping(rho_y, eps) * t, target, ratio, value, noise, error)


def _translation(
    engine: Engine, eps: float, mean_f: SoftMean, mean_g: SoftMean, unit: float
) -> tuple[float, float, float]:
    """The best t of (f + damping t, g - t), and the value there with its rounding error.

    Without it a large rho takes some rho / eps iterations to find the plan's total M (Séjourné,
    Vialard, Peyré 2022). The dual is a constant less (rho_x + rho_y + eps) M, which rounding hides
    where M is small. So the value is -log M, times what makes it the semidual for an infinite rho.
    """
    rate_x, rate_y = 1 / engine.marginals.x, 1 / engine.marginals.y
    f, g, factor = float(mean_f.mean), float(mean_g.mean), damping(engine.marginals.x, eps)
    excess = math.log(engine.mass[0] / engine.mass[1]) - rate_x * f + rate_y * g
    t = excess / (rate_y + factor * rate_x)
    held, soft = sorted([rate_x, rate_y])
    mean = (1 + held / soft + eps * held) * (f + factor * t if rate_x < rate_y else g - t)
    size = unit * float(mean_f.magnitude + mean_g.magnitude)
    noise = 4 * (size + torch.finfo(torch.float64).eps * abs(mean))
    return t, engine.mass[1] * mean, engine.mass[1] * noise


def is_near(eps: float, point: Point) -> bool:
    residual = float((point.next_g - point.g).abs().max())
    return point.error <= NEAR_ERROR and residual <= NEAR_RESIDUAL * eps


def residual(engine: Engine, point: Point) -> Tensor:
    """next_g - g without its mean, which the semidual does not see."""
    r = point.next_g - point.g
    mean = float((point.target.double() * r.double()).sum()) / engine.mass[1]
    return torch.where(engine.b > 0, r - mean, 0.0)


def least_change(engine: Engine, eps: float, point: Point) -> float:
    """A smaller change of the residual, squared, is rounding, not curvature."""
    mass, unit = engine.mass[1], torch.finfo(point.g.dtype).eps
    rounding = 4 * (point.noise / mass + 4 * unit * eps)
    return rounding * rounding * mass
