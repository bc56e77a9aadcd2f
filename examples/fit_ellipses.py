"""Fit three ellipses to the iris flowers without their labels (Genevay et al. 2018, section 5.1).

    python examples/fit_ellipses.py --out runs/ellipses

The measurements are projected to their three principal components. The model is a mixture of
three ellipsoids A_k z + c_k, z uniform in the unit ball, that starts at A = I and k-means centres.
It is fitted once by each of these losses:

* ``mmd``: the limit of large eps, here the energy distance
* ``eps <e>``: the paper's 2W(x,y) - W(x,x) - W(y,y) of squared distances after 20 iterations
* ``med <e>``: the minibatch energy distance of halves, whose self terms compare independent
  samples. The paper's compare a sample with itself, which rewards ellipsoids that are too small

The score counts flowers of class j inside ellipsoid i: the sum over the diagonal (right ones)
minus the sum off the diagonal. Ellipsoids are named by the matching that makes it largest.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import options, run
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA
from torch import Tensor, nn

import otloss

COMPONENTS = 3
SPECIES = ("setosa", "versicolor", "virginica")
PRESETS: dict[str, dict[str, Any]] = {"iris": {"steps": 500, "lr": 1e-2, "schedule": "cosine"}}


class Ellipsoids(nn.Module):
    """Matrices A (K, d, d) and centres c (K, d) of the mixture of A_k z + c_k."""

    def __init__(self, centres: Tensor) -> None:
        super().__init__()
        k, d = centres.shape
        self.axes = nn.Parameter(torch.eye(d).repeat(k, 1, 1))
        self.centres = nn.Parameter(centres.clone())

    def draw(self, n: int) -> Tensor:
        """``n`` points, as many of each ellipsoid as of the others up to one."""
        (k, d), device = self.centres.shape, self.centres.device
        direction = nn.functional.normalize(torch.randn(n, d, device=device), dim=1)
        ball = direction * torch.rand(n, 1, device=device) ** (1 / d)
        which = torch.arange(n, device=device) % k
        return torch.einsum("nij,nj->ni", self.axes[which], ball) + self.centres[which]

    @torch.no_grad()
    def inside(self, points: Tensor) -> Tensor:
        """Whether point (n, d) lies in ellipsoid k: (K, n) bool."""
        offsets = (points - self.centres[:, None]).mT
        return torch.linalg.solve(self.axes, offsets).norm(dim=1) <= 1


def loss_of(name: str, real: Tensor, fake: Tensor, n_iters: int) -> Tensor:
    """The loss called ``name``: ``mmd``, ``eps <e>`` or ``med <e>``."""
    kind, _, number = name.partition(" ")
    if kind == "mmd":
        return otloss.energy_distance(real, fake)
    eps = float(number)
    if kind == "med":
        halves = (*real[torch.randperm(len(real))].chunk(2), *fake.chunk(2))
        return otloss.minibatch_energy_distance(*halves, eps, cost="sqeuclidean")
    return 2 * otloss.sinkhorn_divergence(fake, real, eps, objective="transport", n_iters=n_iters)


def score(model: Ellipsoids, points: Tensor, labels: Tensor) -> dict[str, Any]:
    """Counts (ellipsoid, class) and their sums on and off the diagonal."""
    counts = torch.stack([model.inside(points[labels == j]).sum(1) for j in range(COMPONENTS)], 1)
    # Swapping ellipsoids moves the off-diagonal sum by what the diagonal one gains.
    order = linear_sum_assignment(counts.T.numpy(), maximize=True)[1]
    counts = counts[order]
    diagonal, total = int(counts.trace()), int(counts.sum())
    return {"counts": counts.tolist(), "diagonal": diagonal, "off_diagonal": total - diagonal}


def picture(models: Mapping[str, Ellipsoids], points: Tensor, labels: Tensor, path: Path) -> None:
    """Flowers and ellipsoids on the plane of the first two components, one panel per loss."""
    columns = -(-len(models) // 2)
    figure = Figure(figsize=(3.2 * columns, 6.6), layout="constrained")
    panels = figure.subplots(2, columns, sharex=True, sharey=True, squeeze=False)
    angle = torch.linspace(0, 2 * torch.pi, 200)
    circle = torch.stack((angle.cos(), angle.sin()))
    for panel, (name, model) in zip(panels.flat, models.items(), strict=False):
        for species in range(COMPONENTS):
            of_species = points[labels == species]
            panel.scatter(*of_species[:, :2].T, s=8, label=SPECIES[species])
        for axes, centre in zip(model.axes.detach(), model.centres.detach(), strict=True):
            # The shadow of {Az} on a plane is the ellipse of the root of (A Aᵀ) cut to the plane.
            outline = torch.linalg.cholesky((axes @ axes.T)[:2, :2]) @ circle + centre[:2, None]
            panel.plot(*outline, color="black", linewidth=1)
        result = score(model, points, labels)
        panel.set_title(f"{name}: {result['diagonal']} right, {result['off_diagonal']} wrong")
    for panel in panels[-1]:
        panel.set_xlabel("first principal component")
    for panel in panels[:, 0]:
        panel.set_ylabel("second principal component")
    for unused in panels.flat[len(models) :]:
        unused.set_axis_off()
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    figure.savefig(path, dpi=90)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options.parser(__file__, __doc__ or "", PRESETS)
    add = parser.add_argument
    losses = ["mmd", "eps 1", "eps 0.1", "eps 0.03", "med 1", "med 0.1", "med 0.03"]
    add("--losses", nargs="+", default=losses, help="one fit for each")
    add("--n-iters", type=int, default=20, help="Sinkhorn iterations")
    add("--samples", type=int, default=200, help="points drawn from the model per step")
    args = options.parse(parser, PRESETS, argv)
    if "n_iters" in options.given(parser, argv) and not any("eps" in loss for loss in args.losses):
        raise options.UsageError("--n-iters does nothing without an 'eps <e>' among the --losses")
    for name in args.losses:
        if not re.fullmatch(r"mmd|(eps|med) [0-9.e-]+", name):
            raise options.UsageError(
                f"--losses has {name!r}, expected 'mmd', 'eps <e>' or 'med <e>'"
            )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    options.begin(args)
    measurements, species = load_iris(return_X_y=True)
    components = PCA(COMPONENTS).fit_transform(measurements).astype("float32")
    kmeans = KMeans(COMPONENTS, n_init=10, random_state=args.seed).fit(components)
    points, labels, centres = map(torch.from_numpy, (components, species, kmeans.cluster_centers_))
    models = {name: Ellipsoids(centres) for name in args.losses}
    everything = nn.ModuleList(models.values()).to(args.device)
    data = points.to(args.device)
    optimiser = torch.optim.Adam(everything.parameters(), args.lr)

    training = run.Run(args, {"models": everything, "optimiser": optimiser})
    for _ in training:
        losses = {
            name: training.timed(loss_of, name, data, model.draw(args.samples), args.n_iters)
            for name, model in models.items()
        }
        training.set_rate(optimiser)
        optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
        training.log(**losses)

    if training.finished:
        everything.cpu()
        results = {name: score(model, points, labels) for name, model in models.items()}
        picture(models, points, labels, training.out / "ellipses.png")
        start = score(Ellipsoids(centres), points, labels)
        training.finish(metrics=results, floors={"k-means, A = I": start})
        for name, result in {**results, "k-means, A = I": start}.items():
            right, wrong = result["diagonal"], result["off_diagonal"]
            print(f"{name:>16}: {right} right, {wrong} wrong, difference {right - wrong}")
        print(f"written to {training.out}")


if __name__ == "__main__":
    options.run_from_shell(main)
