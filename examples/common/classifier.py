"""The classifier whose logits and features the metrics use: trained once, kept beside the runs."""

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

The other scripts look for it in ``classifier_<data>`` beside their ``--out``, and train it when it
is not there. Presets:

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


def train(args: argparse.Namespace) -> None:
    """Train, test and write the run folder ``args.out``."""
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
    if training.train(step):
        accuracy = accuracy_on_test(model, images)
        training.finish(metrics={"accuracy": accuracy})
        print(f"{args.data}: test accuracy {accuracy:.2%}, written to {args.out}")


@torch.no_grad()
def accuracy_on_test(model: Classifier, images: ImageData) -> float:
    """Share of test images that ``model`` labels rightly."""
    model.eval()
    parts = zip(images.test.split(1000), images.test_labels.split(1000), strict=True)
    right = [model(to_float(part)).argmax(1) == labels for part, labels in parts]
    return float(torch.cat(right).double().mean())


def obtain(folder: Path, images: ImageData, data_dir: Path | None, preset: str) -> Classifier:
    """The trained classifier of ``folder``, training it first if it is not there."""
    checkpoint = folder / "ckpt.pt"
    if not (folder / "metrics.json").is_file():
        options = ["--data", images.name, "--preset", preset, "--out", str(folder)]
        options += ["--data-dir", str(data_dir)] if data_dir else []
        options += ["--device", str(images.train.device)]
        train(parse(options))
    model = Classifier(images.shape).to(images.train.device)
    state = torch.load(checkpoint, map_location=images.train.device, weights_only=True)
    model.load_state_dict(state["state"]["model"])
    return model.eval()
