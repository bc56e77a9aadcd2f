"""Train an image generator on an optimal-transport loss, without a discriminator.

    python examples/train_sinkhorn.py --out runs/med                        # our recipe
    python examples/train_sinkhorn.py --preset geist-10 --out runs/geist10  # a published one

Presets:

* ``med``: minibatch energy distance (Salimans et al. 2018) of raw pixels, two half-batches of real
  and two of generated images, Euclidean cost, plan held constant in the gradient
* ``demo``: the same, short enough for a first look on two CPU cores
* ``geist-1``, ``geist-10``, ``geist-100``: Geist & Gérard 2023. Sinkhorn divergence in Genevay's
  convention 2W(x,y) - W(x,x) - W(y,y), transport cost only, eps 1, 10 or 100, ten iterations,
  gradient through the iterations, 2-D latent
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import generate, run
from common.data import Batches, to_float
from common.models import mlp_generator, widths
from torch import Tensor

import otloss

HIDDEN = (256, 512, 1024)

# Found on FashionMNIST in runs of 4 epochs: eps .3 gave MED² 7.5 where 1 gave 9.8 and .1 gave 8.5;
# lr 3e-3 is ahead of 1e-3 and 2e-3, and 1e-2 diverges; the squared cost blurs (recall .01).
MED: dict[str, Any] = {
    "loss": "med",
    "cost": "euclidean",
    "eps": 0.3,
    "lr": 3e-3,
    "latent": 64,
    "prior": "normal",
    "batch": 500,
    "epochs": 15.0,
    "schedule": "cosine",
    "ema": 0.99,
    # 8x8 images are about four times closer to each other than 28x28 ones, and few: 1500 steps.
    "by_data": {"digits": {"eps": 0.1, "epochs": 750.0, "width": 0.5}},
}
GEIST: dict[str, Any] = {
    "loss": "divergence",
    "cost": "euclidean",
    "n_iters": 10,
    "latent": 2,
    "prior": "unit",
    "dropout": 0.2,
    "batch": 200,
    "epochs": 40.0,
    "protocol": "geist",
}
PRESETS: dict[str, dict[str, Any]] = {
    "med": MED,
    "demo": {**MED, "epochs": 6.0, "classifier_preset": "quick"},
    "geist-1": {**GEIST, "eps": 1.0},
    "geist-10": {**GEIST, "eps": 10.0},
    "geist-100": {**GEIST, "eps": 100.0},
}


def med_loss(args: argparse.Namespace, real: Tensor, fake: Tensor) -> Tensor:
    """Minibatch energy distance of two real and two generated half-batches (twice MED²)."""
    halves = (*real.chunk(2), *fake.chunk(2))
    return otloss.minibatch_energy_distance(*halves, args.eps, cost=args.cost)


def divergence_loss(args: argparse.Namespace, real: Tensor, fake: Tensor) -> Tensor:
    """2W(x,y) - W(x,x) - W(y,y) with W = <P,C> after ``--n-iters`` iterations."""
    return 2 * otloss.sinkhorn_divergence(
        real, fake, args.eps, cost=args.cost, objective="transport", n_iters=args.n_iters
    )


LOSSES: dict[str, Callable[[argparse.Namespace, Tensor, Tensor], Tensor]] = {
    "med": med_loss,
    "divergence": divergence_loss,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = run.parser(__doc__ or "", PRESETS)
    generate.add_options(parser)
    add = parser.add_argument
    add("--loss", choices=LOSSES, default="med")
    add("--cost", choices=("euclidean", "sqeuclidean", "cosine"), default="euclidean")
    add("--eps", type=float, default=1.0, help="regularisation, in units of the cost")
    add("--n-iters", type=int, help="Sinkhorn iterations of the divergence, else to convergence")
    add("--dropout", type=float, default=0.0, help="dropout of the generator")
    args = run.parse(parser, PRESETS, argv)
    if args.loss == "med" and args.batch % 2:
        raise ValueError(f"--batch is {args.batch}, expected an even number: two half-batches")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    images, device = run.begin(args)
    trained = images.limited(args.limit_train).train
    batches = Batches(len(trained), args.batch, args.seed)
    hidden = widths(HIDDEN, args.width)
    generator = mlp_generator(images.shape, args.latent, args.prior, hidden, args.dropout)
    generator.to(device)
    optimiser = torch.optim.Adam(generator.parameters(), args.lr)
    schedule = run.scheduler(optimiser, args)

    def step(i: int) -> run.Losses:
        real = to_float(trained[batches(i).to(device)]).flatten(1)
        fake = generator(generator.draw(len(real))).flatten(1)
        loss = LOSSES[args.loss](args, real, fake)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        return {"loss": loss}

    state = {"optimiser": optimiser, "schedule": schedule}
    generate.train(args, images, generator, step, state)


if __name__ == "__main__":
    main()
