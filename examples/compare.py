"""Put the runs beside the papers: one page of tables and figures.

    python examples/compare.py --runs runs --out examples/results --docs docs

Reads the ``metrics.json`` of every folder in ``--runs``. Which run it is follows from the options
that the report itself states, and not from the name of its folder; a report with other options, or
of a run with another length, is none of the page's. Reports are copied into ``--out``, where the
page, ``README.md``, is written. A run that is not in ``--runs`` keeps what ``--out`` has of it, and
is "not run" if that is nothing. ``--docs`` asks for a second page, of what the sources claim and
whether it holds. ``reproduce.py`` runs what is missing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from common import options, run
from comparison import panels
from comparison.claims import CLAIMS, claims
from comparison.settings import COMMANDS
from comparison.tables import SIZES, TABLES, Report

HERE = Path(__file__).resolve().parent


@cache
def arguments_of(command: str) -> dict[str, Any]:
    """What the script of ``command`` makes of its options, as a report has it."""
    script, *words = shlex.split(command)
    args = importlib.import_module(script.removesuffix(".py")).parse(words)
    plain: dict[str, Any] = json.loads(json.dumps(options.plain(args)))
    return plain


def name_of(report: Report) -> str | None:
    """The run of the page that a report is of; ``None`` if its options are those of no run."""
    script = options.script_of(report["args"]["command"])
    for name, command in COMMANDS.items():
        if command.split()[0] == f"{script}.py" and _agrees(report, arguments_of(command)):
            return name
    return None


def _agrees(report: Report, wanted: Mapping[str, Any]) -> bool:
    made = report["args"]
    # Of two options for the length, the one that was not given says nothing; folders say nothing.
    compared = (made.keys() & wanted.keys()) - run.FREE_TO_CHANGE - {"steps", "epochs", "runs"}
    if wanted.get("schedule") == "follow":
        compared -= {"limit_train"}  # set by the run, to what it does not hold out
    if any(made[option] != wanted[option] for option in compared):
        return False
    if "steps" not in wanted:
        return True  # a sweep, whose length is among the options of its runs
    length = wanted["steps"]
    if length is None:
        images = report.get("images", SIZES[made["data"]])
        length = round(wanted["epochs"] * (images // made["batch"]))
    return bool(report["steps"] == length)


def collect(runs: Path, out: Path) -> dict[str, Report]:
    """The reports by name, copied into ``out`` with the pictures of what is in ``runs``."""
    kept = out / "metrics"
    kept.mkdir(parents=True, exist_ok=True)
    folders: dict[str, Path] = {}
    for path in sorted(runs.glob("*/metrics.json")):
        report = json.loads(path.read_text())
        if name := name_of(report):
            folders[name] = path.parent
            text = json.dumps(_without_places(name, report), indent=2)
            (kept / f"{name}.json").write_text(text + "\n")
    reports = {}
    for path in sorted(kept.glob("*.json")):
        report = json.loads(path.read_text())
        if name := name_of(report):
            reports[name] = _with_sums(report)
    panels.collect(folders, out)
    return reports


def _without_places(name: str, report: Report) -> Report:
    """The report without the folders of the machine where it was made."""
    folder = f"runs/{name}"
    command = f"python examples/{COMMANDS[name].format(runs='runs')} --out {folder}"
    args = {**report["args"], "command": command, "out": folder}
    args.update(dict.fromkeys(args.keys() & {"data_dir", "classifier"}))
    if "runs" in args:
        args["runs"] = [f"runs/{Path(run).name}" for run in args["runs"]]
    return {**report, "args": args}


def _with_sums(report: Report) -> Report:
    """Ellipses: the best difference of the fits, and by how much it is above that of the MMD."""
    fits = {k: v for k, v in report["metrics"].items() if isinstance(v, dict)}
    if any("diagonal" in fit for fit in fits.values()):
        gains = {name: fit["diagonal"] - fit["off_diagonal"] for name, fit in fits.items()}
        mmd = gains.pop("mmd")
        best = max(gains.values())
        report["metrics"] = {**fits, "best": best, "above_mmd": best - mmd}
    return report


def page(reports: Mapping[str, Report], out: Path, docs: Path | None = None) -> str:
    """The page of results; of what the sources claim, if it is for the folder ``docs``."""
    template = HERE / ("reproductions.md" if docs else "compare.md")
    link = f"{Path(os.path.relpath(out, docs)).as_posix()}/" if docs else ""
    text = template.read_text()
    for source in CLAIMS:
        text = text.replace(f"<!-- claims: {source} -->", claims(source, reports))
    for name, part in TABLES.items():
        text = text.replace(f"<!-- table: {name} -->", part(reports))
    for name in panels.FIGURES:
        text = text.replace(f"<!-- figure: {name} -->", panels.show(name, reports, out, link))
    text = text.replace("<!-- curves -->", panels.curves(reports, out, link))
    text = text.replace("*No picture yet.*\n\n", "")
    return f"<!-- Written by examples/compare.py from examples/{template.name}. -->\n\n{text}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="examples/compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="folder of the page")
    parser.add_argument("--docs", type=Path, help="folder for reproductions.md, the claims")
    args = parser.parse_args(argv)
    reports = collect(args.runs, args.out)
    (args.out / "README.md").write_text(page(reports, args.out))
    if args.docs:
        (args.docs / "reproductions.md").write_text(page(reports, args.out, args.docs))
    print(f"{len(reports)} of {len(COMMANDS)} runs, written to {args.out / 'README.md'}")


if __name__ == "__main__":
    options.run_from_shell(main)
