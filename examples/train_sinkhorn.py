"""Train an image generator on an optimal-transport loss, without a discriminator.

    python examples/train_sinkhorn.py --out runs/med                        # our recipe
    python examples/train_sinkhorn.py --preset geist-10 --out runs/geist10  # a published one
    python examples/train_sinkhorn.py --preset sae --out runs/sae           # an autoencoder

Presets:

* ``med``: minibatch energy distance (Salimans et al. 2018) of raw pixels, two half-batches of real
  and two of generated images, Euclidean cost, plan held constant in the gradient
* ``demo``: the same on the bundled digits, short enough for a first look on two CPU cores
* ``geist-1``, ``geist-10``, ``geist-100``: Geist & Gérard 2023. Sinkhorn divergence in Genevay's
  convention 2W(x,y) - W(x,x) - W(y,y), transport cost only, eps 1, 10 or 100, ten iterations,
  gradient through the iterations, 2-D latent
* ``genevay-a``, ``-b``, ``-c``: Genevay et al. 2018 on raw pixels with squared distances, 2-D
  latent; (eps, batch, iterations) = (1, 200, 10), (.1, 200, 100), (.1, 10, 300) on pixels in
  [0, 1], which is four times the eps on the [-1, 1] used here
* ``learned-cost``: the same loss of features of an adversarial encoder whose weights are clipped;
  the features are scaled to a deviation of 1, because clipping leaves their scale open
* ``sae``: Sinkhorn autoencoder (Patrini et al. 2019). An encoder and the generator reconstruct the
  images while a Sinkhorn divergence draws the codes to the latent distribution
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import generate, players, run
from common.data import Batches, ImageData, to_float
from common.figures import save_grid
from common.models import (
    HIDDEN,
    Generator,
    dcgan_critic,
    dcgan_generator,
    mlp_critic,
    mlp_generator,
    widths,
)
from torch import Tensor, nn

import otloss

# Found on FashionMNIST. In 4 epochs, lr 3e-3 is ahead of 1e-3 and 2e-3, and 1e-2 diverges; the
# squared cost blurs (recall .01). In 15 epochs, half-batches of 125 give a Fréchet distance of
# 323 ± 2, those of 250 at eps .3 one of 332 ± 5 (three seeds each), in the same time.
MED: dict[str, Any] = {
    "loss": "med",
    "cost": "euclidean",
    "eps": 1.0,
    "lr": 3e-3,
    "latent": 64,
    "prior": "normal",
    "batch": 250,
    "epochs": 15.0,
    "schedule": "cosine",
    "ema": 0.99,
    # 8x8 images are about four times closer to each other than 28x28 ones, and few: 1500 steps.
    "by_data": {"digits": {"eps": 0.1, "batch": 500, "epochs": 750.0, "width": 0.5}},
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
GENEVAY: dict[str, Any] = {
    "loss": "divergence",
    "cost": "sqeuclidean",
    "latent": 2,
    "prior": "unit",
    "hidden": [500, 500],
    "activation": "softplus",
    "norm": False,
    "lr": 5e-3,
    "batch": 200,
    "epochs": 15.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "med": MED,
    "demo": {
        **MED,
        "data": "digits",
        "epochs": 6.0,
        "classifier_preset": "quick",
        "by_data": {"digits": {**MED["by_data"]["digits"], "epochs": 250.0}},
    },
    "geist-1": {**GEIST, "eps": 1.0},
    "geist-10": {**GEIST, "eps": 10.0},
    "geist-100": {**GEIST, "eps": 100.0},
    "genevay-a": {**GENEVAY, "eps": 4.0, "n_iters": 10},
    "genevay-b": {**GENEVAY, "eps": 0.4, "n_iters": 100},
    "genevay-c": {**GENEVAY, "eps": 0.4, "n_iters": 300, "batch": 10, "lr": 1e-3, "epochs": 2.0},
    "learned-cost": {
        "method": "learned-cost",
        "loss": "divergence",
        "cost": "sqeuclidean",
        "eps": 1.0,
        "n_iters": 100,
        "latent": 100,
        "lr": 5e-5,
        "epochs": 30.0,
    },
    "sae": {
        "method": "sae",
        "eps": 0.5,
        "latent": 8,
        "weight": 2.0,
        "lr": 2e-3,
        "schedule": "cosine",
        "batch": 500,
        "epochs": 15.0,
        "by_data": {"digits": {"epochs": 300.0, "width": 0.5}},
    },
}


def med_loss(args: argparse.Namespace, real: Tensor, fake: Tensor) -> Tensor:
    """Minibatch energy distance of two real and two generated half-batches (twice MED²)."""
    halves = (*real.chunk(2), *fake.chunk(2))
    return otloss.minibatch_energy_distance(*halves, args.eps, cost=args.cost)


def divergence_loss(args: argparse.Namespace, real: Tensor, fake: Tensor) -> Tensor:
    """2W(x,y) - W(x,x) - W(y,y) with W = <P,C> after ``--n-iters`` iterations.

    As in Genevay et al. 2018 the generated images come first. The last update is that of the other
    side, whose marginal is then exact: where the iterations stop early, each real image still has
    its full mass. The other way round the plan may leave most of them out, and on MNIST the
    generator drew little but ones.
    """
    return 2 * otloss.sinkhorn_divergence(
        fake, real, args.eps, cost=args.cost, objective="transport", n_iters=args.n_iters
    )


LOSSES: dict[str, Callable[[argparse.Namespace, Tensor, Tensor], Tensor]] = {
    "med": med_loss,
    "divergence": divergence_loss,
}


@dataclass
class Method:
    """A generator, its update by step and batch of real images, and all that this changes."""

    generator: Generator
    update: Callable[[int, Tensor], run.Losses]
    state: Mapping[str, run.Stateful]
    pictures: Callable[[Path], None] | None = None


def mlp(args: argparse.Namespace, shape: Sequence[int]) -> Generator:
    """The generator without convolutions, by the options."""
    hidden = widths(args.hidden, args.width)
    activation = ACTIVATIONS[args.activation]
    return mlp_generator(
        shape, args.latent, args.prior, hidden, args.dropout, args.norm, activation
    )


def generated(args: argparse.Namespace, generator: Generator, n: int) -> Tensor:
    """``n`` generated images."""
    with run.autocast(args):
        return generator(generator.draw(n)).float()


def direct(args: argparse.Namespace, images: ImageData, device: torch.device) -> Method:
    """The loss of raw pixels."""
    generator = mlp(args, images.shape).to(device)
    optimiser = torch.optim.Adam(generator.parameters(), args.lr)

    def update(i: int, real: Tensor) -> run.Losses:
        fake = generated(args, generator, len(real))
        loss = LOSSES[args.loss](args, real.flatten(1), fake.flatten(1))
        run.set_rate(optimiser, args, i)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return {"loss": loss}

    return Method(generator, update, {"optimiser": optimiser})


def learned_cost(args: argparse.Namespace, images: ImageData, device: torch.device) -> Method:
    """The loss of features: the encoder ascends ``--n-critic`` times, the generator descends."""
    generator = dcgan_generator(images.shape, args.latent, args.prior, args.width).to(device)
    encoder = dcgan_critic(images.shape, args.width, 0.0, outputs=FEATURES).to(device)
    networks = {"generator": generator, "encoder": encoder}
    both = players.Players(args, networks, players.rmsprop(args.lr))

    def move(name: str, i: int, real: Tensor) -> Tensor:
        both.turn(name, i)
        fake = generated(args, generator, len(real))
        with run.autocast(args):
            x, y = encoder(real).float(), encoder(fake).float()
        unit = (x - y.mean(0)).square().sum(1).mean().detach().sqrt()
        loss = LOSSES[args.loss](args, x / unit, y / unit)
        (loss if name == "generator" else -loss).backward()
        both.move(name)
        return loss

    def update(i: int, real: Tensor) -> run.Losses:
        for _ in range(args.n_critic):
            move("encoder", i, real)
            players.clip(encoder, args.clip)
        return {"loss": move("generator", i, real)}

    return Method(generator, update, both.state())


def autoencoder(args: argparse.Namespace, images: ImageData, device: torch.device) -> Method:
    """Reconstruction error, and a divergence between the codes and draws of the latent."""
    generator = mlp(args, images.shape).to(device)
    hidden = widths(HIDDEN[::-1], args.width)
    encoder = mlp_critic(images.shape, hidden, outputs=args.latent).to(device)
    both = nn.ModuleList((generator, encoder))
    optimiser = torch.optim.Adam(both.parameters(), args.lr)

    def update(i: int, real: Tensor) -> run.Losses:
        with run.autocast(args):
            codes = encoder(real).float()
            restored = generator(codes).float()
        error = (restored - real).square().flatten(1).sum(1).mean()
        match = otloss.sinkhorn_divergence(codes, generator.draw(len(real)), args.eps)
        loss = error + args.weight * match
        run.set_rate(optimiser, args, i)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return {"loss": loss, "reconstruction": error, "match": match}

    @torch.no_grad()
    def pictures(folder: Path) -> None:
        real = to_float(images.test[:PAIRS])
        pairs = torch.stack((real, generator.generate(encoder(real))), 1).flatten(0, 1)
        save_grid(pairs, folder / "reconstructions.png", columns=10)

    state = {"encoder": encoder, "optimiser": optimiser}
    return Method(generator, update, state, pictures)


METHODS: dict[str, Callable[[argparse.Namespace, ImageData, torch.device], Method]] = {
    "direct": direct,
    "learned-cost": learned_cost,
    "sae": autoencoder,
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "softplus": nn.Softplus}
FEATURES = 64  # of the learned cost
AFTER_THE_DEMO = """
What next, each after `python examples/train_sinkhorn.py`:
  --data digits                       the same, trained three times as long
  --preset geist-10 --data digits     a Sinkhorn divergence, and a map of its 2-D latent space
  --data fashion --data-dir FOLDER    FashionMNIST (docs/examples.md has the folder's layout)
  --help                              all presets and options"""
PAIRS = 50  # images beside their reconstructions


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = run.parser(__file__, __doc__ or "", PRESETS)
    generate.add_options(parser)
    add = parser.add_argument
    add("--method", choices=METHODS, default="direct", help="what the loss compares")
    add("--loss", choices=LOSSES, default="med")
    add("--cost", choices=("euclidean", "sqeuclidean", "cosine"), default="euclidean")
    add("--eps", type=float, default=1.0, help="regularisation, in units of the cost")
    add("--n-iters", type=int, help="Sinkhorn iterations of the divergence, else to convergence")
    add("--hidden", type=int, nargs="+", default=HIDDEN, help="hidden layers of the generator")
    add("--activation", choices=ACTIVATIONS, default="relu")
    add(
        "--norm",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="batch normalisation in the generator",
    )
    add("--dropout", type=float, default=0.0, help="dropout of the generator")
    add("--weight", type=float, default=1.0, help="of the latent divergence, method sae")
    add("--n-critic", type=int, default=1, help="encoder updates per step, method learned-cost")
    add("--clip", type=float, default=0.01, help="bound on encoder weights, method learned-cost")
    args = run.parse(parser, PRESETS, argv)
    if args.loss == "med" and args.batch % 2:
        raise ValueError(f"--batch is {args.batch}, expected an even number: two half-batches")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    images, device = run.begin_images(args)
    trained = images.limited(args.limit_train).train
    batches = Batches(len(trained), args.batch, args.seed)
    method = METHODS[args.method](args, images, device)

    def step(i: int) -> run.Losses:
        return method.update(i, to_float(trained[batches(i).to(device)]))

    finished = generate.train(args, images, method.generator, step, method.state, method.pictures)
    if finished and args.preset == "demo":
        print(AFTER_THE_DEMO)


if __name__ == "__main__":
    main()
