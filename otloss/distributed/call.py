"""The arguments of a loss over several processes: checked, agreed on, and the clouds whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otloss import _check
from otloss._options import Options
from otloss.cost_matrices import build_costs
from otloss.costs import COSTS, NAMED, without_padding
from otloss.distributed.ranks import Ranks, Shard
from otloss.problem import Problem, check_clouds
from otloss.reference.engine import Clouds
from otloss.totals import Totals, at_unit_totals

__all__ = ["Call", "Cloud", "agree"]


class Cloud(NamedTuple):
    """This rank's points of a cloud and those of all ranks, in the dtype computed in."""

    shard: Shard
    points: Tensor  # (B, n_local, d), differentiable
    whole: Tensor  # (B, n, d)
    weights: Tensor  # (B, n), of all ranks

    def own_weights(self) -> Tensor:
        return self.shard.own(self.weights).contiguous()


class Call(NamedTuple):
    """The arguments of a loss, checked and agreed on."""

    ranks: Ranks
    options: Options
    problem: Problem  # this rank's points, the weights of all; differentiable in this rank's
    unit: Problem  # with the weights that are solved with
    totals: Totals | None  # of the weights, where these are not those that are solved with
    clouds: list[Cloud]

    def named(self) -> bool:
        return isinstance(self.options.cost, str)

    def between(self, x: Cloud, y: Cloud) -> Clouds | None:
        """What a start in closed form comes from; None for a cost function."""
        if not isinstance(self.options.cost, str):
            return None
        cost = NAMED[COSTS[self.options.cost]]
        return Clouds(cost, x.whole, y.whole, x.weights, y.weights)

    def costs(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """C (B, n, m) of some points; differentiable for a cost function."""
        if self.named() and 0 in (a.shape[1], b.shape[1]):
            return x.new_zeros(len(x), a.shape[1], b.shape[1])
        points = (x, y) if self.problem.batched else (x[0], y[0])
        pair = replace(self.problem, points=points, weights=(a, b))
        return build_costs(pair, [0, 1], self.options.cost, "dense")[0]


def _settings(options: Options, problem: Problem, given: dict[str, Any]) -> dict[str, str]:
    """What must be the same on every rank, by the name in which it is refused."""
    settings: dict[str, Any] = options._asdict()
    settings["unbalanced"] = settings.pop("rho_x"), settings.pop("rho_y")
    if callable(options.cost):
        settings["cost"] = getattr(options.cost, "__qualname__", type(options.cost).__qualname__)
    x, w = problem.points[0], problem.weights[0]
    settings |= {
        "the loss": problem.names,
        "the dtype": w.dtype,
        "the dimension d": x.shape[-1],
        "the batch size B": len(x) if problem.batched else None,
        "whether weights are given": [name for name, w in given.items() if w is not None],
        # Ranks that round alike decide alike.
        "the version of torch": torch.__version__,
        "the kind of processor": (x.device.type, torch.backends.cpu.get_cpu_capability()),
        "the number of threads": torch.get_num_threads(),
    }
    return {name: str(value) for name, value in settings.items()}


def agree(
    ranks: Ranks, clouds: dict[str, Any], given: dict[str, Any], check: Callable[[], Options]
) -> Call:
    def checked() -> tuple[tuple[Options, Problem], tuple[dict[str, str], list[int]]]:
        options = check()
        if isinstance(options.eps, Tensor):
            raise TypeError("eps must be a number over several processes, got a tensor")
        if options.backward != "envelope":
            raise NotImplementedError(
                f"backward={options.backward!r} is not available over several processes: use "
                '"envelope", or gather the points and call the loss of otloss itself'
            )
        problem = check_clouds(clouds, given, balanced=False, parts=True)
        sizes = [w.shape[1] for w in problem.weights]
        return (options, problem), (_settings(options, problem, given), sizes)

    (options, problem), told = ranks.agree(checked)
    for name in told[0][0]:
        values = [settings[name] for settings, _ in told]
        if len(set(values)) > 1:
            raise ValueError(f"{name} must be the same on every rank, got {', '.join(values)}")
    shards = [Shard.of(ranks, list(sizes)) for sizes in zip(*(s for _, s in told), strict=True)]
    for name, shard in zip(clouds, shards, strict=True):
        if shard.total == 0:
            raise ValueError(f"{name} must not be empty on every rank")
    whole_weights = _whole_weights(shards, problem, given)
    present = tuple(
        _present(shard, x.detach(), w.detach())
        for shard, x, w in zip(shards, problem.points, whole_weights, strict=True)
    )
    problem = replace(problem, weights=whole_weights, present=present)
    if problem.padded:
        for name, w in zip(given, problem.weights, strict=True):
            if not bool((w.sum(-1) > 0).all()):
                raise ValueError(f"{name} must have a positive total, but all weights are 0")
        if options.balanced():
            a, b = problem.weights
            _check.same_mass(a, b, [w for w in given.values() if w is not None])
    unit, totals = at_unit_totals(problem, options)
    whole = [
        _cloud(shard, x, w.detach())
        for shard, x, w in zip(shards, problem.points, unit.weights, strict=True)
    ]
    return Call(ranks, options, problem, unit, totals, whole)


def _whole_weights(
    shards: list[Shard], problem: Problem, given: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Those of all ranks, differentiable in this rank's."""
    whole, named = [], list(given.values()) or [None] * len(shards)
    for shard, w, of_user in zip(shards, problem.weights, named, strict=True):
        if of_user is None:
            whole.append(w.new_full((len(w), shard.total), 1 / shard.total))
        else:
            before, _, after = shard.gather(w.detach()).tensor_split(
                [shard.first, shard.first + shard.size], dim=-1
            )
            whole.append(torch.cat([before, w, after], dim=-1))
    return tuple(whole)


def _present(shard: Shard, x: Tensor, w: Tensor) -> Tensor:
    """(B, n): what is no padding. Of points of weight 0, which give no other points a gradient,
    those of this rank alone."""
    there = w > 0
    finite = (4 * x.to(w.dtype).square().sum(-1)).isfinite()
    shard.own(there).logical_or_(finite)
    return there


def _cloud(shard: Shard, x: Tensor, weights: Tensor) -> Cloud:
    x = (x if x.dim() == 3 else x.unsqueeze(0)).to(weights.dtype)
    (whole,) = without_padding([shard.gather(x.detach(), -2)], [weights])
    return Cloud(shard, x, whole, weights)
