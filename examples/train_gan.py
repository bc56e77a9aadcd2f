"""Adversarial baselines: GAN, DCGAN, and Wasserstein GANs with clipping and gradient penalty.

    python examples/train_gan.py --preset geist --out runs/gan
    python examples/train_gan.py --preset dcgan --width 0.25 --out runs/dcgan

Presets:

* ``geist``: the GAN that Geist & Gérard 2023 compare with, 2-D latent, multilayer perceptrons
* ``basic``: multilayer perceptrons with a 100-d latent
* ``dcgan``: transposed convolutions against convolutions
* ``wgan-clip``: Wasserstein GAN, critic weights clipped to [-.01, .01], RMSprop
* ``wgan-gp``: Wasserstein GAN with a penalty on the critic's gradient norm

One step moves the discriminator ``--n-critic`` times, then the generator once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from common import generate, options
from common.data import to_float
from common.models import (
    HIDDEN,
    Generator,
    clip_weights,
    dcgan_critic,
    dcgan_generator,
    leaky,
    mlp_critic,
    mlp_generator,
    moving_average,
    widths,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

REPORT: dict[str, Any] = {
    "latent": 100,
    "prior": "normal",
    "lr": 2e-4,
    "batch": 100,
    "epochs": 30.0,
}
# A norm over the batch would let one sample change the gradient penalty of another, and dropout
# makes the critic no longer one function: the Wasserstein critics have neither.
WASSERSTEIN: dict[str, Any] = {**REPORT, "n_critic": 5, "dropout": 0.0, "critic_norm": False}
PRESETS: dict[str, dict[str, Any]] = {
    "geist": {
        "latent": 2,
        "prior": "unit",
        "lr": 1e-3,
        "batch": 200,
        "epochs": 40.0,
        "norm": True,
        "generator_dropout": 0.2,
        "dropout": 0.2,
        "protocol": "geist",
    },
    "basic": {**REPORT, "dropout": 0.3},
    "dcgan": {**REPORT, "net": "dcgan", "dropout": 0.25},
    "wgan-clip": {**WASSERSTEIN, "loss": "wgan-clip", "lr": 5e-5},
    "wgan-gp": {**WASSERSTEIN, "loss": "wgan-gp", "lr": 1e-4, "betas": [0.0, 0.9]},
}

NEEDS: options.Needs = {
    "clip": ("loss", ["wgan-clip"]),
    "penalty": ("loss", ["wgan-gp"]),
    "betas": ("loss", ["gan", "wgan-gp"]),
    "norm": ("net", ["mlp"]),
    "generator_dropout": ("net", ["mlp"]),
    "critic_norm": ("net", ["dcgan"]),
}


def critic_loss(args: argparse.Namespace, critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """What the critic descends: cross-entropy of telling real from generated, or minus its
    estimate of the Wasserstein distance, with a penalty on its gradient for ``wgan-gp``."""
    if args.loss == "gan":
        return F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()
    distance = critic(real).mean() - critic(fake).mean()
    if args.loss == "wgan-clip":
        return -distance
    t = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device)
    between = torch.lerp(real, fake, t).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return args.penalty * penalty - distance


def generator_loss(args: argparse.Namespace, scores: Tensor) -> Tensor:
    """Non-saturating for the GAN; what the critic says, for the Wasserstein GANs."""
    return F.softplus(-scores).mean() if args.loss == "gan" else -scores.mean()


def networks(args: argparse.Namespace, shape: Sequence[int]) -> tuple[Generator, nn.Module]:
    """Generator and discriminator of ``--net``."""
    if args.net == "dcgan":
        critic = dcgan_critic(shape, args.width, args.dropout, norm=args.critic_norm)
        return dcgan_generator(shape, args.latent, args.prior, args.width), critic
    generator = mlp_generator(
        shape,
        args.latent,
        args.prior,
        widths(HIDDEN, args.width),
        args.generator_dropout,
        args.norm,
        nn.ReLU if args.norm else leaky,
    )
    return generator, mlp_critic(shape, widths(HIDDEN[::-1], args.width), args.dropout)


def optimisers(
    args: argparse.Namespace, generator: nn.Module, critic: nn.Module
) -> list[torch.optim.Optimizer]:
    """One for each: RMSprop where weights are clipped, since momentum is known to break that."""
    nets = (generator, critic)
    if args.loss == "wgan-clip":
        return [torch.optim.RMSprop(net.parameters(), args.lr) for net in nets]
    return [torch.optim.Adam(net.parameters(), args.lr, betas=tuple(args.betas)) for net in nets]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = generate.parser(__file__, __doc__ or "", PRESETS)
    add = parser.add_argument
    add("--net", choices=("mlp", "dcgan"), default="mlp")
    add("--loss", choices=("gan", "wgan-clip", "wgan-gp"), default="gan")
    add("--n-critic", type=int, default=1, help="discriminator updates per generator update")
    add("--betas", type=float, nargs=2, default=[0.5, 0.999], help="of Adam")
    add("--dropout", type=float, default=0.0, help="dropout of the discriminator")
    add("--generator-dropout", type=float, default=0.0)
    add("--norm", action="store_true", help="batch normalisation in the mlp generator")
    flag, critic_norm = argparse.BooleanOptionalAction, "batch normalisation in the dcgan critic"
    add("--critic-norm", action=flag, default=True, help=critic_norm)
    add("--clip", type=float, default=0.01, help="bound on critic weights, wgan-clip")
    add("--penalty", type=float, default=10.0, help="weight of the gradient penalty, wgan-gp")
    args = options.parse(parser, PRESETS, argv, NEEDS)
    options.at_least(args, 1, "n_critic")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    images, batches = options.begin_images(args)
    generator, critic = (net.to(args.device) for net in networks(args, images.shape))
    average = moving_average(generator, args.ema)
    of_generator, of_critic = optimisers(args, generator, critic)
    state = {"generator": generator, "critic": critic, "average": average}
    state |= {"generator_optimiser": of_generator, "critic_optimiser": of_critic}
    training = generate.Training(args, images, average.module, state)

    for i in training:
        training.set_rate(of_generator, of_critic)
        critic.requires_grad_(True)
        for k in range(args.n_critic):
            real = to_float(images.train[batches(i * args.n_critic + k)])
            with torch.no_grad(), options.autocast(args):
                fake = generator(generator.draw(len(real)))
            with options.autocast(args):
                of_the_critic = critic_loss(args, critic, real, fake)
            of_critic.zero_grad()
            of_the_critic.backward()
            of_critic.step()
            if args.loss == "wgan-clip":
                clip_weights(critic, args.clip)

        critic.requires_grad_(False)
        with options.autocast(args):
            loss = generator_loss(args, critic(generator(generator.draw(args.batch))))
        of_generator.zero_grad()
        loss.backward()
        of_generator.step()
        average.update_parameters(generator)
        training.log(loss=loss, critic_loss=of_the_critic)

    training.conclude()


if __name__ == "__main__":
    options.run_from_shell(main)
