"""
Colour transfer
===============

The colours of one photograph given to another: a map computed on a sample serves every pixel.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_image

import otloss

torch.manual_seed(0)


def photograph(name):
    """A photograph of scikit-learn, every fourth pixel each way, (H, W, 3) in [0, 1]."""
    return torch.from_numpy(load_sample_image(name)[::4, ::4].copy()).float() / 255


def sample(image):
    """600 colours of pixels drawn at random."""
    colours = image.flatten(0, 1)
    return colours[torch.randperm(len(colours))[:600]]


# %%
# Pixels are points in RGB. ``OTResult.extend`` gives the potential f at any colour x, and x moves
# to x - f'(x)/2, the average of the colours that its mass goes to. A larger eps averages over more.


def recoloured(image, other, eps):
    """``image`` in the colours of ``other``."""
    result = otloss.solve_sample(sample(image), sample(other), eps)
    moved = []
    for part in image.flatten(0, 1).split(20_000):
        x = part.clone().requires_grad_()
        (slope,) = torch.autograd.grad(result.extend(x).sum(), x)
        moved.append(part - slope / 2)
    return torch.cat(moved).reshape(image.shape).clamp(0, 1)


china, flower = photograph("china.jpg"), photograph("flower.jpg")
figure, axes = plt.subplots(2, 3, figsize=(7.8, 3.8), layout="constrained")
for row, (image, other) in zip(axes, ((china, flower), (flower, china)), strict=True):
    pictures = {"photograph": image}
    pictures |= {f"eps {eps:g}": recoloured(image, other, eps) for eps in (0.002, 0.05)}
    for panel, (title, pixels) in zip(row, pictures.items(), strict=True):
        panel.imshow(pixels)
        panel.set_title(title, fontsize=9)
        panel.axis("off")
plt.show()
