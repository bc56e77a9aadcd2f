"""What scripts do around a training: sweeps, scores by age, folders that are taken, longer runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import score_by_age  # noqa: E402
import sweep_eps  # noqa: E402
import toy_mixture  # noqa: E402
import train_autoencoder  # noqa: E402
import train_classifier  # noqa: E402
import train_flow  # noqa: E402
import train_gan  # noqa: E402
import train_learned_cost  # noqa: E402
import train_otgan  # noqa: E402
import train_sinkhorn  # noqa: E402
from common import classifier, data, metrics, models, run  # noqa: E402

SMALL = ["--data", "digits", "--width", "0.125", "--batch", "64", "--eval-samples", "300"]


def test_sweep_runs_each_setting_once_and_draws(tmp_path, monkeypatch, capsys):
    words = [*SMALL, "--steps", "4", "--out", str(tmp_path), "--seeds", "2", "--values", "1", ".1"]
    sweep_eps.main(words)
    assert "best MED²" in capsys.readouterr().out
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    summary = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert list(summary) == ["euclidean, eps 0.1", "euclidean, eps 1", "mmd"]
    made = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*eps-1-*/metrics.json"))]
    assert [(r["args"]["eps"], r["args"]["seed"]) for r in made] == [(1, 0), (1, 1)]
    mean = sum(report["metrics"]["fid"] for report in made) / 2
    assert summary["euclidean, eps 1"]["fid"] == pytest.approx(mean)
    # Again: nothing is trained. With other options: refused, not mixed up.
    monkeypatch.setattr(train_sinkhorn, "main", None)
    sweep_eps.main(words)
    with pytest.raises(ValueError, match=r"expected another: .* is of python examples/train_"):
        sweep_eps.main([*words, "--lr", "1e-4"])


def test_scores_by_the_age_of_the_classifier(tmp_path):
    made = tmp_path / "gan"
    train_gan.main([*SMALL, "--preset", "basic", "--steps", "3", "--out", str(made)])
    words = ["--data", "digits", "--runs", str(made), "--ages", "1", "2", "--epochs", "2"]
    score_by_age.main([*words, "--out", str(tmp_path / "whole")])
    report = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    ages = {name: [e["age"] for e in report["evaluations"] if e["run"] == name] for name in LINES}
    assert ages == {name: [1, 2] for name in LINES}
    assert (tmp_path / "whole" / "scores.png").stat().st_size > 5000
    # Stopped and resumed: the same scores.
    parts = [*words, "--out", str(tmp_path / "parts")]
    score_by_age.main([*parts, "--stop-at", "13"])
    score_by_age.main([*parts, "--resume"])
    again = json.loads((tmp_path / "parts" / "metrics.json").read_text())
    assert again["evaluations"] == report["evaluations"]
    with pytest.raises(FileNotFoundError, match=r"has no generated.pt"):
        score_by_age.main(
            ["--data", "digits", "--runs", str(tmp_path), "--out", str(tmp_path / "none")]
        )


def test_runs_of_a_sweep_share_the_classifier_beside_it(tmp_path, monkeypatch):
    shutil.copytree(classifier.SHIPPED / "digits", tmp_path / "classifier_digits")
    monkeypatch.setattr(classifier, "SHIPPED", tmp_path / "none")
    monkeypatch.setattr(train_classifier, "main", None)
    for out in (tmp_path / "run", tmp_path / "sweep" / "run"):
        args = train_sinkhorn.parse(["--data", "digits", "--out", str(out)])
        assert classifier.obtain(args, data.load("digits")).epochs == 60


def test_a_quick_classifier_takes_two_epochs():
    epochs = {
        data: train_classifier.parse(["--preset", "quick", "--data", data]).epochs
        for data in ("cifar10", "fashion", "mnist", "digits")
    }
    assert epochs == {"cifar10": 2, "fashion": 2, "mnist": 2, "digits": 60}


LINES = ("test images", "training images", "gan basic")


def test_a_folder_of_another_script_is_not_written_over(tmp_path):
    train_gan.main([*SMALL, "--steps", "3", "--stop-at", "2", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match=r"it holds a run of train_gan\.py"):
        train_sinkhorn.main([*SMALL, "--steps", "3", "--out", str(tmp_path)])


def test_a_finished_run_can_be_made_longer(tmp_path):
    """If its rate does not depend on its length: the longer run, bit for bit."""
    weights = []
    for folder, lengths in (("whole", [12]), ("parts", [6, 12])):
        out = tmp_path / folder
        for i, steps in enumerate(lengths):
            words = [*SMALL, "--schedule", "constant", "--steps", str(steps), "--out", str(out)]
            train_sinkhorn.main(words + ["--resume"] * i)
        state = torch.load(out / "ckpt.pt", weights_only=True)["state"]["generator"]
        weights.append(torch.cat([value.flatten() for value in state.values()]))
    assert torch.equal(*weights)
    cosine = [*SMALL, "--out", str(tmp_path / "cosine"), "--steps"]
    train_sinkhorn.main([*cosine, "4"])
    with pytest.raises(ValueError, match="--steps is 8, expected 4"):
        train_sinkhorn.main([*cosine, "8", "--resume"])


def test_followed_rate_is_halved_when_the_held_out_distance_grows(tmp_path, monkeypatch):
    looks = iter([3.0] * 5 + [2.0] * 5 + [2.5] * 5 + [1.0] * 100)
    monkeypatch.setattr("common.generate.med2", lambda x, y: next(looks))
    rates = []
    monkeypatch.setattr(
        run.Run, "set_rate", lambda self, optimiser: rates.append(self.rate_factor())
    )
    words = [*SMALL, "--schedule", "follow", "--steps", "6", "--out", str(tmp_path)]
    train_sinkhorn.main([*words, "--stop-at", "5"])
    assert rates == [1, 1, 1, 0.5, 0.5]


def test_mistakes_are_one_line_on_the_command_line(tmp_path):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    script = [sys.executable, str(ROOT / "examples" / "train_sinkhorn.py")]
    words = ["--data", "digits", "--batch", "7", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([*script, *words], text=True, capture_output=True, env=environment)
    said = "train_sinkhorn.py: error: --batch is 7, expected an even number: two half-batches\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_learned_cost_with_an_mmd_and_flow_of_exact_plans(tmp_path):
    for script, words in (
        (train_learned_cost, ["--preset", "mmd"]),
        (train_flow, ["--pairs", "pot"]),
    ):
        out = tmp_path / script.__name__
        script.main([*SMALL, *words, "--steps", "11", "--stop-at", "10", "--out", str(out)])
        assert (out / "loss.csv").read_text().startswith("step,loss\n10,")


def test_flow_in_the_plane(tmp_path):
    train_flow.main(["--preset", "plane", "--steps", "20", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert {"med2_1", "med2_100", "curvature", "modes"} <= report["metrics"].keys()
    assert report["loss_share"] > 0
    assert (tmp_path / "euler.png").stat().st_size > 5000


def test_smoothness_is_in_units_of_the_data():
    test = torch.tensor([[0, 0], [0, 255]], dtype=torch.uint8).reshape(2, 1, 1, 2)  # 2 apart
    grid = torch.tensor([[0.0, 0], [1, 0], [0, 0], [1, 0]])  # rows equal, columns 1 apart
    assert metrics.smoothness(grid, 2, test)["smooth"] == pytest.approx(0.25)


def test_labelled_generator_appends_the_class():
    base = models.mlp_generator((1, 4, 4), 5 + 3, "normal", (8,))
    generator = train_sinkhorn.LabelledGenerator(base, 3)
    z = generator.draw(4, torch.tensor([0, 2, 1, 2]))
    assert z.shape == (4, 8)
    assert z[:, 5:].argmax(1).tolist() == [0, 2, 1, 2]
    assert torch.equal(z[:, 5:].sum(1), torch.ones(4))
    assert torch.equal(generator.draw(50)[:, 5:].sum(1), torch.ones(50))


# A mode, and options that would do nothing in it.
UNUSED = [
    (train_gan, "--loss gan", ["--clip 1", "--penalty 1"]),
    (train_gan, "--preset wgan-clip", ["--betas 0 .9"]),
    (train_gan, "--net dcgan", ["--norm", "--generator-dropout .1"]),
    (train_gan, "--net mlp", ["--no-critic-norm"]),
    (train_otgan, "--match random", ["--eps 1"]),
    (train_learned_cost, "--loss mmd", ["--eps 1", "--n-iters 3"]),
    (train_sinkhorn, "--loss mmd", ["--eps 1", "--n-iters 3"]),
    (train_sinkhorn, "--net conv", ["--hidden 8", "--activation relu", "--no-norm", "--dropout 0"]),
    (train_autoencoder, "--preset vae-2", ["--eps 1", "--prior unit"]),
    (train_flow, "--pairs pot", ["--eps 1"]),
    (train_flow, "--preset plane", ["--epochs 2", "--labels 1", "--limit-train 9"]),
    (train_flow, "--preset plane", ["--eval-every 2", "--eval-samples 9", "--protocol geist"]),
    (train_flow, "--preset plane", ["--classifier x", "--classifier-preset cnn"]),
    (toy_mixture, "--loss gan", ["--eps 1", "--n-gen 2", "--features 3", "--clip 1"]),
    (toy_mixture, "--loss wgan-clip", ["--betas 0 .9", "--penalty 1"]),
    (toy_mixture, "--loss otgan", ["--n-critic 2"]),
]


@pytest.mark.parametrize(
    ("script", "mode", "option"),
    [(script, mode, option) for script, mode, names in UNUSED for option in names],
)
def test_an_option_that_would_do_nothing_is_refused(script, mode, option):
    name = option.split()[0].replace("--no-", "--")
    with pytest.raises(ValueError, match=f"{name} does nothing with "):
        script.parse([*mode.split(), *option.split()])


def test_every_rule_of_options_is_tried():
    tried: dict[str, set[str]] = {}
    for script, _, names in UNUSED:
        options = (name.split()[0].replace("--no-", "--")[2:] for name in names)
        tried.setdefault(script.__name__, set()).update(o.replace("-", "_") for o in options)
    for script, *_ in UNUSED:
        assert tried[script.__name__] == set(script.NEEDS)
