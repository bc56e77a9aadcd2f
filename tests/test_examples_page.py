"""The page of results: which report is whose, its tables, and its figures."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import compare  # noqa: E402
import reproduce  # noqa: E402
import train_gan  # noqa: E402
from comparison import panels, settings, tables  # noqa: E402
from comparison.claims import CLAIMS, NotRunError, claims  # noqa: E402


def report_of(command: str, steps: int | None = None, **parts: Any) -> dict[str, Any]:
    """What a run with this command would report."""
    args = compare.arguments_of(command)
    steps = steps or args["steps"] or round(args["epochs"] * (60_000 // args["batch"]))
    command = f"python examples/{command}"
    report = {"args": {**args, "steps": steps, "command": command}, "steps": steps, "seconds": 60}
    return {**report, "metrics": {}, "floors": {}, "evaluations": [], **parts}


def write(folder: Path, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(report))


def test_page_of_results(tmp_path):
    """Figures of the runs that are there, "not run" for the others, by their options alone."""
    runs, out = tmp_path / "runs", tmp_path / "results"
    common = {"is": 8.0, "fid": 300.0, "ot_gap": 1.0, "med2": 20.0}
    floors = {"is": 9.5}
    med = settings.COMMANDS["med"]
    for folder, seed, recall, cost in (("a", 0, 0.25, {}), ("b", 1, 0.13, {"cpu_seconds": 50})):
        scores = {"metrics": {**common, "recall": recall}, "floors": floors, **cost}
        write(runs / folder, report_of(f"{med} --seed {seed} --out {runs / folder}", **scores))
    # Called like one of the page's runs, but shorter, or with another eps.
    poor = {"metrics": {**common, "recall": 0.99}, "floors": floors}
    write(runs / "med", report_of(f"{med} --seed 2 --steps 300", **poor))
    write(runs / "med-seed2", report_of(f"{med} --seed 2 --eps 2", **poor))
    (runs / "a" / "samples_003600.png").write_bytes(b"last")
    (runs / "a" / "samples_000240.png").write_bytes(b"first")
    command = ["--runs", str(runs), "--out", str(out)]
    compare.main(command)
    page = (out / "README.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| **MED, ours, 15 epochs"))
    assert "| 0.19 ± 0.08 |" in row
    assert row.endswith("| 2 | 50 |")
    for line in (
        "| med | fid | ≤ 330 | 300.00 ± 0.00 | 2 | yes |",
        "| med | recall | ≥ 0.15 | 0.19 ± 0.08 | 2 | yes, 1 of 2 seeds |",
        "| med | med2 | ≤ 9 | 20.00 ± 0.00 | 2 | **no**, 0 of 2 seeds |",
        "| med-40 | is | ≥ 8.1 | not run | 0 |  |",
        "\npython examples/train_sinkhorn.py --data fashion --seed 1 --out runs/med-seed1",
        "\n# not run: python examples/toy_mixture.py --out runs/mixture",
    ):
        assert line in page
    assert "| 0.99 |" not in page
    assert str(tmp_path) not in (out / "metrics" / "med.json").read_text()
    assert "<!-- table" not in page
    assert "<!-- figure" not in page
    assert (out / "pictures" / "med-last.png").read_bytes() == b"last"
    assert "| MED: fashion, 3600 steps, IS 8.00, recall 0.25 |\n| --- |\n| ![MED: " in page
    # The page can be written again from what it kept.
    compare.main(["--runs", str(tmp_path / "none"), "--out", str(out)])
    assert (out / "README.md").read_text() == page


def test_figures_are_the_pictures_of_the_runs_two_to_a_row(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "scores.png").write_bytes(b"any")
    (folder / "mixture.png").write_bytes(b"any")
    names = [run for name in ("age", "modes") for run, _, _ in panels.FIGURES[name]]
    reports = {run: {"metrics": {}, "evaluations": []} for run in names}
    panels.collect(dict.fromkeys(names, folder), tmp_path)
    lines = panels.show("modes", reports, tmp_path).splitlines()
    assert [line.count("|") - 1 for line in lines if line] == [2] * 6
    assert lines[0] == "| OT-GAN | GAN |"
    assert lines[2].startswith("| ![OT-GAN](pictures/mixture-mixture.png) | ![GAN](pictures/")
    # What is not there is left out: a picture, or the report that its title is of.
    (tmp_path / panels.kept("mixture-gan", "mixture.png")).unlink()
    del reports["mixture-wgan-gp"]
    lines = panels.show("modes", reports, tmp_path).splitlines()
    assert lines[0] == "| OT-GAN | WGAN, clipped |"
    assert len(lines) == 3


def test_curves_are_of_the_runs_that_are_there(tmp_path):
    assert panels.curves({}, tmp_path) == "*No picture yet.*"
    (tmp_path / "pictures").mkdir()
    scores = {"is": 8.0, "fid": 300.0, "recall": 0.5, "med2": 2.0}
    report = {"cpu_seconds": 60, "metrics": scores, "floors": scores}
    report["evaluations"] = [{"step": 600, "cpu_seconds": 30, **scores}]
    text = panels.curves({"digits-basic": report}, tmp_path)
    assert text.endswith("(pictures/french-curves.png)")
    assert (tmp_path / "pictures" / "french-curves.png").stat().st_size > 5000


def test_kept_results_are_of_the_commands():
    """What is committed was made with the options that the page's command has today."""
    kept = sorted((EXAMPLES / "results" / "metrics").glob("*.json"))
    assert kept
    for path in kept:
        assert compare.name_of(json.loads(path.read_text())) == path.stem


def test_committed_pages_are_those_of_the_committed_reports(tmp_path):
    out = tmp_path / "examples" / "results"
    shutil.copytree(EXAMPLES / "results", out)
    (tmp_path / "docs").mkdir()
    words = ["--runs", str(tmp_path / "none"), "--out", str(out), "--docs", str(tmp_path / "docs")]
    compare.main(words)
    for page in ("examples/results/README.md", "docs/reproductions.md"):
        assert (tmp_path / page).read_text() == (EXAMPLES.parent / page).read_text()


@pytest.mark.parametrize(
    ("source", "number"), [(s, i) for s, of in CLAIMS.items() for i in range(len(of))]
)
def test_a_claim_that_was_not_run_says_so(source, number):
    text, theirs, find = CLAIMS[source][number]
    with pytest.raises(NotRunError):
        find({})
    assert f"| {text} | {theirs} | not run |  |" in claims(source, {})


def test_claims_are_judged_by_the_reports():
    def reports(**scores):
        args = {"data": "fashion", "batch": 200}
        common = {"args": args, "steps": 12000, "images": 60_000, "evaluations": []}
        return {
            base: {**common, "metrics": dict.fromkeys(("geist_is", "geist_ot"), value)}
            for base, value in scores.items()
        }

    found = reports(**{"geist-1": 49, "geist-10": 60, "geist-100": 80, "gan-geist": 83})
    rows = claims("geist", found).splitlines()
    assert "| 49.0 / 60.0 / 80.0 (fashion, 40 epochs) | yes |" in rows[2]
    assert rows[3].endswith("| **no** |")
    assert "GAN 83.00 | yes |" in rows[5]
    found = reports(**{"geist-1": 49, "geist-10": 60, "geist-100": 81, "gan-geist": 80})
    rows = claims("geist", found).splitlines()
    assert rows[2].endswith("(fashion, 40 epochs) | **no** |")
    assert rows[5].endswith("| **no** |")


def test_a_rate_that_follows_holds_images_out():
    """Which is no other option than the page's command has."""
    command = settings.COMMANDS["digits-follow"]
    report = report_of(command)
    report["args"]["limit_train"] = 897
    assert compare.name_of(report) == "digits-follow"


def test_ellipses_of_the_page():
    fits = {"mmd": (112, 2), "eps 1": (116, 2)}
    counts = {name: {"diagonal": d, "off_diagonal": o} for name, (d, o) in fits.items()}
    report = compare._with_sums({"metrics": counts})
    assert (report["metrics"]["best"], report["metrics"]["above_mmd"]) == (114, 4)
    start = {"floors": {"k-means, A = I": {"diagonal": 120, "off_diagonal": 13}}}
    page = tables.ellipses({"ellipses-1000": {**report, **start}})
    assert "| eps 1 | 147 - 74 = 73 | - | 116 - 2 = 114 |" in page


@pytest.mark.parametrize("name", settings.COMMANDS)
def test_every_command_of_the_page_parses(name):
    script, *words = shlex.split(settings.COMMANDS[name])
    module = importlib.import_module(script.removesuffix(".py"))
    assert module.parse(words).out.parent == Path("runs")
    known = {tile[0] for tiles in panels.FIGURES.values() for tile in tiles}
    assert known <= settings.COMMANDS.keys()


def test_queue_skips_what_is_finished_continues_the_rest_and_names_failures(
    tmp_path, monkeypatch, capfd
):
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    short = "--batch 64 --width 0.125 --eval-samples 300"
    commands = {
        "whole": f"train_gan.py --data digits --steps 4 {short}",
        "begun": f"train_gan.py --data digits --steps 6 {short}",
        "odd": f"train_sinkhorn.py --data digits --steps 4 {short} --batch 7",
    }
    monkeypatch.setattr(reproduce, "COMMANDS", commands)
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"all": commands})
    for name, stop in (("whole", []), ("begun", ["--stop-at", "2"])):
        train_gan.main([*shlex.split(commands[name])[1:], *stop, "--out", str(tmp_path / name)])
    capfd.readouterr()
    words = ["--runs", str(tmp_path)]
    with pytest.raises(SystemExit, match="failed: odd"):
        reproduce.main(words)
    assert json.loads((tmp_path / "begun" / "metrics.json").read_text())["steps"] == 6
    said = capfd.readouterr().out
    assert "--resume" in next(line for line in said.splitlines() if line.startswith("begun: "))
    assert "whole: " not in said
    reproduce.main([*words, "--only", "whole", "begun"])
    said = capfd.readouterr().out
    assert "2 of 2 runs are finished" in said
    assert "train_gan.py" not in said
    with pytest.raises(ValueError, match="--only has mist, expected all or a run"):
        reproduce.main([*words, "--only", "mist"])


WAITS = """
import pathlib, signal, sys, time
def save(number, frame):
    pathlib.Path("saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
pathlib.Path("ready").touch()
time.sleep(600)
"""


@pytest.fixture
def two_that_wait(tmp_path, monkeypatch):
    """A queue of two runs that wait until they are stopped, in the current folder."""
    monkeypatch.chdir(tmp_path)
    commands = dict.fromkeys("ab", "toy_mixture.py")
    monkeypatch.setattr(reproduce, "COMMANDS", commands)
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"all": commands})
    monkeypatch.setattr(reproduce, "words_of", lambda *_: [sys.executable, "-c", WAITS])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_queue_hands_on_a_stop_and_begins_nothing_more(tmp_path, two_that_wait, capfd):
    def stop():
        while not (tmp_path / "ready").is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    reproduce.main([])
    said = capfd.readouterr().out
    assert "stopped; the same command continues" in said
    assert "b:" not in said
    assert (tmp_path / "saved").is_file()


def test_queue_stops_in_time(two_that_wait, capfd):
    reproduce.main(["--hours", "1e-9"])
    said = capfd.readouterr().out
    assert "stopped; the same command continues" in said
    assert "b:" not in said
