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
from typing import Any

import torch
from common import UsageError, chunks, generate, options, ranks
from common.data import to_float
from common.models import (
    Generator,
    initialise_from_data,
    moving_average,
    otgan_critic,
    otgan_generator,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

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
    generator = otgan_generator(images.shape, args.latent, args.prior, args.width)
    critic = otgan_critic(images.shape, args.width)
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
