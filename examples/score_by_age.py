"""What the inception score owes to its classifier: scores of runs as the classifier gets older.

    python examples/score_by_age.py --data fashion --runs runs/med runs/gan --out runs/age

Trains the classifier of the metrics once, at a constant rate, and after each epoch in ``--ages``
scores the images that finished runs left in ``generated.pt``, and real ones. ``scores.png`` shows
the inception score and the Fréchet distance over the age.

Preset: ``age``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import options, run
from common.data import to_float
from common.metrics import frechet_distance, inception_score
from common.models import Classifier
from matplotlib.figure import Figure
from torch import Tensor
from train_classifier import learn

AGES = [2, 4, 8, 12, 18, 25]
PRESETS: dict[str, dict[str, Any]] = {"age": {"batch": 128, "lr": 1e-3, "epochs": 25.0}}
REFERENCE = "test images"  # of the Fréchet distance
LABELS = {"is": "inception score", "fid": "Fréchet distance"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser(__file__, __doc__ or "", PRESETS)
    options.add_image_options(parser)
    add = parser.add_argument
    add("--runs", type=Path, nargs="+", required=True, help="folders of finished runs")
    add("--ages", type=int, nargs="+", default=AGES, help="epochs after which to score")
    args = options.parse(parser, PRESETS, argv)
    args.runs = [str(path) for path in args.runs]
    return args


class Ageing(run.Run):
    """Scores ``images`` by name whenever the classifier has reached one of the ages."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: Classifier,
        state: Any,
        images: dict[str, Tensor],
        per_epoch: int,
    ) -> None:
        self.model, self.images = model, images
        self.ages = {age * per_epoch: age for age in args.ages}
        super().__init__(args, state)

    def after_step(self) -> None:
        if self.step not in self.ages:
            return
        self.model.eval()
        features = {name: self._features(images) for name, images in self.images.items()}
        self.model.train()
        for name, of_run in features.items():
            entry = {
                "age": self.ages[self.step],
                "run": name,
                "is": inception_score(self.model.head(of_run).detach()),
                "fid": frechet_distance(of_run, features[REFERENCE]),
            }
            self.evaluations.append(entry)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        return torch.cat([self.model.body(to_float(p.to(device))) for p in images.split(1000)])


def picture(evaluations: Sequence[dict[str, Any]], path: Path) -> None:
    """Both scores over the age, a line per run."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    names = dict.fromkeys(entry["run"] for entry in evaluations)
    for panel, (key, label) in zip(panels, LABELS.items(), strict=True):
        for name in names:
            if key == "fid" and name == REFERENCE:
                continue
            of_run = [entry for entry in evaluations if entry["run"] == name]
            style = ":" if name.endswith("images") else "-"
            panel.plot(
                [e["age"] for e in of_run], [e[key] for e in of_run], f"o{style}", label=name
            )
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    panels[1].set(xlabel="epochs that the classifier has trained", yscale="log")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def name_of(folder: str) -> str:
    """A run, by its own report."""
    args = json.loads(Path(folder, "metrics.json").read_text())["args"]
    return f"{options.script_of(args['command']).removeprefix('train_')} {args['preset']}"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    images, batches = options.begin_images(args)
    if max(args.ages) * batches.per_epoch > args.steps:
        epochs = args.steps / batches.per_epoch
        raise options.UsageError(f"--ages has {max(args.ages)}, expected at most {epochs:g} epochs")
    clouds = {REFERENCE: images.test, "training images": images.train[: len(images.test)]}
    for folder in args.runs:
        if not Path(folder, "generated.pt").is_file():
            raise FileNotFoundError(f"--runs: {folder} has no generated.pt: not a finished run")
        made = torch.load(Path(folder, "generated.pt"), weights_only=True)
        if made.shape[1:] != images.train.shape[1:]:
            raise options.UsageError(f"--runs: {folder} made images {tuple(made.shape[1:])}")
        clouds[name_of(folder)] = made
    model = Classifier(images.shape).to(args.device)
    optimiser = torch.optim.Adam(model.parameters(), args.lr)
    state = {"model": model, "optimiser": optimiser}
    training = Ageing(args, model, state, clouds, batches.per_epoch)
    learn(training, model, optimiser, images, batches)
    if training.finished:
        picture(training.evaluations, args.out / "scores.png")
        last = {e["run"]: e["is"] for e in training.evaluations if e["age"] == max(args.ages)}
        training.finish(metrics=last)
        print(f"written to {args.out}/scores.png")


if __name__ == "__main__":
    options.run_from_shell(main)
