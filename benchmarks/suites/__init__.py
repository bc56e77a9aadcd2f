"""The suites: one module each.

A suite module defines

    TITLE: str
    add_arguments(parser)                  its own options
    run(context) -> dict                   {"rows": [...], ...}, plain JSON values
    table(result) -> str                   the result as text
    figure(result) -> matplotlib Figure
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.timing import Timer

NAMES = (
    "iteration",
    "sweeps",
    "costs",
    "products",
    "floors",
    "overhead",
    "accuracy",
    "passes",
    "training_step",
    "memory",
    "large",
)


@dataclass(frozen=True)
class Context:
    """What every suite gets: the peers that can run, the device and the parsed options."""

    peers: dict[str, ModuleType]
    device: torch.device
    options: argparse.Namespace
    environment: dict[str, Any]
    path: Path  # of the suite's JSON
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def timer(self) -> Timer:
        return Timer(self.device, self.options.clock)

    def earlier(self) -> dict[str, Any]:
        """The suite's result of an earlier run, {} if there is none."""
        return json.loads(self.path.read_text())["result"] if self.path.exists() else {}

    def save(self, result: dict[str, Any]) -> None:
        """Write the JSON: at the end of a run, or after each part of a long one."""
        suite = importlib.import_module(f"{__name__}.{self.path.stem}")
        document = {
            "suite": self.path.stem,
            "title": suite.TITLE,
            "environment": {**self.environment, "load_average_after": list(os.getloadavg())},
            "skipped_peers": self.skipped,
            "result": result,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(document, indent=1) + "\n")

    def supporting(self, function: str) -> dict[str, ModuleType]:
        """The peers that have the suite's function; the others are reported as skipped."""
        found = {name: peer for name, peer in self.peers.items() if hasattr(peer, function)}
        for name in self.peers.keys() - found.keys():
            self.skipped[name] = f"has no {function}()"
        return found


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns padded to their widest cell; numbers arrive already formatted."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def verdict(ratio: float, bar: float) -> str:
    return f"{ratio:.1f}x (bar {bar:g}x: {'met' if ratio >= bar else 'NOT met'})"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
