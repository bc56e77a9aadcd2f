"""Networks of the training scripts, and the moving average of their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim.swa_utils import AveragedModel

from common import UsageError

PRIORS = ("unit", "uniform", "normal")
HIDDEN = (256, 512, 1024)  # of the generators without convolutions


class Generator(nn.Module):
    """A network together with the distribution of its input.

    ``prior`` is ``"unit"`` (uniform on [0,1]^k), ``"uniform"`` (on [-1,1]^k) or ``"normal"``.
    """

    def __init__(self, net: nn.Module, latent: int, prior: str) -> None:
        super().__init__()
        if prior not in PRIORS:
            raise UsageError(f"--prior is {prior!r}, expected one of {', '.join(PRIORS)}")
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
    hidden: Sequence[int] = HIDDEN,
    dropout: float = 0.0,
    norm: bool = True,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> Generator:
    """Linear-(BatchNorm)-activation-Dropout blocks and a tanh output reshaped to ``shape``."""
    layers: list[nn.Module] = []
    sizes = [latent, *hidden]
    for fan_in, fan_out in pairwise(sizes):
        # BatchNorm subtracts the mean, so a bias before it would do nothing.
        layers += [nn.Linear(fan_in, fan_out, bias=not norm)]
        layers += [nn.BatchNorm1d(fan_out)] if norm else []
        layers += [activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
    layers += [nn.Linear(sizes[-1], math.prod(shape)), nn.Tanh(), nn.Unflatten(1, tuple(shape))]
    return Generator(nn.Sequential(*layers), latent, prior)


def mlp_critic(
    shape: Sequence[int],
    hidden: Sequence[int] = HIDDEN[::-1],
    dropout: float = 0.0,
    outputs: int = 1,
) -> nn.Sequential:
    """Flattened images to ``outputs`` numbers, by LeakyReLU layers: discriminator or encoder."""
    layers: list[nn.Module] = [nn.Flatten()]
    sizes = [math.prod(shape), *hidden]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), leaky()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def leaky() -> nn.LeakyReLU:
    """The activation of every discriminator and of BasicGAN's generator."""
    return nn.LeakyReLU(0.2)


def dcgan_generator(shape: Sequence[int], latent: int, prior: str, width: float) -> Generator:
    """Linear to a quarter of the size, four transposed convolutions of which two double it."""
    channels, height, _ = shape
    base, sizes = height // 4, widths((256, 128, 64, 32), width)
    layers: list[nn.Module] = [
        nn.Linear(latent, sizes[0] * base**2),
        nn.Unflatten(1, (sizes[0], base, base)),
    ]
    for (fan_in, fan_out), stride in zip(pairwise(sizes), (2, 1, 1), strict=True):
        layers += [_transposed(fan_in, fan_out, stride), nn.BatchNorm2d(fan_out), nn.ReLU()]
    layers += [_transposed(sizes[-1], channels, 2), nn.Tanh()]
    return Generator(nn.Sequential(*layers), latent, prior)


def _transposed(fan_in: int, fan_out: int, stride: int) -> nn.ConvTranspose2d:
    """A transposed 3x3 convolution whose output is exactly ``stride`` times its input."""
    return nn.ConvTranspose2d(fan_in, fan_out, 3, stride, 1, output_padding=stride - 1)


def dcgan_critic(
    shape: Sequence[int], width: float, dropout: float = 0.25, outputs: int = 1, norm: bool = True
) -> nn.Sequential:
    """Four convolutions of which the first and the last halve the size, then one linear layer."""
    channels, height, _ = shape
    sizes = (channels, *widths((32, 64, 128, 256), width))
    layers: list[nn.Module] = []
    for (fan_in, fan_out), stride in zip(pairwise(sizes), (2, 1, 1, 2), strict=True):
        layers += [nn.Conv2d(fan_in, fan_out, 3, stride, 1)]
        layers += [nn.BatchNorm2d(fan_out)] if norm else []
        layers += [leaky(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(sizes[-1] * (height // 4) ** 2, outputs))


class UpConv(nn.Conv2d):
    """Nearest upsampling by 2, then a 5x5 convolution: the same map, computed without upsampling.

    The two steps touch 25 pixels per output, of which at most 9 differ. So each of the four
    outputs per input pixel is a 3x3 convolution whose weights are sums of those of the 5x5 one:
    36 products where the plain form has 100.
    """

    # [phase, 3 pixels, 5 taps]: which taps of an even and of an odd output row fall on which pixel
    PHASES = (
        ((1, 1, 0, 0, 0), (0, 0, 1, 1, 0), (0, 0, 0, 0, 1)),
        ((1, 0, 0, 0, 0), (0, 1, 1, 0, 0), (0, 0, 0, 1, 1)),
    )

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, 5, padding=2)

    def forward(self, images: Tensor) -> Tensor:
        phases = self.weight.new_tensor(self.PHASES)
        # Output channel o, phases p and q in the order that pixel_shuffle wants.
        weight = torch.einsum("pru,oiuv,qsv->opqirs", phases, self.weight, phases)
        bias = None if self.bias is None else self.bias.repeat_interleave(4)
        return F.pixel_shuffle(F.conv2d(images, weight.flatten(0, 2), bias, padding=1), 2)


class Classifier(nn.Module):
    """conv32-pool-conv64-pool-fc128-fc10; its 128 hidden units are the features of the metrics."""

    FEATURES = 128
    epochs = 0.0  # that it was trained for

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


@torch.no_grad()
def clip_weights(net: nn.Module, bound: float) -> None:
    """Every weight into [-bound, bound], which bounds the slope of the network."""
    for weight in net.parameters():
        weight.clamp_(-bound, bound)


def widths(sizes: Sequence[int], factor: float) -> tuple[int, ...]:
    """Layer sizes scaled by ``--width``."""
    return tuple(max(1, round(size * factor)) for size in sizes)


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and buffers.

    The decay is warmed up as (1+t)/(10+t): with a constant one the random initial weights would
    still be 22% of the average after 1500 steps of decay .999.
    """
    if not 0 <= decay < 1:
        raise UsageError(f"--ema is {decay}, expected 0 <= ema < 1 (0 averages nothing)")

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
