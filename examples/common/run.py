"""One training run in one folder: the steps counted, logged, timed and saved, so that it resumes.

    training = Run(args, {"model": model, "optimiser": optimiser})
    for i in training:
        ...                       # one step, in the script
        training.log(loss=loss)
    if training.finished:
        training.finish(metrics=...)

A folder holds ``ckpt.pt`` (everything needed to continue), ``loss.csv`` and ``loss.png``,
``metrics.json`` and ``report.html``. An interrupted run continued with ``--resume`` gives, on the
CPU, exactly the weights of a run that was never interrupted.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import otloss
from common import UsageError, ranks, replacing, report
from common.figures import Curve, save_curves
from common.options import flag, plain

LOG_EVERY = 10  # steps averaged into one row of loss.csv
SAVE_SECONDS = 60  # at most this much work is lost in a crash
# What may differ between a run and its continuation without changing what is computed.
PLACES = ("command", "out", "resume", "stop_at", "device", "data_dir", "classifier")
FREE_TO_CHANGE = {*PLACES, "eval_every", "eval_samples"}


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seeded random numbers inside, those of the training untouched outside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class Run:
    """Counts the steps up to ``args.steps``, and keeps ``args.out`` up to date between them.

    ``state`` names the modules and optimisers that training changes; together with the random
    number generators and the step count it is the checkpoint.
    """

    SUMS = ("step", "seconds", "cpu_seconds", "loss_seconds")
    _kept: tuple[str, ...] = (*SUMS, "rows", "pending", "evaluations")

    def __init__(self, args: argparse.Namespace, state: Mapping[str, Any]) -> None:
        self.args, self.state = args, state
        self.out: Path = args.out
        self.step, self.seconds, self.cpu_seconds, self.loss_seconds = 0, 0.0, 0.0, 0.0
        self.rows: list[dict[str, float]] = []
        self.pending: list[dict[str, Tensor]] = []
        self.evaluations: list[dict[str, Any]] = []
        if ranks.number() == 0:
            trained = [net for net in state.values() if isinstance(net, nn.Module)]
            trained = [net for net in trained if not isinstance(net, AveragedModel)]
            weights = sum(weight.numel() for net in trained for weight in net.parameters())
            written = f"{weights} weights, written to {args.out}"
            print(f"{self.subject()} on {args.device}, {written}", flush=True)
        if args.resume:
            self._load()

    def __iter__(self) -> Iterator[int]:
        """The numbers of the steps to do, until the last one, ``--stop-at``, Ctrl-C or SIGTERM."""
        last = min(self.args.steps, self.args.stop_at or self.args.steps)
        saved = time.monotonic()
        with _stop_on_signal() as stopped, self._bar() as bar:
            while self.step < last and not ranks.any_of(bool(stopped)):
                start, cpu_start = time.monotonic(), time.process_time()
                yield self.step
                self.step += 1
                if losses := self._average_losses():
                    bar.set_postfix(losses, refresh=False)
                self.seconds += time.monotonic() - start
                self.cpu_seconds += time.process_time() - cpu_start
                bar.update()
                with own_randomness(self.args.seed):
                    self.after_step()
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()
        if not self.finished and ranks.number() == 0:
            print(f"stopped at step {self.step} of {self.args.steps}; --resume continues")

    def _bar(self) -> tqdm[Any]:
        """Of the first process; on a terminal it moves, a log gets a line every half minute."""
        line = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}\n"
        log = {"mininterval": 30, "maxinterval": 60, "bar_format": line}
        return tqdm(
            total=self.args.steps,
            initial=self.step,
            desc=self.out.name,
            unit="step",
            disable=ranks.number() > 0,
            **({} if sys.stderr.isatty() else log),
        )

    def subject(self) -> str:
        """What is trained, for the line at the start."""
        return f"preset {self.args.preset}: {self.args.steps} steps"

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return bool(self.step == self.args.steps)

    def log(self, **losses: Tensor) -> None:
        """The losses of this step. They are read later: to read now would make a GPU wait."""
        self.pending.append({name: value.detach() for name, value in losses.items()})

    def after_step(self) -> None:
        """Pictures and metrics; with random numbers of its own, and outside the measured time."""

    def set_rate(self, *optimisers: torch.optim.Optimizer) -> None:
        """Learning rate of this step by ``--schedule``."""
        rate = self.args.lr * self.rate_factor()
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = rate

    def rate_factor(self) -> float:
        """1, or half a cosine from 1 down to 0."""
        if self.args.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * self.step / self.args.steps))

    def timed(self, loss: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
        """``loss(*tensors, **options)``; its seconds, backward included, are those of the loss."""
        clock = [time.monotonic()]

        def lap(counts: bool) -> None:
            now = time.monotonic()
            self.loss_seconds += counts * (now - clock[0])
            clock[0] = now

        value = loss(*tensors, **options)
        lap(True)
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(lambda gradient: lap(False))
            for tensor in tensors:
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: lap(True))
        return value

    def save(self) -> None:
        """Write checkpoint and logs, each whole or not at all."""
        if ranks.number() > 0:
            return
        checkpoint = {
            "state": {name: item.state_dict() for name, item in self.state.items()},
            "args": plain(self.args),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            **{name: getattr(self, name) for name in self._kept},
        }
        with replacing(self.out / "ckpt.pt") as path:
            torch.save(checkpoint, path)
        if self.rows:
            with replacing(self.out / "loss.csv") as path, path.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns())
                writer.writeheader()
                writer.writerows(self.rows)

    def finish(self, **results: Any) -> None:
        """Write ``metrics.json``, the loss figure and ``report.html``."""
        on_cpu = torch.device(self.args.device).type == "cpu"  # a GPU computes behind the clock
        contents = {
            "args": plain(self.args),
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
            "loss_share": round(self.loss_seconds / self.seconds, 4) if on_cpu else None,
            **results,
            "evaluations": self.evaluations,
        }
        with replacing(self.out / "metrics.json") as path:
            path.write_text(json.dumps(contents, indent=2) + "\n")
        if curves := self.curves():
            save_curves(curves, self.out / "loss.png")
        report.write(self.out, contents)

    def curves(self) -> dict[str, Curve]:
        """What ``loss.png`` shows, by name."""
        curves = {}
        for name in self._columns()[1:]:
            rows = [row for row in self.rows if name in row]
            curves[name] = ([row["step"] for row in rows], [row[name] for row in rows])
        return curves

    def _columns(self) -> list[str]:
        """Of ``loss.csv``: the step, and every loss there is."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def _average_losses(self) -> dict[str, float]:
        """Every ``LOG_EVERY`` steps the means of the losses, which are a row of ``loss.csv``."""
        if self.step % LOG_EVERY or not self.pending:
            return {}
        losses = {}
        for name in dict.fromkeys(name for entry in self.pending for name in entry):
            values = [entry[name] for entry in self.pending if name in entry]
            losses[name] = float(torch.stack(values).mean())
            if not math.isfinite(losses[name]):
                raise FloatingPointError(f"{name} is {losses[name]} at step {self.step}")
        self.pending.clear()
        self.rows.append({"step": self.step, **losses})
        return losses

    def _load(self) -> None:
        path = self.out / "ckpt.pt"
        if not path.is_file():
            raise FileNotFoundError(f"--resume: {path} is missing, expected a run begun in --out")
        checkpoint = torch.load(path, map_location=self.args.device, weights_only=True)
        self._check_arguments(checkpoint["args"], checkpoint["step"])
        for name, item in self.state.items():
            item.load_state_dict(checkpoint["state"][name])
        for name in self._kept:
            setattr(self, name, checkpoint[name])
        torch.set_rng_state(checkpoint["rng"].cpu())
        if checkpoint["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([state.cpu() for state in checkpoint["cuda_rng"]])

    def _check_arguments(self, before: Mapping[str, Any], done: int) -> None:
        """Those of the run so far; one whose rate does not depend on its length may be longer."""
        longer = self.args.schedule == "constant" and self.args.steps >= done
        free = FREE_TO_CHANGE | ({"steps", "epochs"} if longer else set())
        for name, now in plain(self.args).items():
            if name not in free and before.get(name) != now:
                found = f"{before.get(name)!r} as the run in {self.out}"
                raise UsageError(f"{flag(name)} is {now!r}, expected {found}")


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
