"""The problems that the benchmarks solve, each a recipe ``(n, seed) -> clouds and weights``.

Images are in [-1, 1] with d = 784: MNIST or FashionMNIST from ``$OTLOSS_DATA`` (in torchvision's
layout, ``MNIST/raw``), else for digits the 8x8 digits bundled with scikit-learn, enlarged to
28x28 and also shifted by two pixels each way; these stand in for FashionMNIST too, and
``Problem.data`` says so. A workload whose data is absent raises `UnavailableError`; the suites name
it and go on.

``hardness`` h = eps/sigma, with sigma the standard deviation of the double-centred cost, orders
problems by the number of iterations that they need, whatever the dimension: 1 is easy, .01 hard.
"""

from __future__ import annotations

import functools
import gzip
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, normalize

from benchmarks.reference import cost_matrix

Clouds = tuple[Tensor, Tensor]
IMAGE_SIDE = 28


class UnavailableError(RuntimeError):
    """The data of a workload is not on this machine."""


@dataclass(frozen=True)
class Problem:
    """Two weighted clouds, a cost and an eps, all in otloss's conventions."""

    name: str
    x: Tensor  # (n, d)
    y: Tensor  # (m, d)
    a: Tensor  # (n,)
    b: Tensor  # (m,)
    cost: str
    eps: float
    uniform: bool = True
    data: str = "synthetic"

    def to(self, *args: object) -> Problem:
        moved = {k: getattr(self, k).to(*args) for k in ("x", "y", "a", "b")}
        return replace(self, **moved)

    @property
    def options(self) -> dict[str, Tensor | str]:
        """What otloss takes besides the clouds and eps."""
        return {"a": self.a, "b": self.b, "cost": self.cost}

    @property
    def sizes(self) -> tuple[int, int]:
        return self.x.shape[0], self.y.shape[0]


@dataclass(frozen=True)
class Workload:
    title: str
    clouds: Callable[[int, torch.Generator], Clouds]
    cost: str
    eps: tuple[float, ...]
    sizes: tuple[int, ...]
    uniform: bool = True
    dataset: str | None = None


# Images


def _read_idx_images(path: Path) -> Tensor:
    """An uncompressed or gzipped IDX file of images, flattened, in [-1, 1]."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, IMAGE_SIDE**2)
    return torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1


@functools.cache
def _dataset(name: str) -> Tensor | None:
    root = os.environ.get("OTLOSS_DATA")
    for suffix in ("", ".gz"):
        path = Path(root or ".") / name / "raw" / f"train-images-idx3-ubyte{suffix}"
        if root and path.exists():
            return _read_idx_images(path)
    return None


def _bundled_digits() -> Tensor:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UnavailableError("needs $OTLOSS_DATA/MNIST or scikit-learn") from error
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    size = (IMAGE_SIDE, IMAGE_SIDE)
    large = interpolate(images, size, mode="bilinear", align_corners=False)
    shifts = [(0, 0), (0, 2), (0, -2), (2, 0), (-2, 0)]
    return torch.cat([large.roll(shift, (2, 3)) for shift in shifts]).flatten(1)


def images(name: str) -> tuple[Tensor, str]:
    """A dataset's training images (N, 784), or what stands in for them, and which it is."""
    found = _dataset(name)
    if found is not None:
        return found, name
    return _bundled_digits(), f"bundled digits in place of {name}"


def _draw(pool: Tensor, n: int, rng: torch.Generator) -> Tensor:
    if n > len(pool):
        raise UnavailableError(f"{n} samples wanted, the data has {len(pool)}")
    return pool[torch.randperm(len(pool), generator=rng)[:n]]


def _draw_two(pool: Tensor, n: int, rng: torch.Generator) -> Clouds:
    both = _draw(pool, 2 * n, rng)
    return both[:n], both[n:]


def _blur(pictures: Tensor) -> Tensor:
    """A 5x5 mean: what an early generator's samples look like to a squared distance."""
    square = pictures.view(-1, 1, IMAGE_SIDE, IMAGE_SIDE)
    return avg_pool2d(square, 5, stride=1, padding=2, count_include_pad=False).flatten(1)


def _smooth_noise(n: int, rng: torch.Generator) -> Tensor:
    """Images from random 7x7 grids, as from an untrained generator: structure, no meaning."""
    coarse = torch.randn(n, 1, 7, 7, generator=rng)
    size = (IMAGE_SIDE, IMAGE_SIDE)
    return torch.tanh(interpolate(coarse, size, mode="bilinear")).flatten(1)


def _random_vs_digits(n: int, rng: torch.Generator) -> Clouds:
    return _smooth_noise(n, rng), _draw(images("MNIST")[0], n, rng)


def _perturbed_vs_digits(n: int, rng: torch.Generator) -> Clouds:
    x, y = _draw_two(images("MNIST")[0], n, rng)
    return x + 0.3 * torch.randn(x.shape, generator=rng), y


def _blurred_vs_fashion(n: int, rng: torch.Generator) -> Clouds:
    x, y = _draw_two(images("FashionMNIST")[0], n, rng)
    return _blur(x), y


def _fashion_minibatches(n: int, rng: torch.Generator) -> Clouds:
    return _draw_two(images("FashionMNIST")[0], n, rng)


# Clouds of low and middle dimension


def _sphere(n: int, rng: torch.Generator) -> Tensor:
    return 0.5 + 0.4 * normalize(torch.randn(n, 3, generator=rng), dim=1)


def _torus(n: int, rng: torch.Generator) -> Tensor:
    s, t = 2 * math.pi * torch.rand(2, n, generator=rng)
    radius = 0.3 + 0.12 * torch.cos(t)
    points = torch.stack([radius * torch.cos(s), radius * torch.sin(s), 0.12 * torch.sin(t)], 1)
    return 0.5 + points


def _shapes(n: int, rng: torch.Generator) -> Clouds:
    return _sphere(n, rng), _torus(n, rng)


def _shapes_unit(n: int, rng: torch.Generator) -> Clouds:
    """The unit sphere and a torus inside it."""
    s, t = 2 * math.pi * torch.rand(2, n, generator=rng)
    radius = 0.7 + 0.3 * torch.cos(t)
    torus = torch.stack([radius * torch.cos(s), radius * torch.sin(s), 0.3 * torch.sin(t)], 1)
    return normalize(torch.randn(n, 3, generator=rng), dim=1), torus


def _mixtures(n: int, rng: torch.Generator) -> Clouds:
    """Two mixtures of eight Gaussians in the unit square."""

    def mixture() -> Tensor:
        centres, spreads = torch.rand(8, 2, generator=rng), torch.rand(8, 1, generator=rng)
        of = torch.randint(8, (n,), generator=rng)
        return centres[of] + (0.03 + 0.1 * spreads[of]) * torch.randn(n, 2, generator=rng)

    return mixture(), mixture()


def _solids(n: int, rng: torch.Generator) -> Clouds:
    """A ball and a cube of one spread, apart: the gradient is mostly that of the distance."""
    directions = normalize(torch.randn(n, 3, generator=rng), dim=1)
    ball = 0.3 * directions * torch.rand(n, 1, generator=rng) ** (1 / 3)
    cube = 0.46 * (torch.rand(n, 3, generator=rng) - 0.5)
    return 0.4 + ball, 0.6 + cube


def _gaussians(n: int, rng: torch.Generator) -> Clouds:
    d = 64
    scales = torch.linspace(0.5, 1.5, d)
    x = torch.randn(n, d, generator=rng)
    return x, 0.5 + scales * torch.randn(n, d, generator=rng)


def _features(n: int, rng: torch.Generator) -> Clouds:
    """Critic features: two mixtures of 20 clusters, one shifted, in 512 dimensions."""
    d, clusters = 512, 20
    centres = torch.randn(clusters, d, generator=rng)

    def mixture(shift: float) -> Tensor:
        labels = torch.randint(clusters, (n,), generator=rng)
        noise = torch.randn(n, d, generator=rng)
        return centres[labels] + 0.7 * noise + shift

    return mixture(0.0), mixture(0.1)


def _outliers(n: int, rng: torch.Generator) -> Clouds:
    """Gaussians in 2-D with every twentieth point ten times as far out."""
    x, y = torch.randn(2, n, 2, generator=rng)
    x[::20] *= 10
    y[::20] *= 10
    return x, y + 0.5


def _outliers_apart(n: int, rng: torch.Generator) -> Clouds:
    """Gaussians in 3-D with every twentieth point moved away by ten in each coordinate."""
    x, y = torch.randn(2, n, 3, generator=rng)
    x[::20] += 10
    y[::20] += 10
    return x, y + 0.5


def _low_dimensional(n: int, rng: torch.Generator) -> Clouds:
    x, y = torch.randn(2, n, 8, generator=rng)
    return x, y + 0.5


# eps = 2 blur^2 for the blurs that GeomLoss's users set (its cost is |x-y|^2 / 2).
WORKLOADS: dict[str, Workload] = {
    "random_images": Workload(
        "random images vs digits, d=784",
        _random_vs_digits,
        "sqeuclidean",
        (100.0, 10.0),
        (64, 256, 512, 1000),
        dataset="MNIST",
    ),
    "perturbed_digits": Workload(
        "perturbed digits vs digits, d=784",
        _perturbed_vs_digits,
        "sqeuclidean",
        (10.0, 1.0),
        (64, 256, 512, 1000),
        dataset="MNIST",
    ),
    "perturbed_digits_euclidean": Workload(
        "perturbed digits vs digits, d=784, |x-y|",
        _perturbed_vs_digits,
        "euclidean",
        (1.0,),
        (64, 256, 512, 1000),
        dataset="MNIST",
    ),
    "fashion_minibatches": Workload(
        "two FashionMNIST minibatches, d=784",
        _fashion_minibatches,
        "sqeuclidean",
        (10.0,),
        (64, 256, 512, 1000),
        dataset="FashionMNIST",
    ),
    "fashion_blurred": Workload(
        "blurred vs real FashionMNIST, d=784",
        _blurred_vs_fashion,
        "sqeuclidean",
        (100.0, 10.0, 1.0),
        (200, 500),
        dataset="FashionMNIST",
    ),
    "fashion_blurred_euclidean": Workload(
        "blurred vs real FashionMNIST, d=784, |x-y|",
        _blurred_vs_fashion,
        "euclidean",
        (100.0, 10.0, 1.0),
        (200, 500),
        dataset="FashionMNIST",
    ),
    "shapes_3d": Workload(
        "sphere vs torus, d=3",
        _shapes,
        "sqeuclidean",
        (5e-3, 2e-4),
        (2000, 10_000, 100_000),
    ),
    "shapes_unit": Workload(
        "unit sphere vs torus, d=3",
        _shapes_unit,
        "sqeuclidean",
        (5e-3, 2e-4),
        (10_000, 30_000, 100_000, 1_000_000),
    ),
    "mixtures_2d": Workload(
        "mixtures of Gaussians, d=2",
        _mixtures,
        "sqeuclidean",
        (5e-3, 2e-4),
        (10_000, 30_000, 100_000, 1_000_000),
    ),
    "solids_3d": Workload("ball vs cube, d=3", _solids, "sqeuclidean", (5e-3, 2e-4), (2000,)),
    "gaussians_64d": Workload(
        "Gaussians, d=64", _gaussians, "sqeuclidean", (50.0, 5.0), (1000, 5000)
    ),
    "gaussians_64d_weighted": Workload(
        "Gaussians, d=64, random weights",
        _gaussians,
        "sqeuclidean",
        (5.0,),
        (512, 1000),
        uniform=False,
    ),
    "cosine_features": Workload(
        "critic features, cosine, d=512", _features, "cosine", (0.002,), (256, 1000)
    ),
    "outliers": Workload(
        "Gaussians, d=2, 5% outliers", _outliers, "sqeuclidean", (0.2,), (512, 1000)
    ),
    "outliers_apart": Workload(
        "Gaussians, d=3, 5% far away", _outliers_apart, "sqeuclidean", (0.165,), (512, 1000)
    ),
    "low_dimensional": Workload("Gaussians, d=8", _low_dimensional, "sqeuclidean", (8.0,), (32,)),
}


def _weights(n: int, uniform: bool, rng: torch.Generator) -> Tensor:
    if uniform:
        return torch.full((n,), 1 / n, dtype=torch.float64)
    w = 0.1 + torch.rand(n, generator=rng, dtype=torch.float64)
    return w / w.sum()


def make(name: str, n: int, eps: float | None = None, seed: int = 0) -> Problem:
    """The problem in float32 on the CPU; ``eps`` defaults to the workload's first."""
    workload = WORKLOADS[name]
    rng = torch.Generator().manual_seed(seed)
    x, y = workload.clouds(n, rng)
    a, b = (_weights(n, workload.uniform, rng).float() for _ in range(2))
    eps = workload.eps[0] if eps is None else eps
    return Problem(
        name,
        x.contiguous(),
        y.contiguous(),
        a,
        b,
        workload.cost,
        eps,
        workload.uniform,
        images(workload.dataset)[1] if workload.dataset else "synthetic",
    )


def hardness(problem: Problem, most: int = 256) -> float:
    """h = eps / sigma, sigma the standard deviation of a double-centred corner of the cost."""
    C = cost_matrix(problem.x[:most].double(), problem.y[:most].double(), problem.cost)
    C = C - C.mean(0, keepdim=True) - C.mean(1, keepdim=True) + C.mean()
    return problem.eps / C.std().item()
