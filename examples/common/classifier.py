"""The classifier whose logits and features the metrics use: where it comes from.

That of the bundled digits comes with the examples, in ``classifiers/digits``; one of another data
set is trained once by ``train_classifier.py`` and kept beside the runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from common.data import ImageData, to_float
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
# The digits are so few that their sixty epochs are quick.
QUICK = {**CNN, "epochs": 2.0, "by_data": {"digits": {"epochs": 60.0}}}
PRESETS = {"cnn": CNN, "quick": QUICK}


@torch.no_grad()
def accuracy_on_test(model: Classifier, images: ImageData) -> float:
    """Share of test images that ``model`` labels rightly."""
    model.eval()
    found = torch.cat([model(to_float(part)).argmax(1) for part in images.test.split(1000)])
    return float((found == images.test_labels).double().mean())


def obtain(args: argparse.Namespace, images: ImageData) -> Classifier:
    """The trained classifier for the metrics of the run ``args``.

    It is that of ``--classifier``, else the one that comes with the examples, else that beside
    ``--out`` or, for the runs of a sweep, beside the folder of these. If there is none, it is
    trained beside ``--out``.
    """
    near = [place / f"classifier_{args.data}" for place in args.out.parents[:2]]
    there = (place for place in (SHIPPED / args.data, *near) if (place / WEIGHTS).is_file())
    folder = args.classifier or next(there, near[0])
    if not (folder / WEIGHTS).is_file():
        if args.classifier:
            wanted = f"a finished run of examples/train_classifier.py --data {args.data}"
            raise FileNotFoundError(
                f"--classifier: {folder / WEIGHTS} is missing, expected {wanted}"
            )
        _train(args, folder)
    device = images.train.device
    model = Classifier(images.shape).to(device)
    state = torch.load(folder / WEIGHTS, map_location=device, weights_only=True)
    model.load_state_dict(state)
    model.epochs = json.loads((folder / "metrics.json").read_text())["args"]["epochs"]
    return model.eval()


def _train(args: argparse.Namespace, folder: Path) -> None:
    import train_classifier  # which needs this module

    print(f"first the classifier of the metrics, once: training it in {folder}", flush=True)
    options = ["--data", args.data, "--preset", args.classifier_preset, "--out", str(folder)]
    options += ["--data-dir", str(args.data_dir)] if args.data_dir else []
    options += ["--resume"] if (folder / "ckpt.pt").is_file() else []
    if not train_classifier.main([*options, "--device", args.device]):
        raise SystemExit("without its classifier a run has no metrics: nothing was trained")
