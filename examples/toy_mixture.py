"""OT-GAN on eight Gaussians in the plane, with a critic that is frozen on the way.

    python examples/toy_mixture.py --out runs/mixture

The toy of Salimans et al. 2018: eight Gaussians of deviation .2 on a circle of radius 2, latent
N(0, I) in 256 dimensions, two half-batches of 256 on each side. Once the critic stops moving, most
adversarial losses let the generator collapse onto what this critic likes best. Transport between
minibatches does not: with the critic fixed it is still a distance between distributions.

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
from common import players, run
from common.models import Generator, moving_average
from matplotlib.figure import Figure
from torch import Tensor, nn

import otloss

MODES, RADIUS, DEVIATION = 8, 2.0, 0.2
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"steps": 40_000, "freeze": 15_000, "lr": 3e-4, "schedule": "cosine"}
}
TOLERANCE = 1e-2  # ten times the default: the noise of a minibatch is larger still
SHOWN = 5  # times along the run at which samples are kept for the figure
SAMPLES = 10_000  # in the metrics


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
    """Scatter plots side by side, the modes as circles of three deviations."""
    figure = Figure(figsize=(2.6 * len(samples), 2.8), layout="constrained")
    panels = figure.subplots(1, len(samples), sharex=True, sharey=True, squeeze=False)[0]
    angle = torch.linspace(0, 2 * math.pi, 60)
    circle = 3 * DEVIATION * torch.stack((angle.cos(), angle.sin()), 1)
    for panel, (title, points) in zip(panels, samples.items(), strict=True):
        panel.scatter(*points[:1000].T.cpu(), s=2, alpha=0.5)
        for centre in centres():
            panel.plot(*(centre + circle).T, color="tab:red", linewidth=0.8)
        panel.set(title=title, aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    figure.savefig(path, dpi=90)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = run.parser(__file__, __doc__ or "", PRESETS)
    add = parser.add_argument
    add("--batch", type=int, default=512, help="samples per side and step: two half-batches")
    add("--eps", type=float, default=0.01, help="regularisation, in units of the cosine cost")
    add("--n-gen", type=int, default=3, help="generator steps per critic step")
    add("--freeze", type=int, default=15_000, help="step after which the critic stays as it is")
    add("--hidden", type=int, default=128, help="width of both networks")
    add("--features", type=int, default=64, help="features of the critic")
    add("--latent", type=int, default=256, help="dimension of the latent vector")
    add("--ema", type=float, default=0.999, help="decay of the weight average")
    args = run.parse(parser, PRESETS, argv)
    if args.batch < 2 or args.batch % 2:
        raise ValueError(f"--batch is {args.batch}, expected an even number: two half-batches")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = run.begin(args)
    generator = Generator(
        mlp([args.latent, args.hidden, args.hidden, 2], nn.ReLU), args.latent, "normal"
    )
    # A frozen critic holds the modes only if it tells all points apart: one of ReLUs has flat
    # regions, and in runs of 3000 steps it lost two modes of eight where this one kept all.
    critic = mlp([2, args.hidden, args.hidden, args.features], nn.Tanh)
    networks = {"generator": generator.to(device), "critic": critic.to(device)}
    average = moving_average(generator, args.ema)
    both = players.Players(args, networks, players.adam(args.lr))

    def step(i: int) -> run.Losses:
        critic_moves = i % (args.n_gen + 1) == 0 and i < args.freeze
        name = "critic" if critic_moves else "generator"
        both.turn(name, i)
        real = draw_mixture(args.batch).to(device)
        with run.autocast(args):
            fake = generator(generator.draw(len(real)))
            features = [critic(cloud).float() for cloud in (real, fake)]
        halves = (half for cloud in features for half in cloud.chunk(2))
        loss = otloss.minibatch_energy_distance(*halves, args.eps, tol=TOLERANCE)
        (-loss if critic_moves else loss).backward()
        both.move(name)
        average.update_parameters(generator)
        return {"loss": loss}

    shown_at = {args.freeze, *(round(args.steps * k / SHOWN) for k in range(1, SHOWN + 1))}

    def after(done: int) -> None:
        if done in shown_at:
            samples = average.module.generate(generator.draw(SAMPLES))
            training.evaluations.append({"step": done, **score(samples)})
            title = f"step {done}" + (", critic frozen" if done >= args.freeze else "")
            kept[title] = samples

    state = {"generator": generator, "average": average, **both.state()}
    kept: dict[str, Tensor] = {}
    training = run.Run(args, state)
    if training.train(step, after):
        with run.own_randomness(args.seed):
            metrics = score(average.module.generate(generator.draw(SAMPLES)))
            real = draw_mixture(SAMPLES)
        picture({"real": real, **kept}, training.out / "mixture.png")
        training.finish(metrics=metrics, floors=score(real))
        print(f"{metrics['modes']:.0f} of {MODES} modes, {metrics['near']:.1%} within 3 deviations")
        print(f"written to {training.out}")


if __name__ == "__main__":
    main()
