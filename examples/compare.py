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
BASES = {
    "classifier_fashion": "train_classifier.py --data fashion",
    "classifier_fashion_5": "train_classifier.py --data fashion --epochs 5",
    "classifier_mnist": "train_classifier.py --data mnist --epochs 5",
    "classifier_cifar10": "train_classifier.py --data cifar10 --epochs 5",
    "med": "train_sinkhorn.py --data fashion",
    "med-40": "train_sinkhorn.py --data fashion --epochs 40 --batch 1000 --eps 0.3",
    "geist-1": "train_sinkhorn.py --data fashion --preset geist-1 --epochs 12",
    "geist-10": "train_sinkhorn.py --data fashion --preset geist-10 --epochs 12",
    "geist-100": "train_sinkhorn.py --data fashion --preset geist-100 --epochs 14",
    "gan-geist": "train_gan.py --data fashion --preset geist --epochs 12",
    "otgan": "train_otgan.py --data fashion --preset tiny --eval-every 500",
    "otgan-random": "train_otgan.py --data fashion --preset tiny --match random --eval-every 500",
    "otgan-label": "train_otgan.py --data mnist --preset tiny --labels 2 --steps 300",
    "otgan-cifar10": "train_otgan.py --preset cifar10 --width 0.125 --batch 200 --steps 600"
    " --eval-every 450",
    "otgan-cifar10-random": "train_otgan.py --preset cifar10 --width 0.125 --batch 200 --steps 250"
    " --match random",
    "gan-basic": "train_gan.py --data fashion --preset basic --epochs 1",
    "gan-dcgan": "train_gan.py --data fashion --preset dcgan --epochs 1 --width 0.25",
    "wgan-clip": "train_gan.py --data fashion --preset wgan-clip --epochs 1",
    "wgan-gp": "train_gan.py --data fashion --preset wgan-gp --epochs 3",
    "sae": "train_autoencoder.py --data fashion --preset sae --epochs 5",
    "digits": "train_sinkhorn.py --data digits",
    "genevay-a": "train_sinkhorn.py --data mnist --preset genevay-a",
    "genevay-b": "train_sinkhorn.py --data mnist --preset genevay-b",
    "genevay-c": "train_sinkhorn.py --data mnist --preset genevay-c",
    "mixture": "toy_mixture.py",
    "ellipses": "fit_ellipses.py",
    "ellipses-1000": "fit_ellipses.py --samples 1000 --losses mmd 'eps 1' 'eps 0.1' 'eps 0.03'",
}
# Runs that are repeated: how often, each time with another seed.
SEEDS = {
    **dict.fromkeys(("med", "geist-1", "geist-10", "geist-100", "gan-geist", "otgan"), 3),
    **dict.fromkeys(("ellipses", "ellipses-1000"), 3),
}


def names_of(base: str) -> list[str]:
    """The runs of one setting, one per seed."""
    return [base, *(f"{base}-seed{seed}" for seed in range(1, SEEDS.get(base, 1)))]


def command_of(name: str) -> str:
    """Script and options of a run."""
    base, _, seed = name.partition("-seed")
    return BASES[base] + (f" --seed {seed}" if seed else "")


COMMANDS = {name: command_of(name) for base in BASES for name in names_of(base)}

# Rows of the FashionMNIST table: the setting, and what the report says.
FASHION = {
    "Sinkhorn, eps 1 (Geist & Gérard)": ("geist-1", "49 / 6.8"),
    "Sinkhorn, eps 10": ("geist-10", "63 / 7.7"),
    "Sinkhorn, eps 100": ("geist-100", "75 / 7.5"),
    "GAN (Geist & Gérard)": ("gan-geist", "82 / 8.3"),
    "**MED, ours, 15 epochs, 2 x 125**": ("med", "-"),
    "**MED, ours, 40 epochs, 2 x 500**": ("med-40", "-"),
    "**OT-GAN at 1/8 width**": ("otgan", "-"),
    "random matching, 1/8 width": ("otgan-random", "-"),
    "Wasserstein GAN, clipped, 1 epoch": ("wgan-clip", "-"),
    "Wasserstein GAN, gradient penalty, 3 epochs": ("wgan-gp", "-"),
    "Sinkhorn autoencoder, 5 epochs": ("sae", "-"),
}
# Rows of the tables of the other images.
MNIST = {
    "(1, 200, 10)": "genevay-a",
    "(.1, 200, 100)": "genevay-b",
    "(.1, 10, 300)": "genevay-c",
}
LABEL = {"OT-GAN at 1/8 width, 300 steps": "otgan-label"}
CIFAR10 = {
    "OT-GAN, 600 steps": "otgan-cifar10",
    "random matching, 250 steps": "otgan-cifar10-random",
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

# (setting, figure, least, most): what each run of it is expected to reach.
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
    ("med", "is", 7.8, INF),
    ("med", "fid", 0, 330),
    ("med", "recall", 0.15, 1),
    ("med", "ot_gap", 0, 3),
    ("med", "med2", -INF, 9),
    ("med-40", "is", 8.1, INF),
    ("med-40", "fid", 0, 270),
    ("digits", "is", 8, INF),
    ("digits", "med2", -INF, 1.5),
    ("otgan", "is", 7.6, INF),
    ("otgan", "recall", 0.35, 1),
    ("mixture", "modes", 8, 8),
    ("mixture", "near", 0.9, 1),
    ("ellipses", "best", 109, INF),
    ("ellipses-1000", "best", 109, INF),
    ("ellipses-1000", "above_mmd", 1, INF),
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
        ("med", "samples_003600.png"),
        ("med-40", "samples_002400.png"),
        ("otgan", "samples_002000.png"),
    ],
    "matching": [("otgan", "samples_002000.png"), ("otgan-random", "samples_002000.png")],
    "autoencoder": [("sae", "reconstructions.png"), ("sae", "samples_000600.png")],
    "digits": [("digits", "real.png"), ("digits", "samples_001500.png")],
    "genevay": [(f"genevay-{part}", "manifold.png") for part in "abc"],
    "critics": [
        ("wgan-clip", "samples_000600.png"),
        ("wgan-gp", "samples_001800.png"),
    ],
    "label": [("otgan-label", "real.png"), ("otgan-label", "samples_000300.png")],
    "cifar10": [
        ("otgan-cifar10", "real.png"),
        ("otgan-cifar10", "samples_000600.png"),
        ("otgan-cifar10", "samples_000250.png"),
        ("otgan-cifar10-random", "samples_000250.png"),
    ],
    "mixture": [("mixture", "mixture.png")],
    "ellipses": [("ellipses", "ellipses.png")],
}
CAPTIONS = {
    "latent_grids": "Latent grids: Sinkhorn with eps 1, 10 and 100, and the GAN",
    "epoch_1": "After one epoch: BasicGAN, DCGAN at 1/4 width, OT-GAN at 1/8 width",
    "samples": "Real images; MED; MED with 40 epochs of 2 x 500; OT-GAN at 1/8 width",
    "matching": "After 2000 steps: optimal transport, random matching",
    "autoencoder": "Test images beside their reconstructions, and samples of the autoencoder",
    "digits": "Real digits, and generated ones",
    "genevay": "Manifolds of genevay-a, -b and -c on MNIST",
    "critics": "Wasserstein GAN with clipped weights, with a gradient penalty; learned cost",
    "label": "Real images of a 2, and those of OT-GAN",
    "cifar10": "Real images; OT-GAN after 600 and after 250 steps; random matching after 250",
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
    """Ellipses: the best difference of the fits, and by how much it is above that of the MMD."""
    fits = {k: v for k, v in report["metrics"].items() if isinstance(v, dict)}
    if fits:
        gains = {name: fit["diagonal"] - fit["off_diagonal"] for name, fit in fits.items()}
        mmd = gains.pop("mmd")
        best = max(gains.values())
        report["metrics"] = {**fits, "best": best, "above_mmd": best - mmd}
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


def present(reports: Mapping[str, Report], base: str) -> list[Report]:
    """The reports of one setting, one per seed."""
    return [reports[name] for name in names_of(base) if name in reports]


def spread(values: Sequence[float], digits: int) -> str:
    """The value, or mean ± deviation of several seeds; - where there is none."""
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def cell(reports: Sequence[Report], key: str, part: str = "metrics") -> str:
    """One figure of the runs that have it."""
    return spread([report[part][key] for report in reports if key in report[part]], digits_of(key))


def digits_of(key: str) -> int:
    """Decimals of a figure."""
    return DIGITS.get(key, 1)


def cpu_seconds(reports: Sequence[Report]) -> str:
    """What a run took of one core. Where that was not recorded the wall time bounds it."""
    if measured := [report["cpu_seconds"] for report in reports if "cpu_seconds" in report]:
        return f"{statistics.fmean(measured):.0f}"
    return f"≤ {statistics.fmean(report['seconds'] for report in reports):.0f}"


def scores(
    reports: Mapping[str, Report], rows: Mapping[str, str], columns: Sequence[str]
) -> list[list[str]]:
    """Rows of figures by label, the floors of the first run that is there above them."""
    table_rows = []
    for label, base in rows.items():
        if found := present(reports, base):
            cells = [cell(found, key) for key in columns]
            table_rows.append([label, *cells, f"{len(found)}", cpu_seconds(found)])
        else:
            table_rows.append([label, "not run", *[""] * (len(columns) + 1)])
    if real := [report for base in rows.values() for report in present(reports, base)]:
        floors = [cell(real[:1], key, "floors") for key in columns]
        table_rows.insert(0, ["real against real", *floors, "", ""])
    return table_rows


def fashion(reports: Mapping[str, Report]) -> str:
    """The report's table beside ours."""
    published = {label: figures for label, (_, figures) in FASHION.items()}
    rows = scores(reports, {label: base for label, (base, _) in FASHION.items()}, list(COLUMNS))
    rows = [[label, published.get(label, "-"), *rest] for label, *rest in rows]
    return table(["", "report: OT / IS", *COLUMNS.values(), "seeds", "CPU seconds"], rows)


def plain_scores(rows: Mapping[str, str]) -> Callable[[Mapping[str, Report]], str]:
    """The same without the columns that only Geist & Gérard's protocol fills."""
    columns = {key: name for key, name in COLUMNS.items() if not key.startswith("geist")}

    def part(reports: Mapping[str, Report]) -> str:
        header = ["", *columns.values(), "seeds", "CPU seconds"]
        return table(header, scores(reports, rows, list(columns)))

    return part


def bars(reports: Mapping[str, Report]) -> str:
    """Every bar, what was reached, and whether that is within it."""
    rows = []
    for base, key, least, most in BARS:
        wanted = f"≥ {least:g}" if most in (INF, 1) else f"{least:g} to {most:g}"
        wanted = f"≤ {most:g}" if least in (-INF, 0) else wanted
        values = [report["metrics"][key] for report in present(reports, base)]
        reached = spread(values, 3 if key == "accuracy" else 2) if values else "not run"
        # Beyond the better side of a two-sided bar is still beyond what the source reports.
        within = sum(least <= value <= most for value in values)
        verdict = "yes" if values and least <= statistics.fmean(values) <= most else "**no**"
        if within < len(values) and len(values) > 1:
            verdict += f", {within} of {len(values)} seeds"
        rows.append([base, key, wanted, reached, f"{len(values)}", verdict if values else ""])
    return table(["run", "figure", "bar", "reached", "seeds", "within"], rows)


def ellipses(reports: Mapping[str, Report]) -> str:
    """Right minus wrong for each fit, for both numbers of draws."""
    runs = [present(reports, base) for base in ("ellipses", "ellipses-1000")]
    rows = []
    for fit, published in ELLIPSES.items():
        found = [[r["metrics"][fit] for r in seeds if fit in r["metrics"]] for seeds in runs]
        rows.append([fit, published, *map(_right_and_wrong, found)])
    start = [report["floors"]["k-means, A = I"] for report in runs[0]]
    rows.append(["before the fit: k-means, A = I", "-", _right_and_wrong(start), ""])
    return table(["loss", "paper", "200 draws", "1000 draws"], rows)


def _right_and_wrong(fits: Sequence[Mapping[str, Any]]) -> str:
    """``right - wrong = difference`` over the seeds."""
    if not fits:
        return "-"
    right, wrong = (statistics.fmean(fit[key] for fit in fits) for key in ("diagonal", OFF))
    gains = [fit["diagonal"] - fit[OFF] for fit in fits]
    return f"{right:.0f} - {wrong:.0f} = {spread(gains, 0)}"


OFF = "off_diagonal"


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
        ("" if name in reports else "# not run: ") + f"python examples/{text} --out runs/{name}"
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
        "mnist": plain_scores(MNIST),
        "label": plain_scores(LABEL),
        "cifar10": plain_scores(CIFAR10),
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
