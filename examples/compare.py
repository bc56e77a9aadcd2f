"""Put the runs beside the papers: one page of tables and figures.

    python examples/compare.py --runs runs --out examples/results           # what there is
    python examples/compare.py --runs runs --out examples/results --train   # train what is missing

Collects ``metrics.json`` and figures of the runs named below from ``--runs`` into ``--out`` and
writes ``README.md`` there. A run that is not in ``--runs`` keeps what ``--out`` has of it, and is
"not run" if that is nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Report = dict[str, Any]

# Every run by name: how `--train` makes it. Its folder is `--runs`/name.
COMMANDS = {
    "classifier_fashion": "train_classifier.py --data fashion",
    "classifier_fashion_5": "train_classifier.py --data fashion --epochs 5",
    "classifier_mnist": "train_classifier.py --data mnist --epochs 5",
    "med": "train_sinkhorn.py --data fashion",
    "med-seed1": "train_sinkhorn.py --data fashion --seed 1",
    "med-seed2": "train_sinkhorn.py --data fashion --seed 2",
    "med-40": "train_sinkhorn.py --data fashion --epochs 40 --batch 1000",
    "geist-1": "train_sinkhorn.py --data fashion --preset geist-1 --epochs 12",
    "geist-10": "train_sinkhorn.py --data fashion --preset geist-10 --epochs 12",
    "geist-100": "train_sinkhorn.py --data fashion --preset geist-100 --epochs 14",
    "gan-geist": "train_gan.py --data fashion --preset geist --epochs 12",
    "otgan": "train_otgan.py --data fashion --preset tiny --eval-every 500",
    "otgan-random": "train_otgan.py --data fashion --preset tiny --match random --steps 1000"
    " --eval-every 500",
    "gan-basic": "train_gan.py --data fashion --preset basic --epochs 1",
    "gan-dcgan": "train_gan.py --data fashion --preset dcgan --epochs 1 --width 0.25",
    "sae": "train_sinkhorn.py --data fashion --preset sae --epochs 5",
    "digits": "train_sinkhorn.py --data digits",
    "genevay-a": "train_sinkhorn.py --data mnist --preset genevay-a --epochs 5",
    "mixture": "toy_mixture.py --lr 1e-3",
    "ellipses": "fit_ellipses.py",
    "ellipses-seed1": "fit_ellipses.py --seed 1",
    "ellipses-seed2": "fit_ellipses.py --seed 2",
}

# Rows of the FashionMNIST table: the runs of one setting, one per seed, and what the report says.
FASHION: dict[str, tuple[tuple[str, ...], str]] = {
    "Sinkhorn, eps 1 (Geist & Gérard)": (("geist-1",), "49 / 6.8"),
    "Sinkhorn, eps 10": (("geist-10",), "63 / 7.7"),
    "Sinkhorn, eps 100": (("geist-100",), "75 / 7.5"),
    "GAN (Geist & Gérard)": (("gan-geist",), "82 / 8.3"),
    "**MED, ours**": (("med", "med-seed1", "med-seed2"), "-"),
    "**MED, ours, 40 epochs, 2 x 500**": (("med-40",), "-"),
    "**OT-GAN at 1/8 width**": (("otgan",), "-"),
    "random matching, 1/8 width, half as long": (("otgan-random",), "-"),
    "Sinkhorn autoencoder, 5 epochs": (("sae",), "-"),
}
COLUMNS = {
    "geist_ot": "OT, their protocol",
    "geist_is": "IS of 200, their protocol",
    "ot": "OT",
    "ot_gap": "\\|OT - floor\\|",
    "is": "IS",
    "fid": "FID",
    "precision": "precision",
    "recall": "recall",
    "med2": "MED²",
}
DIGITS = {"fid": 1, "precision": 2, "recall": 2, "is": 2, "geist_is": 2}

# (run, figure, least, most): what each run is expected to reach.
INF = float("inf")
BARS: list[tuple[str, str, float, float]] = [
    ("classifier_fashion_5", "accuracy", 0.915, 1),
    ("classifier_mnist", "accuracy", 0.988, 1),
    ("geist-1", "geist_ot", 44, 54),
    ("geist-10", "geist_ot", 58, 68),
    ("geist-100", "geist_ot", 70, 80),
    ("geist-1", "geist_is", 6.2, 7.4),
    ("geist-10", "geist_is", 7.1, 8.3),
    ("geist-100", "geist_is", 6.9, 8.1),
    ("gan-geist", "is", 7.2, INF),
    ("gan-geist", "geist_ot", 80, 90),
    *[
        (run, *bar)
        for run in ("med", "med-seed1", "med-seed2")
        for bar in (
            ("is", 7.8, INF),
            ("fid", 0, 330),
            ("recall", 0.15, 1),
            ("ot_gap", 0, 3),
            ("med2", -INF, 9),
        )
    ],
    ("med-40", "is", 8.1, INF),
    ("med-40", "fid", 0, 270),
    ("digits", "is", 8, INF),
    ("digits", "med2", -INF, 1.5),
    ("otgan", "is", 7.6, INF),
    ("otgan", "recall", 0.35, 1),
    ("mixture", "modes", 8, 8),
    ("mixture", "near", 0.9, 1),
    ("ellipses", "best", 109, INF),
    ("ellipses-seed1", "best", 109, INF),
    ("ellipses-seed2", "best", 109, INF),
]

# Rows of the ellipses table: fit, and what the paper has for it.
ELLIPSES = {
    "mmd": "117 - 24 = 93",
    "eps 1": "147 - 74 = 73",
    "eps 0.1": "122 - 13 = 109",
    "eps 0.03": "95 - 15 = 80 (its smallest)",
    "med 1": "-",
    "med 0.1": "-",
    "med 0.03": "-",
}
# Minutes of the report on OT-GAN, and the run of ours to put beside them.
TIMES = {
    "BasicGAN": ("5 (30 epochs)", "gan-basic"),
    "DCGAN": ("27 (30 epochs)", "gan-dcgan"),
    "OT-GAN": ("110 (10 epochs)", "otgan"),
}
# Figures: name in `--out`, and the (run, picture) tiles that it is made of.
FIGURES: dict[str, list[tuple[str, str]]] = {
    "latent_grids": [
        (run, "manifold.png") for run in ("geist-1", "geist-10", "geist-100", "gan-geist")
    ],
    "epoch_1": [
        ("gan-basic", "samples_000600.png"),
        ("gan-dcgan", "samples_000600.png"),
        ("otgan", "samples_000300.png"),
    ],
    "samples": [
        ("med", "real.png"),
        ("med", "samples_001800.png"),
        ("med-40", "samples_002400.png"),
        ("otgan", "samples_002000.png"),
    ],
    "matching": [("otgan", "samples_001000.png"), ("otgan-random", "samples_001000.png")],
    "autoencoder": [("sae", "reconstructions.png"), ("sae", "samples_000600.png")],
    "digits": [("digits", "real.png"), ("digits", "samples_001500.png")],
    "genevay": [("genevay-a", "manifold.png")],
    "mixture": [("mixture", "mixture.png")],
    "ellipses": [("ellipses", "ellipses.png")],
}
CAPTIONS = {
    "latent_grids": "Latent grids: Sinkhorn with eps 1, 10 and 100, and the GAN",
    "epoch_1": "After one epoch: BasicGAN, DCGAN at 1/4 width, OT-GAN at 1/8 width",
    "samples": "Real images; MED; MED with 40 epochs of 2 x 500; OT-GAN at 1/8 width",
    "matching": "After 1000 steps: optimal transport, random matching",
    "autoencoder": "Test images beside their reconstructions, and samples of the autoencoder",
    "digits": "Real digits, and generated ones",
    "genevay": "The manifold of genevay-a on MNIST after 5 epochs",
    "mixture": "The mixture along the run; circles of three deviations around the modes",
    "ellipses": "Flowers by species, and the ellipsoids fitted to them",
}
TILE = 310  # pixels of the shorter side of a tile


def collect(runs: Path, out: Path) -> dict[str, Report]:
    """The reports of all runs, copied into ``out`` first where ``runs`` has them."""
    (out / "metrics").mkdir(parents=True, exist_ok=True)
    reports = {}
    for name in COMMANDS:
        kept = out / "metrics" / f"{name}.json"
        if (found := runs / name / "metrics.json").is_file():
            kept.write_text(found.read_text())
        if kept.is_file():
            reports[name] = _with_sums(json.loads(kept.read_text()))
    for name, tiles in FIGURES.items():
        paths = [runs / run / picture for run, picture in tiles]
        if all(path.is_file() for path in paths):
            _side_by_side(paths).save(out / f"{name}.png", optimize=True)
    return reports


def _with_sums(report: Report) -> Report:
    """Ellipses: the difference per fit, and the best of those, among the metrics."""
    fits = {k: v for k, v in report["metrics"].items() if isinstance(v, dict)}
    if fits:
        gains = {name: fit["diagonal"] - fit["off_diagonal"] for name, fit in fits.items()}
        above = {name: gain for name, gain in gains.items() if name != "mmd"}
        report["metrics"] = {**fits, "gains": gains, "best": max(above.values())}
    return report


def _side_by_side(paths: Sequence[Path]) -> Image.Image:
    """The pictures in a row, on white; several are brought to one height."""
    images = [Image.open(path).convert("RGB") for path in paths]
    if len(images) > 1:
        images = [image.resize((image.width * TILE // image.height, TILE)) for image in images]
    gap = 8
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    row = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row.quantize(128) if len(images) > 1 else row


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(reports: Sequence[Report], key: str, part: str = "metrics") -> str:
    """One figure: the value, or mean ± deviation of several seeds; - where it does not apply."""
    values = [report[part][key] for report in reports if key in report[part]]
    if not values:
        return "-"
    digits = DIGITS.get(key, 1)
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def fashion(reports: Mapping[str, Report]) -> str:
    """The report's table beside ours."""
    rows = []
    for label, (names, published) in FASHION.items():
        present = [reports[name] for name in names if name in reports]
        if not present:
            rows.append([label, published, "not run", *[""] * len(COLUMNS)])
            continue
        seconds = statistics.fmean(report["seconds"] for report in present)
        cells = [cell(present, key) for key in COLUMNS]
        rows.append([label, published, *cells, f"{len(present)}", f"{seconds:.0f}"])
    if floors := next((r for n, r in reports.items() if n == "med"), None):
        floor = [cell([floors], key, "floors") for key in COLUMNS]
        rows.insert(0, ["real against real", "-", *floor, "", ""])
    return table(["", "report: OT / IS", *COLUMNS.values(), "seeds", "seconds"], rows)


def bars(reports: Mapping[str, Report]) -> str:
    """Every bar, what was reached, and whether that is within it."""
    rows = []
    for run, key, least, most in BARS:
        wanted = f"≥ {least:g}" if most in (INF, 1) else f"{least:g} to {most:g}"
        wanted = f"≤ {most:g}" if least in (-INF, 0) else wanted
        if run not in reports:
            rows.append([run, key, wanted, "not run", ""])
            continue
        value = reports[run]["metrics"][key]
        # Beyond the better side of a two-sided bar is still beyond what the source reports.
        verdict = "yes" if least <= value <= most else "**no**"
        rows.append(
            [run, key, wanted, f"{value:.3g}" if key == "accuracy" else f"{value:.2f}", verdict]
        )
    return table(["run", "figure", "bar", "reached", "within"], rows)


def ellipses(reports: Mapping[str, Report]) -> str:
    """Right minus wrong for each fit and seed."""
    present = [r for name, r in reports.items() if name.startswith("ellipses")]
    if not present:
        return "not run"
    rows = []
    for fit, published in ELLIPSES.items():
        fits = [report["metrics"][fit] for report in present]
        ours = [
            f"{f['diagonal']} - {f['off_diagonal']} = {f['diagonal'] - f['off_diagonal']}"
            for f in fits
        ]
        rows.append([fit, published, *ours])
    start = present[0]["floors"]["k-means, A = I"]
    right, wrong = start["diagonal"], start["off_diagonal"]
    rows.append(["before the fit: k-means, A = I", "-", f"{right} - {wrong} = {right - wrong}"])
    seeds = [f"seed {report['args']['seed']}" for report in present]
    rows[-1] += [""] * (len(seeds) - 1)
    return table(["loss", "paper", *seeds], rows)


def mixture(reports: Mapping[str, Report]) -> str:
    """Modes and share along the run."""
    if "mixture" not in reports:
        return "not run"
    report = reports["mixture"]
    freeze = report["args"]["freeze"]
    rows = [
        [
            f"{e['step']}" + (" (frozen)" if e["step"] >= freeze else ""),
            f"{e['modes']}",
            f"{e['near']:.1%}",
            f"{e['least']:.1%}",
        ]
        for e in report["evaluations"]
    ]
    floor = report["floors"]
    rows.append(["real", f"{floor['modes']}", f"{floor['near']:.1%}", f"{floor['least']:.1%}"])
    return table(["step", "modes of 8", "within 3 deviations", "share of the least mode"], rows)


def matching(reports: Mapping[str, Report]) -> str:
    """OT against random matching along the runs, by the metrics that need no classifier."""
    rows = []
    for name in ("otgan", "otgan-random"):
        if name not in reports:
            rows.append([name, "not run", "", ""])
            continue
        report = reports[name]
        seen = [*report["evaluations"], {"step": report["steps"], **report["metrics"]}]
        rows += [
            [name, f"{e['step']}", *[cell([{"metrics": e}], key) for key in ("ot", "med2")]]
            for e in seen
        ]
    return table(["run", "step", "OT", "MED²"], rows)


def times(reports: Mapping[str, Report]) -> str:
    """Minutes of the report, and of our runs with what they did in them."""
    rows = []
    for label, (published, name) in TIMES.items():
        if name not in reports:
            rows.append([label, published, "not run", "", ""])
            continue
        report = reports[name]
        args = report["args"]
        epochs = report["steps"] * args["batch"] / 60_000
        minutes = report["seconds"] / 60
        rows.append(
            [
                label,
                published,
                f"{minutes:.1f} ({epochs:.1f} epochs)",
                f"{args['width']:g}",
                f"{minutes / epochs:.1f}",
            ]
        )
    return table(["", "report, minutes", "ours, minutes", "width", "minutes per epoch"], rows)


def commands(reports: Mapping[str, Report]) -> str:
    """The command of every run."""
    lines = [
        reports[name]["args"]["command"] if name in reports else f"# not run: {name}: {text}"
        for name, text in COMMANDS.items()
    ]
    return "```sh\n" + "\n".join(lines) + "\n```"


def figure(out: Path, name: str, caption: str) -> str:
    """A picture with its caption, or that it is not there."""
    if not (out / f"{name}.png").is_file():
        return f"*{caption}*: not run."
    return f"![{caption}]({name}.png)\n\n*{caption}*"


def page(reports: Mapping[str, Report], out: Path) -> str:
    """The whole page."""
    text = Path(__file__).with_suffix(".md").read_text()
    parts: dict[str, Callable[[Mapping[str, Report]], str]] = {
        "fashion": fashion,
        "bars": bars,
        "ellipses": ellipses,
        "mixture": mixture,
        "matching": matching,
        "times": times,
        "commands": commands,
    }
    for name, part in parts.items():
        text = text.replace(f"<!-- table: {name} -->", part(reports))
    for name, caption in CAPTIONS.items():
        text = text.replace(f"<!-- figure: {name} -->", figure(out, name, caption))
    return f"<!-- Written by examples/compare.py from examples/compare.md. -->\n\n{text}"


def train_missing(runs: Path) -> None:
    """Every run whose ``metrics.json`` is not there, one after the other."""
    for name, text in COMMANDS.items():
        if (runs / name / "metrics.json").is_file():
            continue
        script, *options = shlex.split(text)
        module = importlib.import_module(script.removesuffix(".py"))
        unfinished = ["--resume"] if (runs / name / "ckpt.pt").is_file() else []
        module.main([*options, "--out", str(runs / name), *unfinished])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="examples/compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="folder of the page")
    parser.add_argument("--train", action="store_true", help="train what is missing: hours")
    args = parser.parse_args(argv)
    if args.train:
        train_missing(args.runs)
    reports = collect(args.runs, args.out)
    (args.out / "README.md").write_text(page(reports, args.out))
    print(f"{len(reports)} of {len(COMMANDS)} runs, written to {args.out / 'README.md'}")


if __name__ == "__main__":
    main()
