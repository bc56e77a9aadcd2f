"""What all scripts that train a generator share: its options, and the run around its step."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from common import classifier, ranks, run
from common.data import ImageData, to_float
from common.figures import save_grid
from common.metrics import Evaluator, table
from common.models import PRIORS, Generator, moving_average

PICTURES = 8  # sample grids along a run, besides the one after the first epoch
GRID = 10  # images to a side of a sample grid
MANIFOLD = 20  # and of a latent manifold
READING = """
real-real is what real images score against real ones. Better is: inception score, precision and
recall higher; Fréchet distance and MED² lower; the OT distance closer to real-real, since blurred
images are below it.

generated images  {out}/{last}
real ones         {out}/real.png
losses            {out}/loss.png
all numbers       {out}/metrics.json"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every generator script, on top of those of :func:`common.run.parser`."""
    run.add_image_options(parser)
    add = parser.add_argument
    add("--latent", type=int, default=64, help="dimension of the latent vector")
    add("--prior", choices=PRIORS, default="normal", help="distribution of the latent vector")
    add("--width", type=float, default=1.0, help="factor on all layer widths")
    add("--ema", type=float, default=0.0, help="decay of the weight average, 0 for none")
    add("--eval-every", type=int, default=0, help="steps between metrics, 0: only at the end")
    add("--eval-samples", type=int, default=10_000, help="generated images in the metrics")
    add(
        "--protocol",
        choices=("standard", "geist"),
        default="standard",
        help="geist: also the metrics as Geist & Gérard took them",
    )
    add("--classifier", type=Path, help="run folder of another one for the metrics")
    add(
        "--classifier-preset",
        choices=classifier.PRESETS,
        default="cnn",
        help="how to train it, if it is neither in the examples nor classifier_<data> beside --out",
    )


def train(
    args: argparse.Namespace,
    images: ImageData,
    generator: Generator,
    step: Callable[[int], run.Losses],
    state: Mapping[str, run.Stateful],
    pictures: Callable[[Path], None] | None = None,
) -> bool:
    """Run ``step`` for the length of the run, with weight average, pictures, metrics and report.

    ``state`` is what ``step`` changes apart from the generator; ``pictures`` draws more into the
    folder of the finished run. ``False`` if it was stopped before its end.
    """
    writes = ranks.number() == 0
    if writes:
        print(
            f"{args.data}, preset {args.preset}: {args.steps} steps of {args.batch} images on "
            f"{args.device}, written to {args.out}",
            flush=True,
        )
    average = moving_average(generator, args.ema) if args.ema else None
    shown: Generator = average.module if average else generator
    parts = {"generator": generator, **state, **({"average": average} if average else {})}
    training = run.Run(args, parts)
    judged = args.eval_every or (args.stop_at or args.steps) >= args.steps
    evaluator = _evaluator(args, images) if judged and writes else None
    per_epoch = len(images.limited(args.limit_train).train) // args.batch
    shown_at = {per_epoch, *(round(args.steps * i / PICTURES) for i in range(1, PICTURES + 1))}

    def averaged_step(i: int) -> run.Losses:
        losses = step(i)
        if average:
            average.update_parameters(generator)
        return losses

    def after(done: int) -> None:
        if done in shown_at:
            grid = shown.generate(shown.draw(GRID**2))
            save_grid(grid, training.out / _samples(done), GRID)
        if args.eval_every and done % args.eval_every == 0 and done < args.steps:
            scores = evaluator(shown.generate(shown.draw(args.eval_samples)))
            training.evaluations.append({"step": done, **scores})

    finished = training.train(averaged_step, after if writes else None)
    if finished and writes:
        with run.own_randomness(args.seed):
            if pictures:
                pictures(training.out)
            _report(args, training, shown, evaluator)
    return finished


def _evaluator(args: argparse.Namespace, images: ImageData) -> Evaluator:
    """The metrics; the classifier is trained first if it is not there, so that nobody who waited
    for the generator has to wait again."""
    with run.own_randomness(args.seed), ranks.alone():
        model = classifier.obtain(args, images)
    return Evaluator(images, model, args.eval_samples)


def _report(
    args: argparse.Namespace, training: run.Run, generator: Generator, evaluator: Evaluator
) -> None:
    """Last pictures, metrics beside their floors, and where everything is."""
    save_grid(to_float(evaluator.test[: GRID**2]), training.out / "real.png", GRID)
    if generator.latent == 2:
        grid = generator.generate(generator.latent_grid(MANIFOLD))
        save_grid(grid, training.out / "manifold.png", MANIFOLD)
    floors = evaluator.floors()
    metrics = evaluator(generator.generate(generator.draw(args.eval_samples)))
    metrics["ot_gap"] = abs(metrics["ot"] - floors["ot"])
    if args.protocol == "geist":
        metrics |= evaluator.geist_protocol(generator)
    training.finish(
        metrics=metrics,
        floors=floors,
        classifier_accuracy=classifier.accuracy_on_test(evaluator.classifier, evaluator.data),
    )
    print(f"\n{args.data}, preset {args.preset}: {training.step} steps, {training.seconds:.0f} s")
    print(table(metrics, floors))
    print(READING.format(out=training.out, last=_samples(training.step)))


def _samples(done: int) -> str:
    """The file of the sample grid after ``done`` steps."""
    return f"samples_{done:06d}.png"
