"""Train an image generator on an optimal-transport loss of pixels, without a discriminator.

    python examples/train_sinkhorn.py --out runs/med                        # our recipe
    python examples/train_sinkhorn.py --preset geist-10 --out runs/geist10  # a published one
    python examples/train_sinkhorn.py --preset conditional                  # a class on demand

Presets:

* ``med``: minibatch energy distance (Salimans et al. 2018) of raw pixels, two half-batches of real
  and two of generated images, Euclidean cost, plan held constant in the gradient
* ``demo``: the same on the bundled digits, short enough for a first look on two CPU cores
* ``conv``: the same with a generator of convolutions; ``--edges 2`` makes its images sharper
* ``conditional``: the same with a class as input. To the ground cost belongs a label term: images
  of different classes are further apart than their pixels say, by ``--label-weight``
* ``geist-1``, ``geist-10``, ``geist-100``: Geist & Gérard 2023. Sinkhorn divergence in Genevay's
  convention 2W(x,y) - W(x,x) - W(y,y), transport cost only, eps 1, 10 or 100, ten iterations,
  gradient through the iterations, 2-D latent
* ``genevay-a``, ``-b``, ``-c``: Genevay et al. 2018 on raw pixels with squared distances, 2-D
  latent; (eps, batch, iterations) = (1, 200, 10), (.1, 200, 100), (.1, 10, 300) on pixels in
  [0, 1], which is four times the eps on the [-1, 1] used here
* ``mmd``: the network of ``med`` with the energy distance, the limit of large eps
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import generate, options
from common.data import ImageData, to_float
from common.figures import save_grid
from common.metrics import Evaluator
from common.models import (
    HIDDEN,
    Generator,
    UpConv,
    mlp_generator,
    moving_average,
    widths,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

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
    "conv": {**MED, "net": "conv"},
    "conditional": {
        **MED,
        "label_weight": 50.0,
        "by_data": {"digits": {**MED["by_data"]["digits"], "label_weight": 12.0}},
    },
    "mmd": {**MED, "loss": "mmd"},
    "geist-1": {**GEIST, "eps": 1.0},
    "geist-10": {**GEIST, "eps": 10.0},
    "geist-100": {**GEIST, "eps": 100.0},
    "genevay-a": {**GENEVAY, "eps": 4.0, "n_iters": 10},
    "genevay-b": {**GENEVAY, "eps": 0.4, "n_iters": 100},
    "genevay-c": {**GENEVAY, "eps": 0.4, "n_iters": 300, "batch": 10, "lr": 1e-3, "epochs": 2.0},
}


def loss_of(args: argparse.Namespace, real: Tensor, fake: Tensor) -> Tensor:
    """The loss between a batch of real and one of generated images, flattened.

    For ``divergence`` as in Genevay et al. 2018 the generated images come first. The last update is
    that of the other side, whose marginal is then exact: where the iterations stop early, each real
    image still has its full mass. The other way round the plan may leave most of them out, and on
    MNIST the generator drew little but ones.
    """
    if args.loss == "divergence":  # 2W(x,y) - W(x,x) - W(y,y) with W = <P,C>
        return 2 * otloss.sinkhorn_divergence(
            fake, real, args.eps, cost=args.cost, objective="transport", n_iters=args.n_iters
        )
    x1, x2, y1, y2 = *real.chunk(2), *fake.chunk(2)
    if args.loss == "med":  # twice MED²
        return otloss.minibatch_energy_distance(x1, x2, y1, y2, args.eps, cost=args.cost)

    def mean_cost(x: Tensor, y: Tensor) -> Tensor:
        return otloss.cost_matrix(x, y, args.cost).mean()

    # The energy distance, without pairs of an image with itself.
    return 4 * mean_cost(real, fake) - 2 * (mean_cost(x1, x2) + mean_cost(y1, y2))


def compared(images: Tensor, edges: float) -> Tensor:
    """What of images (n, c, h, w) the cost compares, (n, d): their pixels, and ``edges`` times the
    differences of neighbouring ones. In pixels alone a blurred image is the nearest one to many."""
    parts = [images, edges * images.diff(dim=2), edges * images.diff(dim=3)]
    return torch.cat([part.flatten(1) for part in (parts if edges else parts[:1])], 1)


NEEDS: options.Needs = {
    "eps": ("loss", ["med", "divergence"]),
    "n_iters": ("loss", ["divergence"]),
    **dict.fromkeys(("hidden", "activation", "norm", "dropout"), ("net", ["mlp"])),
}
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "softplus": nn.Softplus}
CLASSES = 10
AFTER_THE_DEMO = """
What next, each after `python examples/train_sinkhorn.py`:
  --data digits                       the same, trained three times as long
  --preset geist-10 --data digits     a Sinkhorn divergence, and a map of its 2-D latent space
  --data fashion --data-dir FOLDER    FashionMNIST (docs/examples.md has the folder's layout)
  --help                              all presets and options"""


class LabelledGenerator(Generator):
    """A generator whose latent vector ends in a class as ``classes`` numbers, one of them 1."""

    def __init__(self, base: Generator, classes: int) -> None:
        super().__init__(base.net, base.latent, base.prior)
        self.classes = classes

    def draw(self, n: int, labels: Tensor | None = None) -> Tensor:
        """``n`` latent vectors, of these classes or of random ones."""
        z = super().draw(n)
        labels = torch.randint(self.classes, (n,), device=z.device) if labels is None else labels
        z[:, -self.classes :] = F.one_hot(labels, self.classes)
        return z


def upsampling_generator(shape: Sequence[int], latent: int, prior: str, width: float) -> Generator:
    """A hidden layer, then twice upsampling and a 5x5 convolution: what a loss of pixels trains
    well, because neighbouring pixels share their weights."""
    channels, height, _ = shape
    base, sizes = height // 4, widths((128, 64, 32), width)
    hidden, start = widths((1024,), width)[0], sizes[0] * base**2
    layers: list[nn.Module] = [nn.Linear(latent, hidden, bias=False), nn.BatchNorm1d(hidden)]
    layers += [nn.ReLU(), nn.Linear(hidden, start, bias=False), nn.BatchNorm1d(start), nn.ReLU()]
    layers += [nn.Unflatten(1, (sizes[0], base, base))]
    for fan_in, fan_out in pairwise(sizes):
        layers += [UpConv(fan_in, fan_out), nn.BatchNorm2d(fan_out), nn.ReLU()]
    layers += [nn.Conv2d(sizes[-1], channels, 5, padding=2), nn.Tanh()]
    return Generator(nn.Sequential(*layers), latent, prior)


def build(args: argparse.Namespace, shape: Sequence[int]) -> Generator:
    """The generator of ``--net``, with ten more inputs for the class if it takes one."""
    inputs = args.latent + (CLASSES if args.label_weight else 0)
    if args.net == "conv":
        generator = upsampling_generator(shape, inputs, args.prior, args.width)
    else:
        hidden, activation = widths(args.hidden, args.width), ACTIVATIONS[args.activation]
        generator = mlp_generator(
            shape, inputs, args.prior, hidden, args.dropout, args.norm, activation
        )
    return LabelledGenerator(generator, CLASSES) if args.label_weight else generator


def parser() -> argparse.ArgumentParser:
    parser = generate.parser(__file__, __doc__ or "", PRESETS)
    add = parser.add_argument
    add("--loss", choices=("med", "divergence", "mmd"), default="med")
    add("--cost", choices=("euclidean", "sqeuclidean", "cosine"), default="euclidean")
    add("--eps", type=float, default=1.0, help="regularisation, in units of the cost")
    add("--n-iters", type=int, help="Sinkhorn iterations of the divergence, else to convergence")
    add("--net", choices=("mlp", "conv"), default="mlp", help="kind of generator")
    add("--hidden", type=int, nargs="+", default=HIDDEN, help="hidden layers, net mlp")
    add("--activation", choices=ACTIVATIONS, default="relu", help="between them, net mlp")
    flag = argparse.BooleanOptionalAction
    add("--norm", action=flag, default=True, help="batch normalisation, net mlp")
    add("--dropout", type=float, default=0.0, help="of the generator, net mlp")
    add("--edges", type=float, default=0.0, help="weight of neighbours' differences in the cost")
    weight = "distance that another class adds to the pixels' one; 0: no classes"
    add("--label-weight", type=float, default=0.0, help=weight)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args = options.parse(parser(), PRESETS, argv, NEEDS)
    if args.loss in ("med", "mmd"):
        options.even_batch(args)
    if args.label_weight and args.labels:
        raise options.UsageError(
            f"--labels is {args.labels}, expected none with a --label-weight: all classes are drawn"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    images, batches = options.begin_images(args)
    generator = build(args, images.shape).to(args.device)
    average = moving_average(generator, args.ema)
    optimiser = torch.optim.Adam(generator.parameters(), args.lr)
    state = {"generator": generator, "average": average, "optimiser": optimiser}
    extra = class_grid(average.module, images) if args.label_weight else None
    training = generate.Training(args, images, average.module, state, extra)

    for i in training:
        rows = batches(i)
        if args.label_weight:
            # Both half-batches, real and generated, get each class about equally often: what is
            # left over of a class would have to be matched with another one.
            order = images.train_labels[rows].argsort()
            rows = rows[torch.cat((order[::2], order[1::2])).cpu()]
            labels = images.train_labels[rows]
            z = generator.draw(args.batch, labels)
        else:
            z = generator.draw(args.batch)
        with options.autocast(args):
            fake = compared(generator(z).float(), args.edges)
        real = compared(to_float(images.train[rows]), args.edges)
        if args.label_weight:
            # sqrt(1/2) of a one-hot label: two different ones are at distance 1.
            side = args.label_weight * 0.5**0.5
            real = torch.cat((real, side * F.one_hot(labels, CLASSES)), 1)
            fake = torch.cat((fake, side * z[:, -CLASSES:]), 1)
        loss = training.timed(loss_of, args, real, fake)
        training.set_rate(optimiser)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        average.update_parameters(generator)
        training.log(loss=loss)

    training.conclude()
    if training.finished and args.preset == "demo":
        print(AFTER_THE_DEMO)


def class_grid(generator: LabelledGenerator, images: ImageData) -> generate.Extra:
    """A picture with a row for each class, and how many images are of the class asked for."""

    def extra(folder: Path, evaluator: Evaluator) -> Mapping[str, float]:
        wanted = torch.arange(CLASSES).repeat_interleave(100).to(images.train.device)
        made = generator.generate(generator.draw(len(wanted), wanted))
        rows = made.reshape(CLASSES, 100, *images.shape)[:, :CLASSES].flatten(0, 1)
        save_grid(rows, folder / "classes.png", CLASSES)
        with torch.no_grad():
            found = evaluator.classifier(made).argmax(1)
        return {"as_asked": float((found == wanted).double().mean())}

    return extra


if __name__ == "__main__":
    options.run_from_shell(main)
