"""What share of a training step the loss takes: an MLP generator of 28x28 images.

The step of ``examples/train_sinkhorn.py``: draw, generate, loss, backward, Adam. The gradient of
the images is taken first and handed to the generator's backward, which splits the backward pass
between the two at no cost. The floor of a loss is the matrix products that it cannot avoid: the
costs of its problems and the gradients of those with generated images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import timing, workloads
from benchmarks.environment import ROOT
from benchmarks.suites import Context, text_table

TITLE = "Share of the loss in a training step of an MLP generator, d = 784"
HIDDEN, LATENT = (256, 512, 1024), 64
WARM_UP = 20  # steps, after which the generated images have some structure
STEPS = 60
BAR = 0.15
PARTS = ("generator forward", "loss forward", "loss backward", "generator backward", "optimiser")
LOSS_PARTS = PARTS[1:3]

Loss = Callable[[Tensor, Tensor], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training_step")
    group.add_argument("--steps", type=int, default=STEPS, help="training steps that are timed")


def _losses() -> dict[str, tuple[int, Loss, Callable[[Tensor, Tensor], None]]]:
    """Name: batch, loss(real, fake), floor(real, fake). The second is the preset ``med``'s."""
    import otloss

    def med(real: Tensor, fake: Tensor) -> Tensor:
        halves = (*real.chunk(2), *fake.chunk(2))
        return otloss.minibatch_energy_distance(*halves, 0.3, cost="euclidean")

    def med_floor(real: Tensor, fake: Tensor) -> None:
        x1, x2, y1, y2 = (*real.chunk(2), *fake.chunk(2))
        _products([(y1, x1), (y1, x2), (y2, x1), (y2, x2), (y1, y2), (y2, y1)], [(x1, x2)])

    def divergence(real: Tensor, fake: Tensor, eps: float, cost: str) -> Tensor:
        return otloss.sinkhorn_divergence(fake, real, eps, cost=cost)

    def divergence_floor(real: Tensor, fake: Tensor) -> None:
        _products([(fake, real), (fake, fake)], [(real, real)])

    squared = partial(divergence, eps=10.0, cost="sqeuclidean")
    euclidean = partial(divergence, eps=1.0, cost="euclidean")
    return {
        "divergence, squared, eps 10": (200, squared, divergence_floor),
        "divergence, euclidean, eps 1": (200, euclidean, divergence_floor),
        "minibatch energy distance, eps .3, batch 200": (200, med, med_floor),
        "minibatch energy distance, eps .3, batch 500": (500, med, med_floor),
    }


def _products(trained: list[tuple[Tensor, Tensor]], fixed: list[tuple[Tensor, Tensor]]) -> None:
    """The cost of each pair, and the gradient in the first of it for those that are trained."""
    for x, y in trained:
        torch.mm(torch.mm(x, y.T), y)
    for x, y in fixed:
        torch.mm(x, y.T)


class _Training:
    """A generator in training, timed part by part."""

    def __init__(self, context: Context, images: Tensor, batch: int, loss: Loss) -> None:
        sys.path.insert(0, str(ROOT / "examples"))
        from common.models import mlp_generator

        torch.manual_seed(0)
        self.clock = timing.CLOCKS[context.options.clock]
        self.images, self.batch, self.loss = images, batch, loss
        self.generator = mlp_generator((1, 28, 28), LATENT, "normal", HIDDEN).to(context.device)
        self.optimiser = torch.optim.Adam(self.generator.parameters(), 3e-3)
        self.fake = self.real = images[:0]

    def step(self) -> list[float]:
        """Seconds of each of `PARTS`."""
        self.real = self.images[torch.randint(len(self.images), (self.batch,))]
        times = [self.clock()]
        images = self.generator(self.generator.draw(self.batch)).flatten(1)
        times.append(self.clock())
        self.fake = images.detach().requires_grad_()
        value = self.loss(self.real, self.fake)
        times.append(self.clock())
        (gradient,) = torch.autograd.grad(value, self.fake)
        times.append(self.clock())
        self.optimiser.zero_grad()
        images.backward(gradient)
        times.append(self.clock())
        self.optimiser.step()
        times.append(self.clock())
        return np.diff(times).tolist()


def _rows(context: Context, images: Tensor) -> list[dict[str, Any]]:
    losses = _losses()
    trainings = {
        name: _Training(context, images, batch, loss) for name, (batch, loss, _) in losses.items()
    }
    for training in trainings.values():
        for _ in range(WARM_UP):
            training.step()
    samples: dict[str, list[list[float]]] = {name: [] for name in losses}
    floors: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(context.options.steps):
        for name, training in trainings.items():
            samples[name].append(training.step())
            floor = partial(losses[name][2], training.real, training.fake.detach())
            floors[name].append(context.timer.seconds(floor))
    return [
        _row(name, losses[name][0], np.asarray(samples[name]), np.asarray(floors[name]))
        for name in losses
    ]


def _row(name: str, batch: int, parts: np.ndarray, floor: np.ndarray) -> dict[str, Any]:
    seconds = {part: timing.statistics(parts[:, i]) for i, part in enumerate(PARTS)}
    total = timing.statistics(parts.sum(1))
    loss = parts[:, [PARTS.index(part) for part in LOSS_PARTS]].sum(1)
    return {
        "loss": name,
        "batch": batch,
        "seconds": seconds,
        "step": total,
        "floor": timing.statistics(floor),
        "share": float(np.median(loss / parts.sum(1))),
        "floor_share": float(np.median(floor / (parts.sum(1) - loss + floor))),
        "bar": BAR,
    }


def run(context: Context) -> dict[str, Any]:
    images, source = workloads.images("FashionMNIST")
    return {"rows": _rows(context, images.to(context.device)), "data": source}


def table(result: dict[str, Any]) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        times = [f"{1e3 * row['seconds'][part]['median']:.1f}" for part in PARTS]
        met = "met" if row["share"] <= row["bar"] else "NOT met"
        return [
            row["loss"],
            *times,
            f"{1e3 * row['step']['median']:.1f}",
            f"{row['share']:.0%} ({row['bar']:.0%}: {met})",
            f"{row['floor_share']:.0%}",
        ]

    header = ["loss, ms", *PARTS, "step", "share of the loss", "with only its products"]
    return text_table(header, map(cells, result["rows"])) + f"\ndata: {result['data']}"


def figure(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    rows = result["rows"][::-1]
    fig = Figure(figsize=(7.4, 0.5 * len(rows) + 1.6), layout="constrained")
    axes = fig.subplots()
    left = np.zeros(len(rows))
    colours = ("C7", "C1", "C3", "0.65", "0.85")
    for part, colour in zip(PARTS, colours, strict=True):
        widths = np.asarray([1e3 * row["seconds"][part]["median"] for row in rows])
        axes.barh([row["loss"] for row in rows], widths, 0.6, left, color=colour, label=part)
        left += widths
    for row, end in zip(rows, left, strict=True):
        axes.annotate(f" {row['share']:.0%}", (end, row["loss"]), va="center")
    axes.set(xlabel="ms per step; the number is the share of the loss, forward and backward")
    axes.margins(x=0.1)
    fig.legend(loc="outside lower center", ncols=3)
    return fig
