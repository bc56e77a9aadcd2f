"""Around the loop of a script that trains a generator: pictures on the way, metrics at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from common import UsageError, classifier, options, ranks, run
from common.data import ImageData, to_bytes, to_float
from common.figures import Curve, save_grid
from common.metrics import Evaluator, med2, smoothness, table
from common.models import PRIORS, Generator

PICTURES = 8  # sample grids along a run, besides the one after the first epoch
GRID = 10  # images to a side of a sample grid
MANIFOLD = 20  # and of a latent manifold
FOLLOW_PARTS = 30  # looks at the held-out MED² along a run with --schedule follow
READING = """
real-real is what real images score against real ones. Better is: inception score, precision and
recall higher; Fréchet distance and MED² lower; the OT distance closer to real-real, since blurred
images are below it.

generated images  {out}/{last}
real ones         {out}/real.png
losses            {out}/loss.png
all on one page   {out}/report.html
all numbers       {out}/metrics.json"""

Extra = Callable[[Path, Evaluator], Mapping[str, float]]


def parser(
    script: str,
    description: str,
    presets: options.Presets,
    also: Sequence[str] = (),
    latent: bool = True,
) -> argparse.ArgumentParser:
    """The options of every generator script; ``also`` names more data sets, and ``latent`` is
    false where the latent vector is not chosen.

    ``--schedule follow`` halves the learning rate whenever MED² on held-out images has grown.
    """
    schedules = ("constant", "cosine", "follow")
    parser = options.parser(script, description, presets, schedules)
    options.add_image_options(parser, also)
    add = parser.add_argument
    if latent:
        add("--latent", type=int, default=64, help="dimension of the latent vector")
        add("--prior", choices=PRIORS, default="normal", help="distribution of the latent vector")
    add("--width", type=float, default=1.0, help="factor on all layer widths")
    add("--ema", type=float, default=0.0, help="decay of the weight average, 0 for none")
    add("--eval-every", type=int, default=0, help="steps between metrics, 0: only at the end")
    add("--eval-samples", type=int, default=10_000, help="generated images in the metrics")
    protocol = "geist: also the metrics as Geist & Gérard took them"
    add("--protocol", choices=("standard", "geist"), default="standard", help=protocol)
    add("--classifier", type=Path, help="run folder of another one for the metrics")
    train = "how to train it, if it is neither in the examples nor classifier_<data> beside --out"
    add("--classifier-preset", choices=classifier.PRESETS, default="cnn", help=train)
    return parser


class Training(run.Run):
    """A run whose result is ``shown``, a generator: the weight average of the one that learns.

    ``extra(folder, evaluator)`` draws more pictures at the end, and gives more metrics.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        images: ImageData,
        shown: Generator,
        state: Mapping[str, Any],
        extra: Extra | None = None,
    ) -> None:
        if args.eval_every >= args.steps:
            wanted = f"less than the {args.steps} steps"
            raise UsageError(f"--eval-every is {args.eval_every}, expected {wanted}")
        self.images, self.shown, self.extra = images, shown, extra
        self.used = len(images.train[: args.limit_train])
        self.factor, self.followed = 1.0, list[tuple[float, float]]()  # of --schedule follow
        super().__init__(args, state)
        writes = ranks.number() == 0
        judged = args.eval_every or (args.stop_at or args.steps) >= args.steps
        self.evaluator = self._evaluator() if judged and writes else None
        pictures = (round(args.steps * i / PICTURES) for i in range(1, PICTURES + 1))
        self.shown_at = {self.used // args.batch, *pictures} if writes else set()

    _kept = (*run.Run._kept, "factor", "followed")

    def subject(self) -> str:
        return f"{self.args.data}, {super().subject()} of {self.args.batch} images"

    def after_step(self) -> None:
        if self.step in self.shown_at:
            self._draw(f"{self.step:06d}")
        due = self.args.eval_every and self.step % self.args.eval_every == 0
        if self.evaluator and due and self.step < self.args.steps:
            spent = {"step": self.step, "cpu_seconds": round(self.cpu_seconds, 1)}
            self.evaluations.append({**spent, **self.evaluator(self._samples())})

    def rate_factor(self) -> float:
        """By ``--schedule``; ``follow`` halves the rate whenever the held-out MED² has grown."""
        if self.args.schedule != "follow":
            return super().rate_factor()
        if self.step and self.step % self._look_every == 0:
            with run.own_randomness(self.args.seed), torch.no_grad():
                held_out = to_float(self.images.train[-options.HELD_OUT :])
                generated = self.shown.generate(self.shown.draw(5 * options.HELD_OUT))
                look = fmean(med2(part, held_out) for part in generated.split(options.HELD_OUT))
            if self.followed and look > self.followed[-1][0]:
                self.factor /= 2
            self.followed.append((look, self.factor))
        return self.factor

    def curves(self) -> dict[str, Curve]:
        """The losses, and for ``follow`` what it looked at and what it did."""
        curves = super().curves()
        if self.followed:
            looks, factors = zip(*self.followed, strict=True)
            steps = [self._look_every * (i + 1) for i in range(len(looks))]
            curves["held-out MED²"] = (steps, looks)
            curves["learning rate"] = (steps, [self.args.lr * factor for factor in factors])
        return curves

    @property
    def _look_every(self) -> int:
        return max(1, self.args.steps // FOLLOW_PARTS)

    def conclude(self) -> None:
        """Last pictures, metrics beside their floors, and where everything is; nothing if the run
        was stopped before its end."""
        if not self.finished or self.evaluator is None:
            return
        with run.own_randomness(self.args.seed):
            self._report(self.evaluator)

    def _evaluator(self) -> Evaluator:
        """The metrics; the classifier is trained first if it is not there, so that nobody who
        waited for the generator has to wait again."""
        with run.own_randomness(self.args.seed), ranks.alone():
            model = classifier.obtain(self.args, self.images)
        return Evaluator(self.images, model, self.args.eval_samples)

    def _samples(self) -> torch.Tensor:
        return self.shown.generate(self.shown.draw(self.args.eval_samples))

    def _draw(self, name: str) -> None:
        """The sample grid, always of the latent vectors of ``--seed``, and a 2-D latent's map."""
        images = self.shown.generate(self.shown.draw(GRID**2))
        save_grid(images, self.out / f"samples_{name}.png", GRID)
        if self.shown.latent == 2:
            grid = self.shown.generate(self.shown.latent_grid(MANIFOLD))
            save_grid(grid, self.out / f"manifold_{name}.png", MANIFOLD)

    def _report(self, evaluator: Evaluator) -> None:
        out, shown = self.out, self.shown
        save_grid(to_float(evaluator.test[: GRID**2]), out / "real.png", GRID)
        generated = self._samples()
        floors, metrics = evaluator.floors(), evaluator(generated)
        metrics["ot_gap"] = abs(metrics["ot"] - floors["ot"])
        if shown.latent == 2:
            grid = shown.generate(shown.latent_grid(MANIFOLD))
            save_grid(grid, out / "manifold.png", MANIFOLD)
            metrics |= smoothness(grid, MANIFOLD, evaluator.test)
        if self.args.labels:
            metrics["as_asked"] = evaluator.share_of(generated, self.args.labels)
        if self.args.protocol == "geist":
            metrics |= evaluator.geist_protocol(shown)
        if self.extra:
            metrics |= self.extra(out, evaluator)
        torch.save(to_bytes(generated), out / "generated.pt")
        self.finish(
            metrics=metrics,
            floors=floors,
            images=self.used,
            classifier_accuracy=classifier.accuracy_on_test(evaluator.classifier, evaluator.data),
            classifier_epochs=evaluator.classifier.epochs,
            **({"followed": [look for look, _ in self.followed]} if self.followed else {}),
        )
        share = f"{self.loss_seconds / self.seconds:.0%} of it in the loss"
        print(f"\n{self.subject()}, {self.seconds:.0f} s, {share}")
        print(table(metrics, floors))
        print(READING.format(out=out, last=f"samples_{self.step:06d}.png"))
