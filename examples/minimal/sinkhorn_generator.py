"""A generator of digits, trained on optimal transport between batches: no discriminator.

python examples/minimal/sinkhorn_generator.py
"""

import argparse

import torch
from matplotlib.image import imsave
from sklearn.datasets import load_digits
from torch import nn

import otloss


def images() -> torch.Tensor:
    """The 1797 digits of 8x8 pixels that come with scikit-learn, in [-1, 1]."""
    return torch.from_numpy(load_digits().images).float().flatten(1) / 8 - 1


def draw(images: torch.Tensor, path: str) -> None:
    """The first hundred images as one picture."""
    tiles = nn.functional.pad(images[:100].detach().reshape(10, 10, 8, 8), (1, 1, 1, 1))
    pixels = tiles.permute(0, 2, 1, 3).reshape(100, 100)
    imsave(path, pixels.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy(), cmap="gray")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", default="sinkhorn_generator.png", help="picture to write")
    return parser.parse_args()


def main() -> None:
    args, data = arguments(), images()
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(64, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 512, bias=False),
        nn.BatchNorm1d(512),
        nn.ReLU(),
        nn.Linear(512, 64),
        nn.Tanh(),
    )
    optimiser = torch.optim.Adam(generator.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.steps)
    for step in range(args.steps):
        # Two independent half-batches of each kind: their distance to each other is subtracted,
        # which takes out what a finite sample adds.
        x1, x2 = data[torch.randperm(len(data))[:500]].chunk(2)
        y1, y2 = generator(torch.randn(500, 64)).chunk(2)
        loss = otloss.minibatch_energy_distance(x1, x2, y1, y2, eps=0.1, cost="euclidean")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    draw(generator.eval()(torch.randn(100, 64)), args.out)


if __name__ == "__main__":
    main()
