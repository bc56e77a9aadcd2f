"""One training run in one folder: options, the loop, logs, checkpoints, and how to resume.

A folder holds ``ckpt.pt`` (everything needed to continue), ``loss.csv`` and ``loss.png``, and
``metrics.json``. An interrupted run continued with ``--resume`` gives, on the CPU, exactly the
weights of a run that was never interrupted.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import otloss
from common import data, ranks
from common.figures import save_curves
from common.progress import Progress

LOG_EVERY = 10  # steps averaged into one row of loss.csv
SAVE_SECONDS = 60  # at most this much work is lost in a crash
# What may differ between a run and its continuation without changing what is computed.
FREE_TO_CHANGE = {
    "command",
    "out",
    "resume",
    "stop_at",
    "device",
    "data_dir",
    "classifier",
    "eval_every",
    "eval_samples",
}

Losses = Mapping[str, Tensor]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind the options that have one, and the description as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default is False
        return action.help if unset else super()._get_help_string(action)


class Stateful(Protocol):
    """Modules and optimisers: what a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def parser(
    script: str, description: str, presets: Mapping[str, Mapping[str, Any]]
) -> argparse.ArgumentParser:
    """The options that every training script has; ``script`` is its file."""
    parser = argparse.ArgumentParser(
        prog=f"examples/{Path(script).name}",
        description=description,
        formatter_class=_HelpFormatter,
    )
    add = parser.add_argument
    add("--preset", choices=presets, default=next(iter(presets)), help="named set of options")
    add("--out", type=Path, default=Path("runs/run"), help="folder for all that the run writes")
    add("--steps", type=int, help="length of the run")
    add("--lr", type=float, default=1e-3, help="learning rate")
    add(
        "--schedule",
        choices=("constant", "cosine"),
        default="constant",
        help="learning rate over time",
    )
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--amp", action="store_true", help="networks in bfloat16; losses stay in float32")
    add("--resume", action="store_true", help="continue the run in --out; else start it afresh")
    add("--stop-at", type=int, help="save and leave after this step, to --resume later")
    return parser


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """The options of every script that trains on images."""
    add = parser.add_argument
    add(
        "--data",
        choices=("auto", *data.NAMES),
        default="auto",
        help="auto: FashionMNIST if its files are found, else the bundled digits",
    )
    add("--data-dir", type=Path, help="folder of the data sets, else $OTLOSS_DATA")
    add("--epochs", type=float, default=1.0, help="length in passes over the images, if no --steps")
    add("--batch", type=int, default=200, help="real images per step")
    add("--limit-train", type=int, help="use only this many training images")
    add("--labels", type=int, nargs="+", help="only images of these classes, e.g. --labels 2")


def parse(
    parser: argparse.ArgumentParser,
    presets: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str] | None,
) -> argparse.Namespace:
    """Command line over preset over defaults.

    A preset maps options to values; its entry ``by_data`` maps names of data sets to what differs
    there.
    """
    # A parser without --help, so that the help shows the defaults of the preset.
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--preset", default=next(iter(presets)))
    preset = dict(presets.get(named.parse_known_args(argv)[0].preset, {}))
    by_data = preset.pop("by_data", {})
    parser.set_defaults(**preset)
    first = parser.parse_known_args(argv)[0]
    if getattr(first, "data", None) == "auto":
        # A folder that was named and is wrong must not fall back to digits in silence.
        found = first.data_dir or data.available("fashion", data.default_dir())
        first.data = "fashion" if found else "digits"
    if by_data:
        parser.set_defaults(**by_data.get(first.data, {}))
    args = parser.parse_args(argv)
    if hasattr(args, "data"):
        args.data = first.data
        if args.data == "digits" and args.data_dir:
            raise ValueError(
                f"--data-dir is {args.data_dir}, expected none: digits come with scikit-learn; "
                "--data names another set"
            )
    words = sys.argv[1:] if argv is None else argv
    # As one would repeat the run from its start.
    args.command = shlex.join(["python", parser.prog, *(w for w in words if w != "--resume")])
    return args


def begin(args: argparse.Namespace) -> torch.device:
    """Seed, check what every script shares, make ``args.out``, and give the device."""
    torch.manual_seed(args.seed)
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps is {args.steps}, expected at least 1")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {args.device}, expected cpu: torch sees no GPU")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise ValueError(f"--out is {args.out}, expected a folder to write in: {error}") from error
    return device


def begin_images(args: argparse.Namespace) -> tuple[data.ImageData, torch.device]:
    """``begin`` for scripts on images: read them too, and settle the number of steps."""
    device = begin(args)
    if args.limit_train is not None and args.limit_train < 1:
        raise ValueError(f"--limit-train is {args.limit_train}, expected at least 1")
    images = data.load(args.data, args.data_dir)
    images = images.only(args.labels) if args.labels else images
    if args.steps is None:
        trained = len(images.limited(args.limit_train).train)
        args.steps = round(args.epochs * (trained // args.batch))
        if args.steps < 1:
            raise ValueError(
                f"--epochs {args.epochs} gives {args.steps} steps, expected at least 1"
            )
    return images.to(device), device


def autocast(args: argparse.Namespace) -> torch.autocast:
    """bfloat16 for networks with ``--amp``. It needs no loss scaling, and otloss computes in
    float32 inside it."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp)


def set_rate(optimiser: torch.optim.Optimizer, args: argparse.Namespace, step: int) -> None:
    """Learning rate of step ``step`` by ``--schedule``: constant, or half a cosine down to 0."""
    cosine = args.schedule == "cosine"
    factor = 0.5 * (1 + math.cos(math.pi * step / args.steps)) if cosine else 1.0
    for group in optimiser.param_groups:
        group["lr"] = args.lr * factor


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seeded random numbers inside, those of the training untouched outside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class Run:
    """Calls ``step`` until ``args.steps``, and keeps ``args.out`` up to date.

    ``state`` names everything that training changes; together with the random number generators
    and the step count it is the checkpoint.
    """

    def __init__(self, args: argparse.Namespace, state: Mapping[str, Stateful]) -> None:
        self.args, self.state = args, state
        self.out: Path = args.out
        self.step, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.rows: list[dict[str, float]] = []
        self.pending: list[dict[str, Tensor]] = []
        self.evaluations: list[dict[str, float]] = []
        if args.resume:
            self._load()

    def train(
        self, step: Callable[[int], Losses], after: Callable[[int], None] | None = None
    ) -> bool:
        """Run the loop; ``False`` if it was told to stop before the last step.

        ``step(i)`` does one update and returns its losses, without reading them: that would make
        a GPU wait. ``after(i)`` is called when ``i`` steps are done, for pictures and metrics; it
        runs with its own random numbers and outside the measured time.
        """
        last = min(self.args.steps, self.args.stop_at or self.args.steps)
        saved = time.monotonic()
        with (
            _stop_on_signal() as stopped,
            Progress(self.out.name, self.args.steps, self.step, ranks.log()) as progress,
        ):
            while self.step < last and not ranks.any_of(bool(stopped)):
                start, cpu_start = time.monotonic(), time.process_time()
                self._record(step(self.step), progress)
                self.seconds += time.monotonic() - start
                self.cpu_seconds += time.process_time() - cpu_start
                self.step += 1
                progress(self.step)
                if after is not None:
                    with own_randomness(self.args.seed):
                        after(self.step)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()
        if self.step < self.args.steps and ranks.number() == 0:
            print(f"stopped at step {self.step} of {self.args.steps}; --resume continues")
        return self.step == self.args.steps

    def save(self) -> None:
        """Write checkpoint and logs, each whole or not at all."""
        if ranks.number() > 0:
            return
        checkpoint = {
            "state": {name: item.state_dict() for name, item in self.state.items()},
            "args": _plain(self.args),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            **{name: getattr(self, name) for name in self._kept},
        }
        with _replacing(self.out / "ckpt.pt") as path:
            torch.save(checkpoint, path)
        if self.rows:
            with _replacing(self.out / "loss.csv") as path, path.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.rows[0])
                writer.writeheader()
                writer.writerows(self.rows)

    def finish(self, **results: Any) -> None:
        """Write ``metrics.json`` and the loss figure."""
        report = {
            "args": _plain(self.args),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "otloss": otloss.__version__,
            },
            "steps": self.step,
            "seconds": round(self.seconds, 2),
            # What the run cost on the CPU, whatever else the machine did meanwhile.
            "cpu_seconds": round(self.cpu_seconds, 2),
            **results,
            "evaluations": self.evaluations,
        }
        with _replacing(self.out / "metrics.json") as path:
            path.write_text(json.dumps(report, indent=2) + "\n")
        if self.rows:
            steps = [row["step"] for row in self.rows]
            names = [name for name in self.rows[0] if name != "step"]
            curves = {name: (steps, [row[name] for row in self.rows]) for name in names}
            save_curves(curves, self.out / "loss.png")

    _kept = ("step", "seconds", "cpu_seconds", "rows", "pending", "evaluations")

    def _record(self, losses: Losses, progress: Progress) -> None:
        self.pending.append({name: value.detach() for name, value in losses.items()})
        if len(self.pending) < LOG_EVERY:
            return
        row: dict[str, float] = {"step": self.step + 1}
        for name in losses:
            row[name] = float(torch.stack([entry[name] for entry in self.pending]).mean())
            if not math.isfinite(row[name]):
                raise FloatingPointError(f"{name} is {row[name]} at step {self.step + 1}")
        self.pending.clear()
        self.rows.append(row)
        progress.notes = ", ".join(f"{name} {row[name]:.4g}" for name in losses)

    def _load(self) -> None:
        path = self.out / "ckpt.pt"
        if not path.is_file():
            raise FileNotFoundError(f"--resume: {path} is missing, expected a run begun in --out")
        checkpoint = torch.load(path, map_location=self.args.device, weights_only=True)
        for name, now in _plain(self.args).items():
            then = checkpoint["args"].get(name)
            if name not in FREE_TO_CHANGE and then != now:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} is {now!r}, expected {then!r} as the run in {path}")
        for name, item in self.state.items():
            item.load_state_dict(checkpoint["state"][name])
        for name in self._kept:
            setattr(self, name, checkpoint[name])
        torch.set_rng_state(checkpoint["rng"].cpu())
        if checkpoint["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([state.cpu() for state in checkpoint["cuda_rng"]])


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments as JSON and ``torch.load(weights_only=True)`` can hold them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in sorted(vars(args).items())}


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of ``path`` that takes its place once it is written."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _stop_on_signal() -> Iterator[list[int]]:
    """A list that is filled on Ctrl-C or SIGTERM, so that the step at hand can be completed.

    A second Ctrl-C interrupts at once.
    """
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
