"""Which eps is best? One generator by ``train_sinkhorn.py``, over eps, costs and seeds.

    python examples/sweep_eps.py --data fashion --epochs 4 --out runs/sweep_eps
    python examples/sweep_eps.py --over batch --values 100 200 500 1000 2000 --out runs/sweep_batch

Every training is a run in a folder of its own below ``--out``. What is finished is kept, and what
was begun is continued, so the command itself resumes the sweep. At the end ``sweep.png`` shows the
Fréchet distance, recall and MED² over the values, mean and range of the seeds, beside the energy
distance (``mmd``), the limit of large eps.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train_sinkhorn
from common import options
from matplotlib.figure import Figure

VALUES = [0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0]
METRICS = {"fid": "Fréchet distance", "recall": "recall", "med2": "MED²"}
Runs = dict[str, list[dict[str, Any]]]  # reports of the seeds


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of the sweep, and as ``rest`` those that go on to ``train_sinkhorn.py``."""
    parser = argparse.ArgumentParser(
        prog="examples/sweep_eps.py",
        allow_abbrev=False,  # --seed is not short for --seeds
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are those of train_sinkhorn.py: --data, --epochs, --width, ...",
    )
    add = parser.add_argument
    add("--over", choices=("eps", "batch"), default="eps", help="what varies (default: eps)")
    add("--values", type=float, nargs="+", default=VALUES, help=f"its values (default: {VALUES})")
    add("--costs", nargs="+", default=["euclidean"], choices=("euclidean", "sqeuclidean"))
    add("--seeds", type=int, default=3, help="runs of each setting (default: 3)")
    add("--out", type=Path, default=Path("runs/sweep_eps"))
    args, args.rest = parser.parse_known_args(argv)
    options.at_least(args, 1, "seeds")
    varied = {"seed", "cost", args.over} & options.given(train_sinkhorn.parser(), args.rest)
    if args.over == "batch" and "values" not in options.given(parser, argv):
        raise options.UsageError("--over batch needs --values, expected batch sizes")
    if varied:
        raise options.UsageError(f"--{varied.pop()} is given, expected none: the sweep sets it")
    train_sinkhorn.parse(args.rest)  # a mistake shows before the first run, not in it
    args.command = options.command_of(parser, argv)
    return args


def trained(args: argparse.Namespace, setting: str, seed: int) -> dict[str, Any]:
    """The report of the run with these options, which is made if it is not there."""
    name = setting.replace("--", "").replace(" ", "-")
    folder = args.out / f"{name}-seed-{seed}"
    if not (folder / "metrics.json").is_file():
        started = ["--resume"] if (folder / "ckpt.pt").is_file() else []
        words = [*args.rest, *setting.split(), "--seed", str(seed), "--out", str(folder), *started]
        train_sinkhorn.main(words)
    if not (folder / "metrics.json").is_file():
        raise SystemExit("stopped; the same command continues")
    report: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    here = f" --seed {seed} --out {folder}"
    if shlex.split(report["args"]["command"])[2:] != [*args.rest, *f"{setting}{here}".split()]:
        raise options.UsageError(
            f"--out is {args.out}, expected another: {folder} is of {report['args']['command']}"
        )
    return report


def picture(
    curves: dict[str, tuple[Sequence[float], list[list[dict[str, Any]]]]],
    limit: list[dict[str, Any]],
    args: argparse.Namespace,
) -> None:
    """A panel per metric: mean and range over the seeds for each cost, floor and limit as lines."""
    figure = Figure(figsize=(5, 2.6 * len(METRICS)), layout="constrained")
    panels = figure.subplots(len(METRICS), 1, sharex=True)
    for panel, (key, label) in zip(panels, METRICS.items(), strict=True):
        for cost, (values, reports) in curves.items():
            seeds = [[report["metrics"][key] for report in of_value] for of_value in reports]
            (line,) = panel.plot(values, [statistics.fmean(of) for of in seeds], "o-", label=cost)
            low, high = [min(of) for of in seeds], [max(of) for of in seeds]
            panel.fill_between(values, low, high, alpha=0.25, color=line.get_color())
        if limit:
            level = statistics.fmean(report["metrics"][key] for report in limit)
            panel.axhline(level, linestyle="--", color="black", label="mmd (energy distance)")
        floor = next(iter(curves.values()))[1][0][0]["floors"][key]
        panel.axhline(floor, linestyle=":", color="grey", label="real images")
        panel.set(ylabel=label, xscale="log")
        panel.grid(alpha=0.3)
    named = panels[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside upper center", ncols=2, fontsize=8)
    panels[-1].set_xlabel(args.over + (", in units of the cost" if args.over == "eps" else ""))
    figure.savefig(args.out / "sweep.png", dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seeds)
    written = [f"{value:g}" for value in sorted(args.values)]
    curves = {}
    for cost in args.costs:
        settings = [f"--cost {cost} --{args.over} {value}" for value in written]
        reports = [[trained(args, setting, seed) for seed in seeds] for setting in settings]
        curves[cost] = ([float(value) for value in written], reports)
    limit = [trained(args, "--loss mmd", seed) for seed in seeds] if args.over == "eps" else []
    picture(curves, limit, args)
    rows = {
        f"{cost}, {args.over} {value:g}": of_value
        for cost, (values, reports) in curves.items()
        for value, of_value in zip(values, reports, strict=True)
    } | ({"mmd": limit} if limit else {})
    summary = {
        name: {key: statistics.fmean(r["metrics"][key] for r in reports) for key in METRICS}
        for name, reports in rows.items()
    }
    report = {"args": options.plain(args), "metrics": summary, "floors": reports[0][0]["floors"]}
    (args.out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    for key, label in METRICS.items():
        choose = max if key == "recall" else min
        best = choose(summary, key=lambda name: summary[name][key])
        print(f"best {label}: {best}, {summary[best][key]:.4g}")
    print(f"written to {args.out}/sweep.png")


if __name__ == "__main__":
    options.run_from_shell(main)
