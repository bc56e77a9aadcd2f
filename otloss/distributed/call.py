"""The arguments of a loss over several processes: checked, agreed on, and the clouds whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otloss import _check
from otloss._options import Options
from otloss.combination import Combination
from otloss.costs import COSTS, NAMED, without_padding
from otloss.distributed.ranks import Ranks, Shard
from otloss.problem import Problem, build_costs, check_clouds
from otloss.reference.engine import Clouds

__all__ = ["Call", "Cloud", "agree"]


class Cloud(NamedTuple):
    """This rank's points of a cloud and those of all ranks, in the dtype computed in."""

    shard: Shard
    points: Tensor  # (B, n_local, d), differentiable
    weights: Tensor  # (B, n_local), differentiable
    whole: Tensor  # (B, n, d)
    whole_weights: Tensor  # (B, n)


class Call(NamedTuple):
    """The arguments of a loss, checked and agreed on."""

    ranks: Ranks
    options: Options
    combination: Combination
    problem: Problem  # of this rank's points
    clouds: list[Cloud]

    def named(self) -> bool:
        return isinstance(self.options.cost, str)

    def between(self, x: Cloud, y: Cloud) -> Clouds | None:
        """What a start in closed form comes from; None for a cost function."""
        if not isinstance(self.options.cost, str):
            return None
        cost = NAMED[COSTS[self.options.cost]]
        return Clouds(cost, x.whole, y.whole, x.whole_weights, y.whole_weights)

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
    ranks: Ranks,
    clouds: dict[str, Any],
    given: dict[str, Any],
    combination: Combination,
    check: Callable[[], Options],
) -> Call:
    def checked() -> tuple[tuple[Options, Problem], tuple[dict[str, str], list[int]]]:
        options = check()
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
    whole, weights = [], list(given.values()) or [None] * len(clouds)
    for c, name in enumerate(clouds):
        shard = Shard.of(ranks, [sizes[c] for _, sizes in told])
        if shard.total == 0:
            raise ValueError(f"{name} must not be empty on every rank")
        whole.append(_gather(shard, problem.points[c], problem.weights[c], weights[c] is not None))
    for name, cloud in zip(given, whole, strict=False):
        if not bool((cloud.whole_weights.sum(-1) > 0).all()):
            raise ValueError(f"{name} must have a positive total, but all weights are 0")
    if options.balanced():
        a, b = (cloud.whole_weights for cloud in whole[:2])
        _check.same_mass(a, b, [w for w in weights if w is not None])
    return Call(ranks, options, combination, problem, whole)


def _gather(shard: Shard, x: Tensor, w: Tensor, given: bool) -> Cloud:
    x = (x if x.dim() == 3 else x.unsqueeze(0)).to(w.dtype)
    if not given:
        w = torch.full_like(w, 1 / shard.total)
    whole_weights = shard.gather(w.detach(), -1)
    (whole,) = without_padding([shard.gather(x.detach(), -2)], [whole_weights])
    return Cloud(shard, x, w, whole, whole_weights)
