"""OT-GAN on digits: transport between learned features, which a critic makes large.

python examples/minimal/otgan.py
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
    parser.add_argument("--out", default="otgan.png", help="picture to write")
    return parser.parse_args()


def main() -> None:
    args, data = arguments(), images()
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64), nn.Tanh()
    )
    critic = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128))
    adam = {"lr": 5e-4, "betas": (0.5, 0.999)}
    of_generator = torch.optim.Adam(generator.parameters(), **adam)
    of_critic = torch.optim.Adam(critic.parameters(), **adam)
    for step in range(args.steps):
        real = data[torch.randperm(len(data))[:400]]
        fake = generator(torch.randn(400, 64))
        x1, x2, y1, y2 = (*critic(real).chunk(2), *critic(fake).chunk(2))
        # The cosine cost takes features to the unit sphere, so the critic cannot just scale them.
        loss = otloss.minibatch_energy_distance(x1, x2, y1, y2, eps=0.01, cost="cosine")
        critics_turn = step % 4 == 0
        of_generator.zero_grad()
        of_critic.zero_grad()
        (-loss if critics_turn else loss).backward()
        (of_critic if critics_turn else of_generator).step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    draw(generator(torch.randn(100, 64)), args.out)


if __name__ == "__main__":
    main()
