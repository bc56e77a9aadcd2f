"""The page of results: which report is whose, its tables, and its figures."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import compare  # noqa: E402
import reproduce  # noqa: E402
import train_gan  # noqa: E402
from comparison import panels, settings, tables  # noqa: E402
from PIL import Image  # noqa: E402


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
        write(runs / folder, report_of(f"{med} --seed {seed}", **scores))
    # Called like one of the page's runs, but shorter, or with another eps.
    poor = {"metrics": {**common, "recall": 0.99}, "floors": floors}
    write(runs / "med", report_of(f"{med} --seed 2 --steps 300", **poor))
    write(runs / "med-seed2", report_of(f"{med} --seed 2 --eps 2", **poor))
    Image.new("RGB", (300, 300), (200, 30, 30)).save(runs / "a" / "samples_003600.png")
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
    assert "<!-- table" not in page
    assert "<!-- figure" not in page
    assert Image.open(out / "samples.png").size == (panels.WIDTH, panels.WIDTH + 38)
    # The page can be written again from what it kept.
    compare.main(["--runs", str(tmp_path / "none"), "--out", str(out)])
    assert (out / "README.md").read_text() == page


def test_figures_keep_their_colours_and_have_two_tiles_to_a_row(tmp_path):
    """No palette: as many colours as the pictures have."""
    folder = tmp_path / "run"
    folder.mkdir()
    ramp = Image.linear_gradient("L").resize((300, 300))
    Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180))).save(folder / "manifold.png")
    names = [run for run, _, _ in panels.FIGURES["latent_grids"]]
    report = {"metrics": {"is": 7.5, "recall": 0.25}, "evaluations": []}
    panels.draw(
        "latent_grids", dict.fromkeys(names, folder), dict.fromkeys(names, report), tmp_path
    )
    picture = Image.open(tmp_path / "latent_grids.png")
    assert picture.mode == "RGB"
    height = panels.TITLE + panels.WIDTH + panels.GAP
    assert picture.size == (2 * panels.WIDTH + panels.GAP, 2 * height)
    assert len(picture.getcolors(1 << 24)) > 5000
    # Above each tile is something dark: its name.
    for top in (0, height):
        for left in (0, panels.WIDTH + panels.GAP):
            title = picture.crop((left, top, left + panels.WIDTH, top + panels.TITLE))
            assert title.convert("L").getextrema()[0] < 80


def test_kept_results_are_of_the_commands():
    """What is committed was made with the options that the page's command has today."""
    kept = sorted((EXAMPLES / "results" / "metrics").glob("*.json"))
    assert kept
    for path in kept:
        assert compare.name_of(json.loads(path.read_text())) == path.stem


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
    train_gan.main(
        [*shlex.split(commands["begun"])[1:], "--stop-at", "2", "--out", f"{tmp_path}/begun"]
    )
    words = ["--runs", str(tmp_path)]
    with pytest.raises(SystemExit, match="failed: odd"):
        reproduce.main(words)
    for name, steps in (("whole", 4), ("begun", 6)):
        report = json.loads((tmp_path / name / "metrics.json").read_text())
        assert report["steps"] == steps
    assert "--resume" in next(
        line for line in capfd.readouterr().out.splitlines() if line.startswith("begun: ")
    )
    reproduce.main([*words, "--only", "whole", "begun"])
    said = capfd.readouterr().out
    assert "2 of 2 runs are finished" in said
    assert "train_gan.py" not in said
    with pytest.raises(ValueError, match="--only has mist, expected all or a run"):
        reproduce.main([*words, "--only", "mist"])


def test_queue_stops_in_time_and_goes_on(tmp_path, monkeypatch, capfd):
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    command = "toy_mixture.py --preset gan --steps 1000000 --hidden 8 --batch 16"
    monkeypatch.setattr(reproduce, "COMMANDS", dict.fromkeys("ab", command))
    monkeypatch.setattr(reproduce, "EXPERIMENTS", {"all": {"a": command, "b": command}})
    reproduce.main(["--runs", str(tmp_path), "--hours", str(15 / 3600)])
    assert "stopped; the same command continues" in capfd.readouterr().out
    assert (tmp_path / "a" / "ckpt.pt").is_file()
    assert not (tmp_path / "b").exists()
