"""Mean costs between clouds: the energy distance, by matrices or by blocks of their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from otloss import _check
from otloss.combination import DEBIASED
from otloss.cost_matrices import (
    build_costs,
    hide_padding,
    ready_for_blocks,
    see_empty_bins,
    seen_costs,
    with_empty_bins,
)
from otloss.costs import COSTS, NAMED, Cost, degree
from otloss.method import exceeds_budget, in_blocks
from otloss.problem import Problem
from otloss.reference.arguments import as_pairs

__all__ = ["energy"]


def energy(problem: Problem, cost: Cost, method: str) -> Tensor:
    """The energy distance of checked clouds, whose totals may differ."""
    by_rows = _streams_rows(problem, cost, method)
    # By rows no matrix of a function says which bins are empty; the points do.
    seen_by = "euclidean" if by_rows else cost
    problem = see_empty_bins(problem, DEBIASED.pairs, seen_by, method)
    pairs, w = as_pairs(DEBIASED.pairs), problem.weights
    if by_rows:
        problem = problem if isinstance(cost, str) else ready_for_blocks(problem)
        terms = [_mean_cost_in_blocks(problem, i, j, cost) for i, j in pairs]
    else:
        costs = _costs_of_means(problem, DEBIASED.pairs, cost, method)
        terms = [_mean_cost(C, w[i], w[j]) for C, (i, j) in zip(costs, pairs, strict=True)]
    loss = (terms[0] - 0.5 * terms[1] - 0.5 * terms[2]).to(w[0].dtype)
    _check.finite_value("an energy distance", loss, zip(problem.names, problem.points, strict=True))
    _check.distances(problem, degree(cost), terms[0])
    return loss if problem.batched else loss[0]


def _streams_rows(problem: Problem, cost: Cost, method: str) -> bool:
    """Whether an energy distance makes its cost matrices a block of rows at a time."""
    if method != "auto" or (torch.compiler.is_compiling() and not isinstance(cost, str)):
        return method == "streamed"
    a, b = problem.weights
    entries = a.shape[0] * (a.shape[1] * b.shape[1] + a.shape[1] ** 2 + b.shape[1] ** 2)
    return exceeds_budget(entries * a.element_size(), a.device)


def _mean_cost_in_blocks(problem: Problem, i: int, j: int, cost: Cost) -> Tensor:
    pair = problem.of_pair(i, j)
    x, b = pair.points[0], pair.weights[1]
    count = torch.arange(b.shape[1], device=b.device)

    def of_block(rows: slice) -> tuple[Tensor, ...]:
        block = pair.of_rows(rows)
        (C,) = _costs_of_means(block, [0, 1], cost, "streamed")
        # A cost to itself is exactly 0, which a kernel that sees two clouds cannot know.
        if i == j and isinstance(cost, str):
            own = NAMED[COSTS[cost]].is_zero_to_itself(x)[..., rows].unsqueeze(-1)
            C = torch.where(own & (count[rows].unsqueeze(-1) == count), 0.0, C)
        return (_mean_cost(C, *block.weights),)

    parts = in_blocks(of_block, x.shape[-2], b, [*pair.reads(cost), *pair.weights])
    return torch.stack([part for (part,) in parts]).sum(0)


def _costs_of_means(problem: Problem, pairs: list[int], cost: Cost, method: str) -> list[Tensor]:
    """C of each pair, 0 for padding: finite, so that 0 * C is 0."""
    costs, w = build_costs(problem, pairs, cost, method), problem.weights
    parts = list(zip(costs, as_pairs(pairs), strict=True))
    if not problem.present:
        return [hide_padding(problem, C, w[i], w[j]) for C, (i, j) in parts]
    seen = problem.seen or seen_costs(problem, pairs, cost, method)
    return [with_empty_bins(C, S, w[i], w[j]) for S, (C, (i, j)) in zip(seen, parts, strict=True)]


def _mean_cost(C: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # Sums instead of a matrix product, which autocast would run in half precision. Over the rows in
    # double: means of close clouds cancel, and of what is left the rounding of one sum is much.
    return (a.double() * (C * b.unsqueeze(-2)).sum(-1).double()).sum(-1)
