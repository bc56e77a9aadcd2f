"""Register two shapes of a hundred thousand points: one flows onto the other.

    python examples/register_shapes.py --out runs/shapes                          # a minute or two
    python examples/register_shapes.py --source bunny.npy --target torus --blur 0.02

Every point follows the gradient of the Sinkhorn divergence, from rough to fine: the blur of a step
falls from the size of the shapes to --blur. Writes a picture of every few steps, `steps.png` of all
of them, `steps.csv` and the points that were reached, `registered.npy`.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

import otloss

RATE = 0.45  # of n times the gradient; 1/2 would go all the way to where the plan sends a point
VIEW = {"elev": 55, "azim": -60}
SHOWN = 20_000  # points in a picture
TARGET = "the target"


def sphere(count: int) -> Tensor:
    return normalize(torch.randn(count, 3), dim=1)


def torus(count: int) -> Tensor:
    s, t = 2 * math.pi * torch.rand(2, count)
    radius = 0.7 + 0.3 * t.cos()
    return torch.stack([radius * s.cos(), radius * s.sin(), 0.3 * t.sin()], 1)


def knot(count: int) -> Tensor:
    """A tube around a trefoil."""
    t = 2 * math.pi * torch.rand(count)
    curve = [t.sin() + 2 * (2 * t).sin(), t.cos() - 2 * (2 * t).cos(), -(3 * t).sin()]
    return torch.stack(curve, 1) / 3 + 0.1 * sphere(count)


SHAPES: dict[str, Callable[[int], Tensor]] = {"sphere": sphere, "torus": torus, "knot": knot}


def load(name: str, count: int) -> Tensor:
    """A shape by name, or ``count`` points of a file, brought to the size of the others."""
    if name in SHAPES:
        return SHAPES[name](count)
    path = Path(name)
    if not path.exists():
        raise SystemExit(f"{name!r} is neither a file nor one of {', '.join(SHAPES)}")
    try:
        points = np.load(path) if path.suffix == ".npy" else np.loadtxt(path)
    except ValueError as error:
        raise SystemExit(f"{path} holds no array of points: {error}") from error
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise SystemExit(f"{path} must hold points (n, 2) or (n, 3), got shape {points.shape}")
    if not np.isfinite(points).all():
        raise SystemExit(f"{path} holds NaN or infinite coordinates")
    cloud = torch.from_numpy(points).float()
    cloud = cloud[torch.randint(len(cloud), (count,))] if len(cloud) != count else cloud
    cloud = cloud - cloud.mean(0)
    return cloud / cloud.norm(dim=1).square().mean().sqrt()


def blurs(steps: int, first: float, last: float) -> list[float]:
    """From rough to fine in the first two thirds of the steps."""
    falling = max(1, 2 * steps // 3)
    return [last * (first / last) ** max(0.0, 1 - k / falling) for k in range(steps)]


def draw(path: Path, clouds: dict[str, Tensor], colour: Tensor) -> None:
    figure = Figure(figsize=(3.2 * len(clouds), 3.4), layout="constrained")
    flat = next(iter(clouds.values())).shape[1] == 2
    for k, (title, cloud) in enumerate(clouds.items()):
        options = {} if flat else {"projection": "3d"}
        axes = figure.add_subplot(1, len(clouds), k + 1, **options)
        shown = cloud[:SHOWN].T.numpy()
        if title == TARGET:
            axes.scatter(*shown, s=0.4, color="grey")
        else:
            axes.scatter(*shown, s=0.4, c=colour[:SHOWN], cmap="viridis")
        axes.set_title(title, fontsize=9)
        axes.set_aspect("equal")
        if not flat:
            axes.view_init(**VIEW)
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def flow(x: Tensor, y: Tensor, args: argparse.Namespace) -> dict[str, Tensor]:
    """Moves x onto y; returns the clouds to be shown, by title."""
    colour, seen = x[:, 0].clone(), {"the start": x}
    with (args.out / "steps.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["step", "blur", "divergence", "moved", "seconds"])
        for step, blur in enumerate(blurs(args.steps, 0.3, args.blur)):
            start = time.perf_counter()
            x = x.detach().requires_grad_()
            value = otloss.sinkhorn_divergence(x, y, 2 * blur**2, tol=args.tol)
            (gradient,) = torch.autograd.grad(value, x)
            shift = RATE * len(x) * gradient
            x, moved = (x - shift).detach(), float(shift.norm(dim=1).mean())
            row = [float(value.detach()), moved, time.perf_counter() - start]
            table.writerow([step, f"{blur:.4g}", *(f"{v:.6g}" for v in row)])
            file.flush()
            told = f"blur {blur:.3f}, divergence {row[0]:.3e}, moved {moved:.3e}, {row[2]:.1f} s"
            print(f"step {step + 1}/{args.steps}: {told}", flush=True)
            if step % max(1, args.steps // 4) == 0 or step == args.steps - 1:
                title = f"after step {step + 1}"
                draw(args.out / f"step_{step + 1:03d}.png", {title: x}, colour)
                seen[title] = x
    np.save(args.out / "registered.npy", x.numpy())
    draw(args.out / "steps.png", {**seen, TARGET: y}, colour)
    return seen


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(SHAPES)
    parser.add_argument("--source", default="sphere", help=f"{names}, or a file .npy or .txt")
    parser.add_argument("--target", default="knot", help="likewise")
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--blur", type=float, default=0.02, help="of the last steps")
    parser.add_argument("--tol", type=float, default=1e-2, help="of the solves")
    parser.add_argument("--out", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("points", "steps", "blur", "tol"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} must be > 0, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(args.seed)
    x, y = load(args.source, args.points), load(args.target, args.points)
    if x.shape[1] != y.shape[1]:
        raise SystemExit(f"{args.source} has {x.shape[1]} coordinates, {args.target} {y.shape[1]}")
    args.out.mkdir(parents=True, exist_ok=True)
    with otloss.progress():
        flow(x, y, args)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
