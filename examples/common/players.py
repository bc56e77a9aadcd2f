"""Networks that are trained against each other: whose turn it is, and how each one moves."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from common import ranks, run

Optimiser = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


class Players:
    """Networks by name, each with an optimiser of its own and the learning rate of ``--schedule``.

    ``turn(name, step)`` prepares a backward pass that reaches the weights of this player alone,
    and ``move(name)`` takes its step.
    """

    def __init__(
        self, args: argparse.Namespace, networks: Mapping[str, nn.Module], optimiser: Optimiser
    ) -> None:
        self.args, self.networks = args, networks
        self.optimisers = {name: optimiser(net.parameters()) for name, net in networks.items()}

    def turn(self, name: str, step: int) -> None:
        for other, network in self.networks.items():
            network.requires_grad_(other == name)
        run.set_rate(self.optimisers[name], self.args, step)
        self.optimisers[name].zero_grad()

    def move(self, name: str) -> None:
        ranks.add_up(self.networks[name].parameters())
        self.optimisers[name].step()

    def state(self) -> dict[str, run.Stateful]:
        """What a checkpoint must hold, apart from the generator, which every run saves."""
        parts: dict[str, Any] = {k: v for k, v in self.networks.items() if k != "generator"}
        return parts | {f"{name}_optimiser": item for name, item in self.optimisers.items()}


def adam(lr: float, betas: tuple[float, float] = (0.5, 0.999)) -> Optimiser:
    """Adam as generative adversarial networks use it."""
    return lambda weights: torch.optim.Adam(weights, lr, betas=betas)


def rmsprop(lr: float) -> Optimiser:
    """RMSprop, where momentum is known to break a critic with clipped weights."""
    return lambda weights: torch.optim.RMSprop(weights, lr)


@torch.no_grad()
def clip(network: nn.Module, bound: float) -> None:
    """Every weight into [-bound, bound]."""
    for weight in network.parameters():
        weight.clamp_(-bound, bound)
