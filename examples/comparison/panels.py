"""The figures of the page: pictures of runs with their names and scores, two to a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

# Figures: name in `--out`, and the tiles it is made of: run, picture ("last" and "first" sample
# grid), and what to call it.
Tile = tuple[str, str, str]
FIGURES: dict[str, list[Tile]] = {
    "samples": [
        ("med", "real.png", "real images"),
        ("med", "last", "MED"),
        ("med-40", "last", "MED, 40 epochs"),
        ("otgan", "last", "OT-GAN"),
    ],
    "latent_grids": [
        ("geist-1", "manifold.png", "Sinkhorn, eps 1"),
        ("geist-10", "manifold.png", "Sinkhorn, eps 10"),
        ("geist-100", "manifold.png", "Sinkhorn, eps 100"),
        ("gan-geist", "manifold.png", "GAN"),
    ],
    "critics": [("wgan-clip", "last", "WGAN, clipped"), ("wgan-gp", "last", "WGAN, penalty")],
    "french_first": [
        ("mnist-basic", "first", "BasicGAN, one epoch"),
        ("mnist-otgan", "first", "OT-GAN, one epoch"),
        ("mnist-dcgan", "first", "DCGAN, one epoch"),
    ],
    "french_last": [
        ("mnist-basic", "last", "BasicGAN"),
        ("mnist-otgan", "last", "OT-GAN"),
        ("mnist-dcgan", "last", "DCGAN"),
    ],
    "matching": [
        ("otgan", "last", "optimal transport"),
        ("otgan-random", "last", "random matching"),
    ],
    "autoencoder": [
        ("sae", "reconstructions.png", "Sinkhorn autoencoder, reconstructions"),
        ("vae-20", "reconstructions.png", "VAE, reconstructions"),
        ("sae", "last", "Sinkhorn autoencoder, samples"),
        ("vae-20", "last", "VAE, samples"),
    ],
    "conditional": [
        ("conditional", "classes.png", "a row per class"),
        ("conv", "last", "convolutions"),
    ],
    "flow": [("flow-ot", "euler.png", "plan"), ("flow-independent", "euler.png", "independent")],
    "digits": [("digits", "real.png", "real digits"), ("digits", "last", "MED")],
    "genevay": [(f"genevay-{part}", "manifold.png", f"genevay-{part}") for part in "abc"],
    "label": [("otgan-label", "real.png", "real 2s"), ("otgan-label", "last", "OT-GAN")],
    "cifar10": [
        ("otgan-cifar10", "real.png", "real images"),
        ("otgan-cifar10", "last", "OT-GAN"),
        ("otgan-cifar10-random", "last", "random matching"),
    ],
    "modes": [
        ("mixture", "mixture.png", "OT-GAN"),
        ("mixture-gan", "mixture.png", "GAN"),
        ("mixture-wgan-clip", "mixture.png", "WGAN, clipped"),
        ("mixture-wgan-gp", "mixture.png", "WGAN, penalty"),
    ],
    "ellipses": [("ellipses", "ellipses.png", "")],
}
CAPTIONS = {
    "samples": "FashionMNIST",
    "latent_grids": "Maps of the 2-D latent of Geist & Gérard",
    "critics": "Wasserstein GANs",
    "french_first": "MNIST after one epoch, all at one width",
    "french_last": "MNIST at the end, all at one width",
    "matching": "After 2000 steps",
    "autoencoder": "Test images beside their reconstructions, and samples",
    "conditional": "Images of the class asked for, one to a row; a generator of convolutions",
    "flow": "One noise per column after 1, 2, 4, 8 and 100 Euler steps",
    "digits": "Real digits, and generated ones",
    "genevay": "Manifolds of genevay-a, -b and -c on MNIST",
    "label": "Images of a 2",
    "cifar10": "CIFAR-10",
    "modes": "The mixture along the runs; circles of three deviations around the modes",
    "ellipses": "Flowers by species, and the ellipsoids fitted to them",
}
WIDTH, GAP, TITLE = 600, 12, 26  # pixels


def draw(name: str, folders: Mapping[str, Path], reports: Mapping[str, Any], out: Path) -> None:
    """Figure ``name`` from the runs that are there; nothing if none is."""
    tiles = []
    for run, picture, title in FIGURES[name]:
        path = _picture(folders[run], picture) if run in folders else None
        if path:
            tiles.append((Image.open(path).convert("RGB"), _title(title, picture, reports[run])))
    if tiles:
        _in_rows(tiles).save(out / f"{name}.png", optimize=True)


def _picture(folder: Path, picture: str) -> Path | None:
    grids = sorted(folder.glob("samples_*.png"))
    if picture in ("first", "last"):
        return grids[0 if picture == "first" else -1] if grids else None
    return folder / picture if (folder / picture).is_file() else None


def _title(title: str, picture: str, report: Mapping[str, Any]) -> str:
    """The name, and for the result of a run its scores."""
    scores = report["metrics"]
    if picture == "first" and report["evaluations"]:
        scores = report["evaluations"][0]
    if picture == "real.png" or "recall" not in scores:
        return title
    return f"{title}: IS {scores['is']:.2f}, recall {scores['recall']:.2f}"


def _in_rows(tiles: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Two tiles of one width to a row, each below its title; one alone as it is."""
    if len(tiles) == 1 and not tiles[0][1]:
        return tiles[0][0]
    scaled = []
    for image, title in tiles:
        # Small pixels are enlarged as they are, and all else is smoothed.
        exact = WIDTH % image.width == 0
        height = round(image.height * WIDTH / image.width)
        resample = Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS
        scaled.append((image.resize((WIDTH, height), resample), title))
    rows = [scaled[i : i + 2] for i in range(0, len(scaled), 2)]
    heights = [TITLE + max(image.height for image, _ in row) + GAP for row in rows]
    columns = min(2, len(tiles))
    page = Image.new("RGB", (columns * WIDTH + (columns - 1) * GAP, sum(heights)), "white")
    pen, top = ImageDraw.Draw(page), 0
    font = ImageFont.load_default(size=17)
    for row, height in zip(rows, heights, strict=True):
        for column, (image, title) in enumerate(row):
            left = column * (WIDTH + GAP)
            pen.text((left + 4, top + 3), title, fill="black", font=font)
            page.paste(image, (left, top + TITLE))
        top += height
    return page
