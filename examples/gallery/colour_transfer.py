"""The colours of one photograph given to another.

Pixels are points in RGB. The potential f of the transport between samples of both photographs is
defined at every colour (``OTResult.extend``), and a colour x moves to x - f'(x)/2, the average of
the colours that its mass goes to. A larger eps averages over more of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import picture
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor

import otloss

EPS = (0.002, 0.05)  # squared distances between colours in [0, 1]^3 are about .3
SAMPLES = 600
CHUNK = 20_000
STRIDE = 4  # every fourth pixel of the photographs in each direction


def photograph(name: str) -> Tensor:
    """One of the photographs that come with scikit-learn, (H, W, 3) in [0, 1]."""
    return torch.from_numpy(load_sample_image(name)[::STRIDE, ::STRIDE].copy()).float() / 255


def sample(image: Tensor) -> Tensor:
    """Colours of pixels drawn at random."""
    colours = image.flatten(0, 1)
    return colours[torch.randperm(len(colours))[:SAMPLES]]


def recoloured(image: Tensor, other: Tensor, eps: float) -> Tensor:
    """``image`` in the colours of ``other``."""
    result = otloss.solve_sample(sample(image), sample(other), eps)
    moved = []
    for part in image.flatten(0, 1).split(CHUNK):
        x = part.clone().requires_grad_()
        (slope,) = torch.autograd.grad(result.extend(x).sum(), x)
        moved.append(part - slope / 2)
    return torch.cat(moved).reshape(image.shape).clamp(0, 1)


def main(argv: Sequence[str] | None = None) -> None:
    args = picture.options(__file__, __doc__ or "", argv)
    images = [photograph("china.jpg"), photograph("flower.jpg")]
    figure, axes = picture.panels(2, 1 + len(EPS), (2.6, 1.9))
    for row, (image, other) in zip(axes, (images, images[::-1]), strict=True):
        pictures = {"photograph": image}
        pictures |= {f"eps {eps:g}": recoloured(image, other, eps) for eps in EPS}
        for panel, (title, pixels) in zip(row, pictures.items(), strict=True):
            panel.imshow(pixels.numpy())
            panel.set_title(title, fontsize=9)
            panel.axis("off")
    picture.save(figure, args)


if __name__ == "__main__":
    main()
