"""Autoencoders that generate: a Sinkhorn autoencoder, and the VAE to put beside it.

    python examples/train_autoencoder.py --preset sae --out runs/sae
    python examples/train_autoencoder.py --preset vae-20 --out runs/vae

An encoder and a decoder reconstruct the images, while the codes are drawn to the distribution of
the latent vector. Presets:

* ``sae``: Patrini et al. 2019. A Sinkhorn divergence draws the cloud of codes of a batch
* ``sae-2``: the same with a 2-D latent, whose map can be looked at
* ``vae-2``, ``vae-20``: Kingma & Welling 2014, networks of one hidden layer of 400. A
  Kullback-Leibler term draws the distribution of each image's code
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import generate, options
from common.data import to_float
from common.figures import save_grid
from common.metrics import Evaluator
from common.models import HIDDEN, mlp_critic, mlp_generator, moving_average, widths
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import otloss

SAE: dict[str, Any] = {
    "method": "sae",
    "eps": 0.5,
    "latent": 8,
    "weight": 2.0,
    "lr": 2e-3,
    "schedule": "cosine",
    "batch": 500,
    "epochs": 15.0,
    "by_data": {"digits": {"epochs": 300.0, "width": 0.5}},
}
VAE: dict[str, Any] = {
    "method": "vae",
    "hidden": [400],
    "norm": False,
    "latent": 20,
    "batch": 100,
    "epochs": 15.0,
    "by_data": {"digits": {"epochs": 100.0}},
}
PRESETS: dict[str, dict[str, Any]] = {
    "sae": SAE,
    "sae-2": {**SAE, "latent": 2},
    "vae-20": VAE,
    "vae-2": {**VAE, "latent": 2},
}
# The divergence of Kullback and Leibler is to a normal distribution.
NEEDS: options.Needs = {"eps": ("method", ["sae"]), "prior": ("method", ["sae"])}
PAIRS = 50  # images beside their reconstructions


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = generate.parser(__file__, __doc__ or "", PRESETS)
    add = parser.add_argument
    add("--method", choices=("sae", "vae"), default="sae", help="what draws the codes")
    add("--eps", type=float, default=1.0, help="regularisation of the divergence, sae")
    add("--weight", type=float, default=1.0, help="of what draws the codes")
    add("--hidden", type=int, nargs="+", default=HIDDEN, help="hidden layers of the decoder")
    flag = argparse.BooleanOptionalAction
    add("--norm", action=flag, default=True, help="batch normalisation in the decoder")
    return options.parse(parser, PRESETS, argv, NEEDS)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    images, batches = options.begin_images(args)
    hidden = widths(args.hidden, args.width)
    decoder = mlp_generator(images.shape, args.latent, args.prior, hidden, 0.0, args.norm)
    codes = args.latent * (2 if args.method == "vae" else 1)  # a VAE's are means and variances
    encoder = mlp_critic(images.shape, hidden[::-1], outputs=codes)
    both = nn.ModuleList((decoder, encoder)).to(args.device)
    average = moving_average(decoder, args.ema)
    optimiser = torch.optim.Adam(both.parameters(), args.lr)
    state = {"both": both, "average": average, "optimiser": optimiser}

    @torch.no_grad()
    def reconstructions(folder: Path, evaluator: Evaluator) -> Mapping[str, float]:
        real = to_float(images.test)
        restored = average.module.generate(encoder(real)[:, : args.latent])
        pairs = torch.stack((real[:PAIRS], restored[:PAIRS]), 1).flatten(0, 1)
        save_grid(pairs, folder / "reconstructions.png", columns=10)
        return {"reconstruction": float((restored - real).square().mean())}

    training = generate.Training(args, images, average.module, state, reconstructions)
    for i in training:
        real = to_float(images.train[batches(i)])
        with options.autocast(args):
            codes = encoder(real).float()
            if args.method == "vae":
                mean, log_variance = codes.chunk(2, 1)
                codes = mean + torch.randn_like(mean) * (log_variance / 2).exp()
            restored = decoder(codes).float()
        if args.method == "vae":
            error = cross_entropy(restored, real)
            spread = mean.square() + log_variance.exp() - 1 - log_variance
            match = 0.5 * spread.sum(1).mean()
        else:
            error = (restored - real).square().flatten(1).sum(1).mean()
            wanted = decoder.draw(len(real))
            match = training.timed(otloss.sinkhorn_divergence, codes, wanted, args.eps)
        loss = error + args.weight * match
        training.set_rate(optimiser)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        average.update_parameters(decoder)
        training.log(loss=loss, reconstruction=error, match=match)

    training.conclude()


def cross_entropy(restored: Tensor, real: Tensor) -> Tensor:
    """Nats per image, with pixels taken from [-1, 1] to probabilities."""
    p, wanted = ((images + 1) / 2 for images in (restored, real))
    return F.binary_cross_entropy(p.clamp(0, 1), wanted, reduction="sum") / len(real)


if __name__ == "__main__":
    options.run_from_shell(main)
