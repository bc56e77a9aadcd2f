"""A Sinkhorn autoencoder: a divergence draws the codes to a normal distribution.

python examples/minimal/sinkhorn_autoencoder.py
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
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", default="sinkhorn_autoencoder.png", help="picture to write")
    return parser.parse_args()


def main() -> None:
    args, data = arguments(), images()
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    decoder = nn.Sequential(
        nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64), nn.Tanh()
    )
    both = nn.ModuleList((encoder, decoder))
    optimiser = torch.optim.Adam(both.parameters(), lr=1e-3)
    for step in range(args.steps):
        real = data[torch.randperm(len(data))[:256]]
        codes = encoder(real)
        error = (decoder(codes) - real).square().sum(1).mean()
        match = otloss.sinkhorn_divergence(codes, torch.randn(256, 8), eps=0.5)
        loss = error + 2 * match
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 0:
            print(f"step {step}: reconstruction {error.item():.3f}, codes {match.item():.4f}")
    draw(decoder(torch.randn(100, 8)), args.out)


if __name__ == "__main__":
    main()
