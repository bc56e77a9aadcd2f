"""Networks of the training scripts, and the moving average of their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

PRIORS = ("unit", "uniform", "normal")


class Generator(nn.Module):
    """A network together with the distribution of its input.

    ``prior`` is ``"unit"`` (uniform on [0,1]^k), ``"uniform"`` (on [-1,1]^k) or ``"normal"``.
    """

    def __init__(self, net: nn.Module, latent: int, prior: str) -> None:
        super().__init__()
        if prior not in PRIORS:
            raise ValueError(f"--prior is {prior!r}, expected one of {', '.join(PRIORS)}")
        self.net, self.latent, self.prior = net, latent, prior

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z)

    def draw(self, n: int) -> Tensor:
        """``n`` latent vectors, on the device of the weights."""
        z = next(self.parameters()).new_empty(n, self.latent)
        if self.prior == "normal":
            return z.normal_()
        return z.uniform_(0.0 if self.prior == "unit" else -1.0, 1.0)

    @torch.no_grad()
    def generate(self, z: Tensor, chunk: int = 1000) -> Tensor:
        """Images of the latent vectors ``z`` in evaluation mode, in chunks, without a graph."""
        training = self.training
        self.eval()
        images = torch.cat([self(part) for part in z.split(chunk)])
        self.train(training)
        return images

    def latent_grid(self, side: int) -> Tensor:
        """A ``side`` x ``side`` grid of equal probability mass over a 2-D latent, row by row."""
        if self.latent != 2:
            raise ValueError(f"latent is {self.latent}, expected 2 for a grid")
        ticks = (torch.arange(side) + 0.5) / side
        quantiles = {"unit": ticks, "uniform": 2 * ticks - 1, "normal": torch.special.ndtri(ticks)}
        q = quantiles[self.prior].to(next(self.parameters()).device)
        return torch.cartesian_prod(q, q)


def mlp_generator(
    shape: Sequence[int],
    latent: int,
    prior: str,
    hidden: Sequence[int] = (256, 512, 1024),
    dropout: float = 0.0,
) -> Generator:
    """Linear-BatchNorm-ReLU-Dropout blocks and a tanh output reshaped to ``shape``."""
    layers: list[nn.Module] = []
    sizes = [latent, *hidden]
    for fan_in, fan_out in pairwise(sizes):
        # BatchNorm subtracts the mean, so a bias before it would do nothing.
        layers += [nn.Linear(fan_in, fan_out, bias=False), nn.BatchNorm1d(fan_out), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    layers += [nn.Linear(sizes[-1], math.prod(shape)), nn.Tanh(), nn.Unflatten(1, tuple(shape))]
    return Generator(nn.Sequential(*layers), latent, prior)


class Classifier(nn.Module):
    """conv32-pool-conv64-pool-fc128-fc10; its 128 hidden units are the features of the metrics."""

    FEATURES = 128

    def __init__(self, shape: Sequence[int], classes: int = 10) -> None:
        super().__init__()
        channels, height, width = shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),  # after pooling: the same values from a quarter of the work
            nn.Conv2d(32, 64, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), self.FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.FEATURES, classes)
        self.to(memory_format=torch.channels_last)  # a third faster on the CPU

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def widths(sizes: Sequence[int], factor: float) -> tuple[int, ...]:
    """Layer sizes scaled by ``--width``."""
    return tuple(max(1, round(size * factor)) for size in sizes)


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and buffers.

    The decay is warmed up as (1+t)/(10+t): with a constant one the random initial weights would
    still be 22% of the average after 1500 steps of decay .999.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"--ema is {decay}, expected 0 <= ema < 1 (0 averages nothing)")

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        t = int(count)
        weight = 1 - min(decay, (1 + t) / (10 + t))
        for target, source in zip(averaged, current, strict=True):
            if target.is_floating_point():
                target.lerp_(source, weight)
            else:
                target.copy_(source)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
