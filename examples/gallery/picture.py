"""What the gallery scripts share: their options and their figures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure


def options(script: str, description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """``--out`` and ``--seed``; seeds torch."""
    name = Path(script).stem
    parser = argparse.ArgumentParser(
        prog=f"examples/gallery/{name}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="picture to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    return args


def panels(
    rows: int, columns: int, size: tuple[float, float], **sharing: Any
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), each of width and height ``size``."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **sharing)


def save(figure: Figure, args: argparse.Namespace) -> None:
    """Write the figure where ``--out`` says."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=90)
    print(f"written to {args.out}")
