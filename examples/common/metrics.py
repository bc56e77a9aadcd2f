"""How good generated images are, each figure beside what real images score against real images.

All classifier metrics use the features and logits of our own small classifier, so they compare
runs of these scripts with each other, not with Inception scores of other papers.

* ``is``: exp of the mean KL between label distribution per image and overall (Salimans 2016)
* ``fid``: Fréchet distance between Gaussians fitted to the 128-d features (Heusel 2017)
* ``precision``, ``recall``: share of one side within the k=3 neighbourhoods of the other
  (Kynkäänniemi 2019)
* ``ot``: half the squared-L2 optimal-transport distance between 200 generated and 200 test images.
  Not lower-is-better: below the floor means blur, so read ``ot_gap`` = |ot - floor|
* ``smooth``: distance of neighbouring images on a grid over a 2-D latent, in units of that between
  nearest neighbours in the data
* ``med2``: half-squared minibatch energy distance (Salimans 2018), 200 images per half-batch;
  0 in expectation for a perfect generator
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import otloss
from common.data import ImageData, to_float
from common.models import Classifier, Generator

OT_BATCH = 200
OT_REPEATS = 25
# Squared distances are tens to hundreds, so the transport cost at this eps is that of exact OT to
# about 1e-4 (FashionMNIST, n=200: 76.79 against 76.786).
# float32 resolves no smaller tolerance at costs above a thousand.
EXACT: dict[str, Any] = {"eps": 0.1, "cost": "sqeuclidean", "max_iters": 10_000, "tol": 3e-3}
NEIGHBOURS = 3
CHUNK = 1000
LABELS = {
    "is": "inception score (classifier)",
    "fid": "Fréchet distance (classifier)",
    "precision": "precision, k=3",
    "recall": "recall, k=3",
    "ot": "OT distance, n=200",
    "ot_gap": "|OT - floor|",
    "med2": "MED², n=200",
    "smooth": "latent neighbours, mean",
    "smooth_95": "latent neighbours, 95th pct",
    "as_asked": "classified as asked",
    "geist_ot": "OT, train mode and split",
    "geist_is": "inception score of 200",
}


def inception_score(logits: Tensor, splits: int = 1) -> float:
    """exp(E KL(p(label|image) | p(label))), averaged over ``splits`` equal parts."""
    scores = []
    for part in logits.double().log_softmax(1).chunk(splits):
        p = part.exp()
        scores.append((p * (part - p.mean(0).log())).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|m_x - m_y|² + tr(S_x + S_y - 2 (S_x^½ S_y S_x^½)^½) of two feature sets (n, d), (m, d)."""
    x, y = x.double(), y.double()
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    # The eigenvalues of S_x S_y are those of S_x^½ S_y S_x^½, which are real and not negative.
    cross = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    return float(shift + cov_x.trace() + cov_y.trace() - 2 * cross)


def coverage(points: Tensor, centres: Tensor, k: int = NEIGHBOURS) -> float:
    """Share of ``points`` closer to some centre than that centre's k-th neighbour among centres.

    Generated points and real centres: precision. The other way round: recall.
    """
    # The nearest neighbour of a centre is itself, hence k + 1.
    radii = torch.cat(
        [torch.cdist(part, centres).kthvalue(k + 1, 1).values for part in centres.split(CHUNK)]
    )
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(CHUNK)]
    return float(torch.cat(inside).double().mean())


def ot_distance(x: Tensor, y: Tensor) -> float:
    """Half of squared-L2 optimal transport between two sets of images."""
    cost = otloss.sinkhorn_loss(x.flatten(1), y.flatten(1), objective="transport", **EXACT)
    return float(cost) / 2


def med2(x: Tensor, y: Tensor) -> float:
    """Half-squared minibatch energy distance; each argument is cut into two half-batches."""
    halves = (half.flatten(1) for half in (*x.chunk(2), *y.chunk(2)))
    # The loss is twice MED², of squared and not half-squared distances.
    return float(otloss.minibatch_energy_distance(*halves, **EXACT)) / 4


def smoothness(grid: Tensor, side: int, test: Tensor) -> dict[str, float]:
    """Distances between neighbours on a ``side`` x ``side`` grid of images, in units of the mean
    distance from a test image to its nearest neighbour: their mean and 95th percentile."""
    images = grid.reshape(side, side, -1)
    steps = ((images[1:] - images[:-1]), (images[:, 1:] - images[:, :-1]))
    distances = torch.cat([step.norm(dim=2).flatten() for step in steps])
    real = to_float(test[:CHUNK]).flatten(1)
    nearest = torch.cdist(real, real).fill_diagonal_(torch.inf).min(1).values.mean()
    relative = distances / nearest
    return {"smooth": float(relative.mean()), "smooth_95": float(relative.quantile(0.95))}


class Evaluator:
    """Scores images against the test split of ``data``.

    The test images and batches are the same at every call, so scores of two generators, and the
    floors, share their sampling noise.
    """

    def __init__(self, data: ImageData, classifier: Classifier, samples: int = 10_000) -> None:
        self.data, self.classifier = data, classifier.eval()
        self.wanted, self.samples = samples, min(samples, len(data.test))
        self.test = data.test[: self.samples]
        self.features, _ = self._classify(to_float(self.test))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, float]:
        """Every metric of ``images`` in [-1, 1]; all count for the inception score, and as many
        as there are test images for the others."""
        features, logits = self._classify(images)
        images, features = images[: self.samples], features[: self.samples]
        pairs = [self._pair(images, i) for i in range(OT_REPEATS)]
        return {
            "is": inception_score(logits, splits=max(1, len(logits) // CHUNK)),
            "fid": frechet_distance(features, self.features),
            "precision": coverage(features, self.features),
            "recall": coverage(self.features, features),
            "ot": fmean(ot_distance(x[:OT_BATCH], y[:OT_BATCH]) for x, y in pairs),
            "med2": fmean(med2(x, y) for x, y in pairs),
        }

    def floors(self) -> dict[str, float]:
        """Every metric of real images, those of the train split: what a perfect generator gets."""
        return self(to_float(self.data.train[: self.wanted]))

    @torch.no_grad()
    def geist_protocol(self, generator: Generator) -> dict[str, float]:
        """OT and inception score as Geist & Gérard took them: generator left in train mode (batch
        statistics and dropout), against the train split, and one draw of 200 for the score."""
        generator = copy.deepcopy(generator).train()  # a forward pass would move its statistics
        real = self.data.train.split(OT_BATCH)[:OT_REPEATS]
        fake = [generator(generator.draw(OT_BATCH)) for _ in real]
        pairs = zip(map(to_float, real), fake, strict=True)
        return {
            "geist_ot": fmean(ot_distance(x, y) for x, y in pairs),
            "geist_is": inception_score(self._classify(fake[0])[1]),
        }

    def share_of(self, images: Tensor, labels: Sequence[int]) -> float:
        """Share of the images that the classifier puts into one of these classes."""
        found = self._classify(images)[1].argmax(1)
        return float(torch.isin(found, found.new_tensor(labels)).double().mean())

    def _classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            features = torch.cat([self.classifier.body(part) for part in images.split(CHUNK)])
            return features, self.classifier.head(features)

    def _pair(self, images: Tensor, repeat: int) -> tuple[Tensor, Tensor]:
        """Two half-batches of real and two of given images, drawn anew for each repeat."""
        pick = torch.Generator().manual_seed(repeat)
        real = torch.randperm(self.samples, generator=pick)[: 2 * OT_BATCH]
        given = torch.randperm(len(images), generator=pick)[: 2 * OT_BATCH]
        return to_float(self.test[real.to(self.test.device)]), images[given.to(images.device)]


def table(metrics: Mapping[str, float], floors: Mapping[str, float]) -> str:
    """Metrics and floors as text, one line each."""
    lines = [f"{'':32}{'this run':>10}{'real-real':>12}"]
    for key, value in metrics.items():
        floor = f"{floors[key]:12.3f}" if key in floors else f"{'':12}"
        lines.append(f"{LABELS.get(key, key):32}{value:10.3f}{floor}")
    return "\n".join(lines)
