"""A regularisation that suits the scale of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from otloss._options import check_cost, number
from otloss.cost_matrices import cost_matrix
from otloss.costs import Cost
from otloss.problem import check_clouds

__all__ = ["suggest_eps"]

SAMPLE = 512  # points of each cloud


@torch.no_grad()
def suggest_eps(
    x: Tensor,
    y: Tensor,
    cost: Cost = "sqeuclidean",
    sharpness: float = 0.05,
    *,
    generator: torch.Generator | None = None,
) -> float:
    """``sharpness`` times the mean cost between points of x and y.

    eps is absolute and has the units of the cost, so that a value that suits one data set means
    nothing for another. As a share of the mean cost it does:

    - 0.01 is sharp: a point goes to a few others near its image, the transport cost is about 2%
      above the exact one. Many iterations.
    - 0.1 is blurred: a point goes to a good part of the other cloud, the transport cost is about
      20% above the exact one. A few iterations, a smooth gradient.
    - 1 is nearly blind: a point goes almost everywhere, and the divergence is near
      :func:`otloss.energy_distance` with this cost, for ``"sqeuclidean"`` a distance of means.

    Choose it once, from representative data: an eps that follows the data from step to step makes a
    loss that is not the same function in any two steps.

    Args:
        x, y: clouds (n, d) and (m, d), or batches (B, n, d) and (B, m, d), which get one eps. Of
            clouds of more than 512 points, that number is drawn.
        cost: as in :func:`otloss.sinkhorn_divergence`.
        sharpness: share of the mean cost.
        generator: of the points drawn, on the CPU; default torch's own.

    Returns:
        A Python number, in units of cost and without a gradient; a GPU is waited for.

    Raises:
        ValueError, TypeError: a wrong argument, or a mean cost that is not positive.

    Example:
        >>> x, y = torch.zeros(10, 3), torch.ones(20, 3)
        >>> print(f"{otloss.suggest_eps(x, y):.2f}")  # 0.05 times the mean cost of 3
        0.15
    """
    cost, sharpness = check_cost(cost), number("sharpness", sharpness)
    points = check_clouds({"x": x, "y": y}).points
    x, y = (_sample(cloud, generator) for cloud in points)
    mean = cost_matrix(x, y, cost).mean().item()
    if not 0 < mean < float("inf"):
        raise ValueError(f"the mean cost between x and y must be positive and finite, got {mean:g}")
    return sharpness * mean


def _sample(x: Tensor, generator: torch.Generator | None) -> Tensor:
    if x.shape[-2] <= SAMPLE:
        return x
    drawn = torch.randperm(x.shape[-2], generator=generator)[:SAMPLE]
    return x.index_select(-2, drawn.to(x.device))
