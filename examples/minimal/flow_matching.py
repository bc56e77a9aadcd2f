"""Flow matching on digits, noise and images paired by a transport plan.

python examples/minimal/flow_matching.py
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
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--out", default="flow_matching.png", help="picture to write")
    return parser.parse_args()


def main() -> None:
    args, data = arguments(), images()
    torch.manual_seed(0)
    velocity = nn.Sequential(
        nn.Linear(65, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, 64)
    )
    optimiser = torch.optim.Adam(velocity.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, args.steps)
    for step in range(args.steps):
        x1 = data[torch.randperm(len(data))[:256]]
        x0 = torch.randn_like(x1)
        # For each noise a partner from the plan: straight lines between them hardly cross.
        _, j = otloss.solve_sample(x0, x1, eps=1.0).sample()
        x1 = x1[j]
        t = torch.rand(len(x0), 1)
        found = velocity(torch.cat((torch.lerp(x0, x1, t), t), 1))
        loss = (found - (x1 - x0)).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    x, count = torch.randn(100, 64), 8
    with torch.no_grad():
        for k in range(count):
            x = x + velocity(torch.cat((x, torch.full((100, 1), k / count)), 1)) / count
    draw(x.clamp(-1, 1), args.out)


if __name__ == "__main__":
    main()
