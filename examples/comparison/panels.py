"""The figures of the page: pictures of runs, two to a row, below their names and scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison.settings import FRENCH, FRENCH_SCORES, french_of
from matplotlib.figure import Figure

# Figures by name: run, picture ("last", or "first" for the samples of the first scores), its name.
Tile = tuple[str, str, str]
FIGURES: dict[str, list[Tile]] = {
    "samples": [
        ("med", "real.png", "real images"),
        ("med", "last", "MED"),
        ("med-40", "last", "MED, 2 x 500"),
        ("otgan", "last", "OT-GAN"),
        ("conv", "last", "MED, convolutions"),
        ("conv-15", "last", "MED, convolutions, edges"),
    ],
    "latent_grids": [
        *((f"geist-{eps}-fashion", "manifold.png", f"Sinkhorn, eps {eps}") for eps in (1, 10, 100)),
        ("gan-geist-fashion", "manifold.png", "GAN"),
        *((f"geist-{eps}-mnist", "manifold.png", f"Sinkhorn, eps {eps}") for eps in (1, 10, 100)),
        ("gan-geist-mnist", "manifold.png", "GAN"),
        *((f"geist-{eps}-digits", "manifold.png", f"Sinkhorn, eps {eps}") for eps in (1, 10, 100)),
        ("gan-geist-digits", "manifold.png", "GAN"),
    ],
    "age": [
        ("age", "scores.png", "FashionMNIST"),
        ("age-digits", "scores.png", "digits"),
    ],
    "critics": [
        ("wgan-clip-10", "last", "WGAN, clipped"),
        ("wgan-gp-10", "last", "WGAN, penalty"),
    ],
    **{
        f"french_{when}": [
            (f"{data}-{net}", when, name)
            for data in ("mnist", "digits")
            for name, net in FRENCH.items()
        ]
        for when in ("first", "last")
    },
    "li_liang": [
        (f"otgan-{data}-{weight}{beta}", picture, f"penalty {weight}{text}")
        for data in ("mnist", "digits")
        for beta, picture, text in (
            ("", "last", ", beta_1 0.5"),
            ("-beta", "last", ", beta_1 0.9"),
            ("", "loss.png", ", curves"),
        )
        for weight in (500, 100)
    ],
    "label": [
        ("otgan-label", "real.png", "real 2s"),
        ("otgan-label", "last", "OT-GAN"),
    ],
    "matching": [
        ("otgan", "last", "optimal transport"),
        ("otgan-random", "last", "random matching"),
    ],
    "follow": [("digits-follow", "loss.png", "digits, rate follows")],
    "sweep": [
        ("sweep-eps", "sweep.png", "FashionMNIST"),
        ("sweep-digits", "sweep.png", "digits"),
        ("sweep-batch", "sweep.png", "FashionMNIST, over the batch"),
    ],
    "learned_cost": [
        (f"{data}-{loss}", "last", loss.replace("-", " "))
        for data in ("cifar10", "digits")
        for loss in ("mmd", "eps-10", "eps-100", "eps-1000")
    ],
    "autoencoder": [
        (f"{method}{length}", picture, f"{name}, {text}")
        for length in ("-15", "")
        for picture, text in (("reconstructions.png", "reconstructions"), ("last", "samples"))
        for method, name in (("sae", "Sinkhorn autoencoder"), ("vae-20", "VAE"))
    ],
    "conditional": [
        ("conditional-15", "classes.png", "a row per class"),
        ("conditional-conv", "classes.png", "convolutions, a row per class"),
        ("conditional-digits", "classes.png", "a row per class"),
    ],
    "flow": [
        ("flow-fashion-ot", "euler.png", "FashionMNIST, pairs from the plan"),
        ("flow-fashion-independent", "euler.png", "FashionMNIST, independent pairs"),
        ("flow-ot", "euler.png", "digits, pairs from the plan"),
        ("flow-independent", "euler.png", "digits, independent pairs"),
        ("flow-plane-ot", "euler.png", "plane, pairs from the plan"),
        ("flow-plane-independent", "euler.png", "plane, independent pairs"),
    ],
    "digits": [
        ("digits", "real.png", "real digits"),
        ("digits", "last", "MED"),
        ("conv-digits", "last", "MED, convolutions"),
    ],
    "genevay": [
        *((f"genevay-{part}", "manifold.png", f"genevay-{part}") for part in "abc"),
        ("genevay-b-70", "manifold.png", "genevay-b"),
    ],
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
    "ellipses": [("ellipses", "ellipses.png", "200 draws")],
}
SCORED = ("first", "last", "manifold.png", "classes.png")  # what shows what the scores are of


def kept(run: str, picture: str) -> Path:
    """Where the page keeps a picture of a run."""
    return Path("pictures", f"{run}-{Path(picture).stem}.png")


def collect(folders: Mapping[str, Path], out: Path) -> None:
    """Copies of the pictures that the page shows of the runs that are there."""
    (out / "pictures").mkdir(exist_ok=True)
    for run, picture, _ in (tile for tiles in FIGURES.values() for tile in tiles):
        path = _picture(folders[run], picture) if run in folders else None
        if path:
            shutil.copyfile(path, out / kept(run, picture))


def show(name: str, reports: Mapping[str, Any], out: Path, link: str = "") -> str:
    """Figure ``name`` as a table of pictures under their titles; ``link`` leads to ``out``."""
    tiles = [
        (_title(title, picture, reports[run]), link + kept(run, picture).as_posix())
        for run, picture, title in FIGURES[name]
        if run in reports and (out / kept(run, picture)).is_file()
    ]
    rows = [tiles[i : i + 2] for i in range(0, len(tiles), 2)]
    return "\n\n".join(map(_row, rows)) or "*No picture yet.*"


def _row(tiles: Sequence[tuple[str, str]]) -> str:
    lines = [[title for title, _ in tiles], ["---"] * len(tiles)]
    lines.append([f"![{title}]({path})" for title, path in tiles])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _picture(folder: Path, picture: str) -> Path | None:
    if picture == "last":
        return max(folder.glob("samples_*.png"), default=None)
    if picture == "first":
        first = json.loads((folder / "metrics.json").read_text())["evaluations"][0]
        picture = f"samples_{first['step']:06d}.png"
    return folder / picture if (folder / picture).is_file() else None


def _title(title: str, picture: str, report: Mapping[str, Any]) -> str:
    """The name, and for the result of a run its data, its length and its scores."""
    scores = report["metrics"]
    if picture == "first" and report["evaluations"]:
        scores = report["evaluations"][0]
    if picture not in SCORED or "recall" not in scores:
        return title
    steps = scores.get("step", report["steps"])
    figures = f"IS {scores['is']:.2f}, recall {scores['recall']:.2f}"
    if "as_asked" in scores:
        figures += f", {scores['as_asked']:.0%} as asked"
    return f"{title}: {report['args']['data']}, {steps} steps, {figures}"


def curves(reports: Mapping[str, Any], out: Path, link: str = "") -> str:
    """The scores of the French report's runs against the CPU minutes that they took."""
    runs = {k: reports[name] for k, name in french_of(reports).items() if name in reports}
    if not runs:
        return "*No picture yet.*"
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    for panel, (key, text) in zip(figure.subplots(2, 2).flat, FRENCH_SCORES.items(), strict=True):
        for label, report in runs.items():
            last = {"cpu_seconds": report["cpu_seconds"], **report["metrics"]}
            entries = [*report["evaluations"], last]
            minutes = [entry["cpu_seconds"] / 60 for entry in entries]
            panel.plot(minutes, [entry[key] for entry in entries], ".-", label=label)
        panel.axhline(report["floors"][key], linestyle=":", color="grey", label="real images")
        panel.set(xlabel="CPU minutes", ylabel=text)
        panel.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    path = Path("pictures", "french-curves.png")
    figure.savefig(out / path, dpi=90)
    return f"![Scores against CPU minutes]({link}{path.as_posix()})"
