"""Train a generator on transport with a learned cost |f(x) - f(y)|² (Genevay et al. 2018).

    python examples/train_learned_cost.py --out runs/learned
    python examples/train_learned_cost.py --data cifar10 --preset eps-10 --width 0.25
    python examples/train_learned_cost.py --data cifar10 --preset mmd --width 0.25

The encoder f ascends the loss, with its weights clipped; the generator descends it. Clipping leaves
the scale of the features open, so they are scaled to a root mean square of ``--scale``, 10, and eps
of 10, 100 and 1000 are a twentieth, half and five times of their mean squared distance, 200.
With one ``--seed`` all runs start alike and draw their pictures from the same latent vectors.

Presets, after figure 11 of the paper: ``eps-10``, ``eps-100``, ``eps-1000``, and ``mmd``, the
maximum mean discrepancy of a Gaussian kernel with this scale for its bandwidth.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from common import generate, options
from common.data import to_float
from common.models import clip_weights, dcgan_critic, dcgan_generator, moving_average
from torch import Tensor

import otloss

# The paper's rate of 5e-5 still draws noise after some hundred steps. The bound on the encoder's
# weights is larger by as much as the rate: with the paper's .01 a step of RMSprop is a thirtieth
# of it, and weights jump from bound to bound.
LEARNED: dict[str, Any] = {
    "loss": "divergence",
    "n_iters": 100,
    "latent": 100,
    "lr": 3e-4,
    "epochs": 30.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "eps-10": {**LEARNED, "eps": 10.0},
    "eps-100": {**LEARNED, "eps": 100.0},
    "eps-1000": {**LEARNED, "eps": 1000.0},
    "mmd": {**LEARNED, "loss": "mmd"},
}
NEEDS: options.Needs = {
    "eps": ("loss", ["divergence"]),
    "n_iters": ("loss", ["divergence"]),
}
FEATURES = 64


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = generate.parser(__file__, __doc__ or "", PRESETS)
    add = parser.add_argument
    add("--loss", choices=("divergence", "mmd"), default="divergence")
    add("--eps", type=float, default=100.0, help="regularisation of the divergence")
    add("--n-iters", type=int, help="Sinkhorn iterations, else to convergence")
    add("--scale", type=float, default=10.0, help="root mean square of the features")
    add("--n-critic", type=int, default=1, help="encoder updates per step")
    add("--clip", type=float, default=0.06, help="bound on the encoder's weights")
    args = options.parse(parser, PRESETS, argv, NEEDS)
    options.at_least(args, 1, "n_critic")
    return args


def distance(args: argparse.Namespace, real: Tensor, fake: Tensor) -> Tensor:
    """2W(x,y) - W(x,x) - W(y,y) of features, or their maximum mean discrepancy."""
    if args.loss == "mmd":
        return otloss.mmd(real, fake, bandwidth=args.scale)
    return 2 * otloss.sinkhorn_divergence(
        fake, real, args.eps, objective="transport", n_iters=args.n_iters
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    images, batches = options.begin_images(args)
    generator = dcgan_generator(images.shape, args.latent, args.prior, args.width).to(args.device)
    encoder = dcgan_critic(images.shape, args.width, 0.0, outputs=FEATURES).to(args.device)
    average = moving_average(generator, args.ema)
    descent = torch.optim.RMSprop(generator.parameters(), args.lr)
    ascent = torch.optim.RMSprop(encoder.parameters(), args.lr)
    state = {"generator": generator, "encoder": encoder, "average": average}
    state |= {"descent": descent, "ascent": ascent}
    training = generate.Training(args, images, average.module, state)

    def loss_of(real: Tensor) -> Tensor:
        with options.autocast(args):
            fake = generator(generator.draw(len(real))).float()
            # In one batch: the statistics of each alone would hide how far apart the two are.
            x, y = encoder(torch.cat([real, fake])).float().chunk(2)
        unit = (x - y.mean(0)).square().sum(1).mean().detach().sqrt() / args.scale
        return training.timed(distance, args, x / unit, y / unit)

    for i in training:
        real = to_float(images.train[batches(i)])
        training.set_rate(descent, ascent)
        for _ in range(args.n_critic):
            generator.requires_grad_(False)
            encoder.requires_grad_(True)
            ascent.zero_grad()
            (-loss_of(real)).backward()
            ascent.step()
            clip_weights(encoder, args.clip)
        generator.requires_grad_(True)
        encoder.requires_grad_(False)
        descent.zero_grad()
        loss = loss_of(real)
        loss.backward()
        descent.step()
        average.update_parameters(generator)
        training.log(loss=loss)

    training.conclude()


if __name__ == "__main__":
    options.run_from_shell(main)
