"""Eight Gaussians in the plane: OT-GAN with a critic that is frozen on the way, and rivals.

    python examples/toy_mixture.py --out runs/mixture
    python examples/toy_mixture.py --preset gan --out runs/mixture-gan

The toy of Salimans et al. 2018: eight Gaussians of deviation .2 on a circle of radius 2, latent
N(0, I) in 256 dimensions. Presets:

* ``paper``: OT-GAN, two half-batches of 256 on each side. Once the critic stops moving, most
  adversarial losses let the generator collapse onto what this critic likes best. Transport between
  minibatches does not: with the critic fixed it is still a distance between distributions
* ``gan``, ``wgan-clip``, ``wgan-gp``: the losses of ``train_gan.py`` with these networks, a critic
  of one output and never frozen

``modes`` counts Gaussians that get at least a quarter of their fair share of the samples within
three deviations, ``near`` is the share of samples within three deviations of any of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import options, run
from common.models import Generator, clip_weights, moving_average
from matplotlib.figure import Figure
from torch import Tensor, nn
from train_gan import critic_loss, generator_loss, optimisers

import otloss

MODES, RADIUS, DEVIATION = 8, 2.0, 0.2
RIVAL: dict[str, Any] = {"steps": 40_000, "freeze": 40_000}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"steps": 40_000, "freeze": 15_000, "lr": 3e-4, "schedule": "cosine"},
    "gan": {**RIVAL, "loss": "gan", "lr": 3e-4},
    "wgan-clip": {**RIVAL, "loss": "wgan-clip", "n_critic": 5, "lr": 1e-4, "clip": 0.1},
    "wgan-gp": {**RIVAL, "loss": "wgan-gp", "n_critic": 5, "lr": 1e-4, "betas": [0.0, 0.9]},
}
NEEDS: options.Needs = {
    **dict.fromkeys(("eps", "n_gen", "features"), ("loss", ["otgan"])),
    "n_critic": ("loss", ["gan", "wgan-clip", "wgan-gp"]),
    "clip": ("loss", ["wgan-clip"]),
    "penalty": ("loss", ["wgan-gp"]),
    "betas": ("loss", ["otgan", "gan", "wgan-gp"]),
}
TOLERANCE = 1e-2  # ten times the default: the noise of a minibatch is larger still
SHOWN = 5  # times along the run at which samples are kept for the figure
SAMPLES = 10_000  # in the metrics
DRAWN = 1000  # of them in the figure


def centres() -> Tensor:
    """The means of the mixture (8, 2)."""
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack((angles.cos(), angles.sin()), 1)


def draw_mixture(n: int) -> Tensor:
    """``n`` samples of the mixture (n, 2)."""
    return centres()[torch.randint(MODES, (n,))] + DEVIATION * torch.randn(n, 2)


def mlp(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers with ``activation`` between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def score(samples: Tensor) -> dict[str, float]:
    """Modes covered, and share of samples within three deviations of one."""
    distance, nearest = torch.cdist(samples.cpu(), centres()).min(1)
    near = distance <= 3 * DEVIATION
    share = nearest[near].bincount(minlength=MODES) / len(samples)
    return {
        "modes": int((share >= 0.25 / MODES).sum()),
        "near": float(near.double().mean()),
        "least": float(share.min()),
    }


def picture(samples: Mapping[str, Tensor], path: Path) -> None:
    """Scatter plots, three to a row, the modes as circles of three deviations."""
    rows = -(-len(samples) // 3)
    figure = Figure(figsize=(8.4, 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False)
    angle = torch.linspace(0, 2 * math.pi, 60)
    circle = 3 * DEVIATION * torch.stack((angle.cos(), angle.sin()), 1)
    for panel, (title, points) in zip(panels.flat, samples.items(), strict=False):
        panel.scatter(*points[:DRAWN].T.cpu(), s=2, alpha=0.5)
        for centre in centres():
            panel.plot(*(centre + circle).T, color="tab:red", linewidth=0.8)
        panel.set_title(title, fontsize=9)
        panel.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    for unused in panels.flat[len(samples) :]:
        unused.set_axis_off()
    figure.savefig(path, dpi=90)


class Mixture(run.Run):
    """A run that keeps samples of ``shown`` for its figure, in its checkpoint too."""

    def __init__(self, args: argparse.Namespace, state: Any, shown: Generator) -> None:
        self.kept: dict[str, Tensor] = {}
        self.shown = shown
        self.shown_at = {args.freeze, *(round(args.steps * k / SHOWN) for k in range(1, SHOWN + 1))}
        super().__init__(args, state)

    _kept = (*run.Run._kept, "kept")

    def after_step(self) -> None:
        if self.step in self.shown_at:
            samples = self.shown.generate(self.shown.draw(SAMPLES))
            self.evaluations.append({"step": self.step, **score(samples)})
            frozen = self.step >= self.args.freeze and self.args.freeze < self.args.steps
            title = f"step {self.step}" + (", critic frozen" if frozen else "")
            self.kept[title] = samples[:DRAWN].cpu()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser(__file__, __doc__ or "", PRESETS)
    add = parser.add_argument
    add("--loss", choices=("otgan", "gan", "wgan-clip", "wgan-gp"), default="otgan")
    add("--batch", type=int, default=512, help="samples per side and step")
    add("--eps", type=float, default=0.01, help="regularisation, in units of the cosine cost")
    add("--n-gen", type=int, default=3, help="generator steps per critic step, otgan")
    add("--n-critic", type=int, default=1, help="critic steps per generator step, the rivals")
    add("--freeze", type=int, default=15_000, help="step after which the critic stays as it is")
    add("--hidden", type=int, default=128, help="width of both networks")
    add("--features", type=int, default=64, help="outputs of the critic, otgan")
    add("--latent", type=int, default=256, help="dimension of the latent vector")
    add("--ema", type=float, default=0.999, help="decay of the weight average")
    add("--betas", type=float, nargs=2, default=[0.5, 0.999], help="of Adam")
    add("--clip", type=float, default=0.1, help="bound on critic weights, wgan-clip")
    add("--penalty", type=float, default=10.0, help="weight of the gradient penalty, wgan-gp")
    options.add_amp(parser)
    args = options.parse(parser, PRESETS, argv, NEEDS)
    options.even_batch(args)
    options.at_least(args, 1, "n_gen", "n_critic")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    options.begin(args)
    net = mlp([args.latent, args.hidden, args.hidden, 2], nn.ReLU)
    generator = Generator(net, args.latent, "normal").to(args.device)
    # A frozen critic holds the modes only if it tells all points apart: one of ReLUs has flat
    # regions, and in runs of 3000 steps it lost two modes of eight where this one kept all.
    otgan = args.loss == "otgan"
    outputs = args.features if otgan else 1
    critic = mlp([2, args.hidden, args.hidden, outputs], nn.Tanh).to(args.device)
    average = moving_average(generator, args.ema)
    of_generator, of_critic = optimisers(args, generator, critic)
    state = {"generator": generator, "critic": critic, "average": average}
    state |= {"generator_optimiser": of_generator, "critic_optimiser": of_critic}
    training = Mixture(args, state, average.module)

    def matching(real: Tensor, fake: Tensor) -> Tensor:
        """OT-GAN's loss, which the critic ascends and the generator descends."""
        features = [critic(cloud).float() for cloud in (real, fake)]
        halves = (half for cloud in features for half in cloud.chunk(2))
        loss = otloss.minibatch_energy_distance
        return training.timed(loss, *halves, args.eps, tol=TOLERANCE)

    def loss_of_critic(real: Tensor, fake: Tensor) -> Tensor:
        return -matching(real, fake) if otgan else critic_loss(args, critic, real, fake)

    def loss_of_generator(fake: Tensor) -> Tensor:
        if otgan:
            return matching(draw_mixture(args.batch).to(args.device), fake)
        return generator_loss(args, critic(fake))

    for i in training:
        training.set_rate(of_generator, of_critic)
        frozen = i >= args.freeze
        # OT-GAN moves one of the two in a step, the rivals move both.
        critic_moves = not otgan or i % (args.n_gen + 1) == 0
        critic.requires_grad_(True)
        for _ in range(args.n_critic if critic_moves and not frozen else 0):
            real = draw_mixture(args.batch).to(args.device)
            with torch.no_grad():
                fake = generator(generator.draw(len(real)))
            with options.autocast(args):
                loss = loss_of_critic(real, fake)
            of_critic.zero_grad()
            loss.backward()
            of_critic.step()
            if args.loss == "wgan-clip":
                clip_weights(critic, args.clip)
            training.log(critic_loss=-loss if otgan else loss)
        critic.requires_grad_(False)
        if frozen or not otgan or not critic_moves:
            fake = generator(generator.draw(args.batch))
            with options.autocast(args):
                loss = loss_of_generator(fake)
            of_generator.zero_grad()
            loss.backward()
            of_generator.step()
            training.log(loss=loss)
        average.update_parameters(generator)

    if training.finished:
        with run.own_randomness(args.seed):
            metrics = score(average.module.generate(generator.draw(SAMPLES)))
            real = draw_mixture(SAMPLES)
        picture({"real": real, **training.kept}, training.out / "mixture.png")
        training.finish(metrics=metrics, floors=score(real))
        print(f"{metrics['modes']:.0f} of {MODES} modes, {metrics['near']:.1%} within 3 deviations")
        print(f"written to {training.out}")


if __name__ == "__main__":
    options.run_from_shell(main)
