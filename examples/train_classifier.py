"""Train the small CNN whose logits and features the metrics use.

    python examples/train_classifier.py --data fashion --out runs/classifier_fashion

The other scripts look for it in ``classifier_<data>`` beside their ``--out``, and train it first
when it is not there; that of the digits comes with them. Presets:

* ``cnn``: until real images score as in the tables that we compare with
* ``quick``: two epochs, for a first look
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from common import options, run
from common.classifier import PRESETS, WEIGHTS, accuracy_on_test
from common.data import Batches, ImageData, to_float
from common.models import Classifier
from torch.nn import functional as F  # noqa: N812


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser(__file__, __doc__ or "", PRESETS)
    options.add_image_options(parser)
    return options.parse(parser, PRESETS, argv)


def learn(
    training: run.Run,
    model: Classifier,
    optimiser: torch.optim.Optimizer,
    images: ImageData,
    batches: Batches,
) -> None:
    """Descend the cross-entropy of the labels until ``training`` is at its end."""
    for i in training:
        rows = batches(i)
        with options.autocast(training.args):
            logits = model(to_float(images.train[rows]))
        loss = F.cross_entropy(logits.float(), images.train_labels[rows])
        training.set_rate(optimiser)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        training.log(loss=loss)


def main(argv: Sequence[str] | None = None) -> bool:
    """``False`` if it was stopped before its end."""
    args = parse(argv)
    images, batches = options.begin_images(args)
    model = Classifier(images.shape).to(args.device)
    optimiser = torch.optim.Adam(model.parameters(), args.lr)
    training = run.Run(args, {"model": model, "optimiser": optimiser})

    learn(training, model, optimiser, images, batches)
    if training.finished:
        accuracy = accuracy_on_test(model, images)
        torch.save(model.state_dict(), args.out / WEIGHTS)
        training.finish(metrics={"accuracy": accuracy})
        print(f"{args.data}: test accuracy {accuracy:.2%}, written to {args.out}", flush=True)
    return training.finished


if __name__ == "__main__":
    options.run_from_shell(main)
