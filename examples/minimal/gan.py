"""A plain GAN on digits, to put beside the others.

python examples/minimal/gan.py
"""

import argparse

import torch
from matplotlib.image import imsave
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import softplus


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
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", default="gan.png", help="picture to write")
    return parser.parse_args()


def main() -> None:
    args, data = arguments(), images()
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64), nn.Tanh()
    )
    discriminator = nn.Sequential(
        nn.Linear(64, 256), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(256, 1)
    )
    of_generator = torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.5, 0.999))
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=5e-4, betas=(0.5, 0.999))
    for step in range(args.steps):
        real = data[torch.randperm(len(data))[:128]]
        fake = generator(torch.randn(128, 64))
        told = softplus(-discriminator(real)).mean() + softplus(discriminator(fake.detach())).mean()
        of_discriminator.zero_grad()
        told.backward()
        of_discriminator.step()

        loss = softplus(-discriminator(fake)).mean()
        of_generator.zero_grad()
        loss.backward()
        of_generator.step()
        if step % 200 == 0:
            print(f"step {step}: discriminator {told.item():.3f}, generator {loss.item():.3f}")
    draw(generator(torch.randn(100, 64)), args.out)


if __name__ == "__main__":
    main()
