"""The classifier whose logits and features the metrics use.

That of the bundled digits comes with the examples, in ``classifiers/digits``; one of another data
set is trained once and kept beside the runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from common import run
from common.data import Batches, ImageData, to_float
from common.models import Classifier

SHIPPED = Path(__file__).resolve().parents[1] / "classifiers"
WEIGHTS = "weights.pt"  # of the model alone, in the folder of its run
CNN: dict[str, Any] = {
    # Scores depend on how sure the labels are, and so on the length of this run. Five epochs reach
    # 92% on FashionMNIST; after 18 real images score as in the tables that we compare with.
    "epochs": 18.0,
    "batch": 128,
    "lr": 3e-3,
    "schedule": "cosine",
    # The 1297 digits are ten batches an epoch.
    "by_data": {"digits": {"epochs": 60.0}, "cifar10": {"epochs": 15.0}},
}
DESCRIPTION = """Train the small CNN whose logits and features the metrics use.

    python examples/train_classifier.py --data fashion --out runs/classifier_fashion

The other scripts look for it in ``classifier_<data>`` beside their ``--out``, and train it first
when it is not there; that of the digits comes with them. Presets:

* ``cnn``: until real images score as in the tables that we compare with
* ``quick``: two epochs, for a first look
"""
PRESETS = {
    "cnn": CNN,
    "quick": {**CNN, "epochs": 2.0},
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of ``train_classifier.py``."""
    parser = run.parser("train_classifier.py", DESCRIPTION, PRESETS)
    run.add_image_options(parser)
    return run.parse(parser, PRESETS, argv)


def train(args: argparse.Namespace) -> bool:
    """Train, test and write the run folder ``args.out``; ``False`` if it was stopped before."""
    images, device = run.begin_images(args)
    trained = images.limited(args.limit_train)
    model = Classifier(images.shape).to(device)
    optimiser = torch.optim.Adam(model.parameters(), args.lr)
    batches = Batches(len(trained.train), args.batch, args.seed)

    def step(i: int) -> run.Losses:
        rows = batches(i).to(device)
        with run.autocast(args):
            logits = model(to_float(trained.train[rows]))
        loss = F.cross_entropy(logits.float(), trained.train_labels[rows])
        run.set_rate(optimiser, args, i)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return {"loss": loss}

    training = run.Run(args, {"model": model, "optimiser": optimiser})
    finished = training.train(step)
    if finished:
        accuracy = accuracy_on_test(model, images)
        torch.save(model.state_dict(), args.out / WEIGHTS)
        training.finish(metrics={"accuracy": accuracy})
        print(f"{args.data}: test accuracy {accuracy:.2%}, written to {args.out}", flush=True)
    return finished


@torch.no_grad()
def accuracy_on_test(model: Classifier, images: ImageData) -> float:
    """Share of test images that ``model`` labels rightly."""
    model.eval()
    parts = zip(images.test.split(1000), images.test_labels.split(1000), strict=True)
    right = [model(to_float(part)).argmax(1) == labels for part, labels in parts]
    return float(torch.cat(right).double().mean())


def obtain(args: argparse.Namespace, images: ImageData) -> Classifier:
    """The trained classifier for the metrics of the run ``args``.

    It is that of ``--classifier``, else the one that comes with the examples, else that beside
    ``--out``, which is trained if it is not there.
    """
    shipped, beside = SHIPPED / args.data, args.out.parent / f"classifier_{args.data}"
    folder = args.classifier or (shipped if shipped.is_dir() else beside)
    weights = folder / WEIGHTS
    if args.classifier and not weights.is_file():
        raise FileNotFoundError(
            f"--classifier: {weights} is missing, expected a finished run of "
            f"examples/train_classifier.py --data {args.data}"
        )
    if not weights.is_file():
        print(f"first the classifier of the metrics, once: training it in {folder}", flush=True)
        options = ["--data", args.data, "--preset", args.classifier_preset, "--out", str(folder)]
        options += ["--data-dir", str(args.data_dir)] if args.data_dir else []
        if not train(parse([*options, "--device", args.device])):
            raise SystemExit("without its classifier a run has no metrics: nothing was trained")
    model = Classifier(images.shape).to(images.train.device)
    model.load_state_dict(torch.load(weights, map_location=images.train.device, weights_only=True))
    return model.eval()
