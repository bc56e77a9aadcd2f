"""OT-GAN (Salimans et al. 2018): a generator against a critic, on optimal transport of features.

    python examples/train_otgan.py --preset tiny --out runs/otgan            # one CPU core
    python examples/train_otgan.py --preset mnist --device cuda --out runs/otgan-full
    python examples/train_otgan.py --preset cifar10 --device cuda --chunk 500 --out runs/cifar
    torchrun --nproc_per_node 8 examples/train_otgan.py --preset cifar10 --out runs/cifar

Two half-batches of real and two of generated images give L = 2 D²_MED, twice the minibatch energy
distance of the paper, with the cosine cost between critic features and the plan held constant.
The critic ascends L, the generator descends it. The critic moves at steps t with
t mod (n_gen + 1) == 0, so first; at the other steps the generator does.

Presets:

* ``tiny``: 1/8 of the channels, 2 x 100 images, 2000 steps: a quarter of an hour on one CPU core
* ``mnist``: full width, for 28x28 images (also --data fashion)
* ``cifar10``: full width, 2 x 4000 images in chunks of 500, mirrored at random
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from common import UsageError, chunks, generate, options, ranks
from common.data import to_float
from common.models import Generator, UpConv, moving_average, widths
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

import otloss

PAPER: dict[str, Any] = {"latent": 100, "prior": "uniform", "lr": 3e-4, "ema": 0.999, "eps": 0.002}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {**PAPER, "width": 0.125, "batch": 200, "steps": 2000, "eps": 0.01},
    "mnist": {**PAPER, "batch": 512, "epochs": 40.0},
    "cifar10": {
        **PAPER,
        "data": "cifar10",
        "batch": 8000,
        "chunk": 500,
        "flip": True,
        "epochs": 500.0,
    },
}


def matched(args: argparse.Namespace, x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor) -> Tensor:
    """2 D²_MED: transport between each real and each generated half-batch, and within.

    For ``--match random`` the same sum with row i matched to row i, whatever they are: what
    transport is worth.
    """
    if args.match == "ot":
        losses = otloss.distributed if ranks.count() > 1 else otloss
        return losses.minibatch_energy_distance(x1, x2, y1, y2, args.eps, cost="cosine")

    def cost(x: Tensor, y: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(x, y).mean()

    across = cost(x1, y1) + cost(x1, y2) + cost(x2, y1) + cost(x2, y2)
    return across - 2 * cost(x1, x2) - 2 * cost(y1, y2)


NEEDS: options.Needs = {"eps": ("match", ["ot"])}


class CReLU(nn.Module):
    """Positive and negative parts side by side: twice the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x.relu(), (-x).relu()), 1)


def halvings(shape: Sequence[int]) -> int:
    """How often OT-GAN's networks halve the size: 32 to 4, 28 to 7, 8 to 2."""
    return 3 if shape[1] % 8 == 0 and shape[1] > 8 else 2


def generator_of(shape: Sequence[int], latent: int, prior: str, width: float) -> Generator:
    """Linear-GLU, then upsampling and 5x5 GLU convolutions that halve the channels down to 128."""
    channels, height, _ = shape
    ups = halvings(shape)
    sizes = widths([128 * 2**i for i in range(ups, -1, -1)], width)
    base = height // 2**ups
    layers: list[nn.Module] = [
        nn.Linear(latent, 2 * sizes[0] * base**2),
        nn.Unflatten(1, (2 * sizes[0], base, base)),
        nn.GLU(1),
    ]
    for fan_in, fan_out in pairwise(sizes):
        layers += [UpConv(fan_in, 2 * fan_out), nn.GLU(1)]
    layers += [nn.Conv2d(sizes[-1], channels, 5, padding=2), nn.Tanh()]
    return Generator(weight_normalised(nn.Sequential(*layers)), latent, prior)


def critic_of(shape: Sequence[int], width: float) -> nn.Sequential:
    """5x5 CReLU convolutions, the first at full size, flattened. The cosine cost normalises."""
    downs = halvings(shape)
    first = 128 if downs == 3 else 64
    filters = widths([first * 2**i for i in range(downs + 1)], width)
    layers: list[nn.Module] = []
    fan_in = shape[0]
    for n in filters:
        stride = 2 if layers else 1
        layers += [nn.Conv2d(fan_in, n, 5, stride, padding=2), CReLU()]
        fan_in = 2 * n
    return weight_normalised(nn.Sequential(*layers, nn.Flatten()))


def weight_normalised(net: nn.Sequential) -> nn.Sequential:
    """``net`` with weight normalisation (Salimans & Kingma 2016) of every layer with weights."""
    for layer in net:
        if hasattr(layer, "weight"):
            weight_norm(layer)
    return net


@torch.no_grad()
def initialise_from_data(net: nn.Module, batch: Tensor) -> None:
    """Scale and shift each weight-normalised layer to output mean 0 and variance 1 on ``batch``.

    One forward pass does it, because each layer sees the corrected output of those before it.
    """

    def correct(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        variance, mean = torch.var_mean(output.transpose(0, 1).flatten(1), 1)
        scale = (variance + 1e-8).rsqrt()
        gain = layer.parametrizations.weight.original0
        gain.mul_(scale.reshape(-1, *[1] * (gain.dim() - 1)))
        layer.bias.copy_(-mean * scale)
        return layer.forward(*inputs)  # a plain call would come back here

    layers = [layer for layer in net.modules() if is_parametrized(layer, "weight")]
    for layer in layers:
        layer.bias.zero_()
    hooks = [layer.register_forward_hook(correct) for layer in layers]
    net(batch)
    for hook in hooks:
        hook.remove()


class Game:
    """Generator and critic, each with its optimiser, and what one step does to one of them."""

    def __init__(self, args: argparse.Namespace, generator: Generator, critic: nn.Module) -> None:
        self.args, self.generator, self.critic = args, generator, critic
        self.networks: dict[str, nn.Module] = {"generator": generator, "critic": critic}
        self.optimisers = {
            name: torch.optim.Adam(net.parameters(), args.lr, betas=tuple(args.betas))
            for name, net in self.networks.items()
        }
        self.timed: Callable[..., Any] = lambda loss, *of: loss(*of)

    def mover(self, i: int) -> str:
        """Who moves at step ``i``."""
        return "critic" if i % (self.args.n_gen + 1) == 0 else "generator"

    def step(self, i: int, real: Tensor) -> Tensor:
        """One update; the loss is returned as the generator sees it.

        ``real`` is the whole batch, of which each process of several takes its share.
        """
        mover = self.mover(i)
        for name, net in self.networks.items():
            net.requires_grad_(name == mover)
        self.optimisers[mover].zero_grad()
        real, z = (ranks.share(t, 2) for t in (real, self.generator.draw(len(real))))
        size = self.args.chunk or len(real)
        both = nn.Sequential(self.generator, self.critic)
        reals = [partial(self._features, self.critic, part) for part in real.split(size)]
        fakes = [partial(self._features, both, part) for part in z.split(size)]
        chunked = len(reals) > 1
        if mover == "critic":
            parts = [*reals, *fakes]
            loss = -chunks.backward(parts, lambda both: -self._loss(*both.chunk(2)), chunked)
        else:
            with torch.no_grad():
                fixed = torch.cat([part() for part in reals])
            loss = chunks.backward(fakes, lambda fake: self._loss(fixed, fake), chunked)
        ranks.add_up(self.networks[mover].parameters())
        self.optimisers[mover].step()
        return loss

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {**self.networks, **{f"{k}_optimiser": v for k, v in self.optimisers.items()}}

    def _loss(self, real: Tensor, fake: Tensor) -> Tensor:
        return self.timed(matched, self.args, *real.chunk(2), *fake.chunk(2))

    def _features(self, net: nn.Module, batch: Tensor) -> Tensor:
        with options.autocast(self.args):
            return net(batch).float()


def flipped(images: Tensor) -> Tensor:
    """Each image mirrored with probability one half."""
    mirror = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirror, images.flip(3), images)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = generate.parser(__file__, __doc__ or "", PRESETS)
    add = parser.add_argument
    add("--eps", type=float, default=0.002, help="regularisation, in units of the cosine cost")
    add("--n-gen", type=int, default=3, help="generator steps per critic step")
    pairs = "how the samples of two clouds are paired"
    add("--match", choices=("ot", "random"), default="ot", help=pairs)
    add("--chunk", type=int, help="images through the networks at a time; same gradient")
    add("--flip", action="store_true", help="mirror real images at random")
    add("--betas", type=float, nargs=2, default=[0.5, 0.999], help="of Adam")
    args = options.parse(parser, PRESETS, argv, NEEDS)
    options.even_batch(args)
    options.at_least(args, 1, "n_gen", "chunk")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with ranks.started(args):
        train(args)


def train(args: argparse.Namespace) -> None:
    if ranks.count() > 1 and args.match != "ot":
        raise UsageError(f"--match is {args.match}, expected ot: others need the whole batch")
    if ranks.count() > args.batch // 2:
        raise UsageError(f"--batch is {args.batch}, expected two images for each process")
    images, batches = options.begin_images(args)
    if args.device == "cpu" and args.width > 0.25 and images.shape[1] > 8:
        print(f"width {args.width:g} takes seconds a step on a CPU: --width 0.125 is for one")
    generator = generator_of(images.shape, args.latent, args.prior, args.width)
    critic = critic_of(images.shape, args.width)
    generator, critic = generator.to(args.device), critic.to(args.device)
    initialise_from_data(generator, generator.draw(args.batch))
    initialise_from_data(critic, to_float(images.train[: args.batch]))
    average = moving_average(generator, args.ema)
    game = Game(args, generator, critic)
    training = generate.Training(args, images, average.module, {**game.state(), "average": average})
    game.timed = training.timed

    for i in training:
        training.set_rate(*game.optimisers.values())
        real = to_float(images.train[batches(i)])
        loss = game.step(i, flipped(real) if args.flip else real)
        average.update_parameters(generator)
        training.log(**{"loss": loss, f"{game.mover(i)}_loss": loss})

    training.conclude()


if __name__ == "__main__":
    options.run_from_shell(main)
