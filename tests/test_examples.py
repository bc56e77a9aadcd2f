"""The training scripts: small runs on the bundled digits, and the parts that they share."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import slow_but
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
GALLERY = EXAMPLES / "gallery"
matplotlib.use("agg")  # pictures without a screen
sys.path[:0] = [str(EXAMPLES)]

import fit_ellipses  # noqa: E402
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
from common import chunks, classifier, data, metrics, models, run  # noqa: E402

# Script, steps, the column of loss.csv that falls, and by which share of its first value: the
# envelope gradient and the one through the iterations, a code, a discriminator, two critics.
LEARNING = {
    "med": (train_sinkhorn, 60, "loss", 0.3),
    "geist-10": (train_sinkhorn, 60, "loss", 0.3),
    "genevay-a": (train_sinkhorn, 60, "loss", 0.3),
    "conv": (train_sinkhorn, 60, "loss", 0.2),
    "conditional": (train_sinkhorn, 60, "loss", 0.3),
    "sae": (train_autoencoder, 60, "reconstruction", 0.3),
    "vae-2": (train_autoencoder, 60, "reconstruction", 0.2),
    "images": (train_flow, 60, "loss", 0.05),
    "dcgan": (train_gan, 30, "critic_loss", 0.1),
    "wgan-gp": (train_gan, 30, "critic_loss", 0.3),
    "tiny": (train_otgan, 60, "loss", 0.3),
}
# The rest, without metrics. A share of -inf: the first steps of two players say nothing about
# whether they learn.
OTHERS = {
    "genevay-b": (train_sinkhorn, "loss", 0.3),
    "genevay-c": (train_sinkhorn, "loss", 0.3),
    "mmd": (train_sinkhorn, "loss", 0.3),
    "eps-10": (train_learned_cost, "loss", -math.inf),
    "eps-1000": (train_learned_cost, "loss", -math.inf),
    "geist": (train_gan, "loss", -math.inf),
    "basic": (train_gan, "critic_loss", 0.05),
    "wgan-clip": (train_gan, "loss", -math.inf),
    "mnist": (train_otgan, "loss", 0.3),
}
SCRIPTS = (
    train_sinkhorn,
    train_gan,
    train_otgan,
    train_autoencoder,
    train_learned_cost,
    train_flow,
)
TINY = ["--data", "digits", "--width", "0.125", "--batch", "64", "--eval-samples", "300"]


@pytest.fixture(scope="module")
def digits_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "classifier_digits"
    train_classifier.main(["--data", "digits", "--epochs", "15", "--out", str(folder)])
    return folder


def losses(folder: Path, column: str = "loss") -> list[float]:
    with (folder / "loss.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file)]


def assert_falls(values: list[float], share: float) -> None:
    assert np.isfinite(values).all()
    assert values[-1] < values[0] - share * abs(values[0])


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "ckpt.pt", weights_only=True)["state"]
    tensors = {f"{part}.{k}": v for part, of_part in state.items() for k, v in of_part.items()}
    return {name: value for name, value in tensors.items() if torch.is_tensor(value)}


# --- training --------------------------------------------------------------------------------


def test_classifier_learns(digits_classifier):
    assert report_of(digits_classifier)["metrics"]["accuracy"] > 0.95
    assert_falls(losses(digits_classifier), 0.8)


@pytest.mark.parametrize("preset", slow_but(LEARNING, "tiny"))
def test_generator_learns_and_writes_everything(preset, digits_classifier, tmp_path, capsys):
    script, steps, column, share = LEARNING[preset]
    out = tmp_path / "run"
    options = ["--preset", preset, "--steps", str(steps), "--out", str(out)]
    options += ["--eval-every", str(steps // 2), "--classifier", str(digits_classifier)]
    script.main([*TINY, *options])

    assert_falls(losses(out, column), share)
    written = {path.name for path in out.iterdir()}
    assert {"ckpt.pt", "loss.csv", "loss.png", "metrics.json", "real.png", "report.html"} <= written
    last = f"samples_{steps:06d}.png"
    assert {"samples_000020.png", last} <= written
    two_dimensional = preset in ("geist-10", "genevay-a", "vae-2")
    assert ("manifold.png" in written) == two_dimensional
    assert ("reconstructions.png" in written) == (preset in ("sae", "vae-2"))
    assert ("classes.png" in written) == (preset == "conditional")
    assert ("euler.png" in written) == (preset == "images")
    assert not [name for name in written if name.startswith(".")]

    report = report_of(out)
    assert report["steps"] == steps
    assert 0 <= report["loss_share"] < 1
    assert (report["loss_share"] > 0) == (preset not in ("vae-2", "dcgan", "wgan-gp"))
    assert report["args"]["command"].startswith(f"python examples/{script.__name__}.py --data")
    assert set(report["floors"]) == {"is", "fid", "precision", "recall", "ot", "med2"}
    assert set(report["floors"]) < set(report["metrics"])
    assert all(np.isfinite(list(report["metrics"].values())))
    assert [entry["step"] for entry in report["evaluations"]] == [steps // 2]
    printed = capsys.readouterr().out
    assert "real-real" in printed
    assert str(out / last) in printed


@pytest.mark.slow
@pytest.mark.parametrize("preset", OTHERS)
def test_other_presets_run(preset, tmp_path):
    script, column, share = OTHERS[preset]
    options = ["--preset", preset, "--steps", "41", "--stop-at", "40", "--out", str(tmp_path)]
    script.main([*TINY, *options])
    assert_falls(losses(tmp_path, column), share)


def assert_same_run(whole: Path, parts: Path) -> None:
    """Same bits: weights, optimisers, weight average and log."""
    assert_close(weights(parts), weights(whole), rtol=0, atol=0)
    assert (whole / "loss.csv").read_text() == (parts / "loss.csv").read_text()


def test_resumed_run_equals_uninterrupted_run(tmp_path, digits_classifier):
    """Metrics too, across an epoch's end and in the middle of a row of the log."""
    common = [*TINY, "--preset", "med", "--ema", "0.9", "--steps", "46"]
    common += ["--classifier", str(digits_classifier)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_sinkhorn.main([*common, "--out", str(whole)])
    train_sinkhorn.main([*common, "--out", str(parts), "--stop-at", "23"])
    assert not (parts / "metrics.json").exists()
    train_sinkhorn.main([*common, "--out", str(parts), "--resume"])
    assert_same_run(whole, parts)
    assert report_of(whole)["metrics"] == report_of(parts)["metrics"]


RESUMED: dict[str, tuple[Any, list[str]]] = {
    "dropout": (train_sinkhorn, [*TINY, "--preset", "geist-10"]),
    "sae": (train_autoencoder, [*TINY, "--preset", "sae"]),
    "vae": (train_autoencoder, [*TINY, "--preset", "vae-20"]),
    "flow": (train_flow, TINY),
    "conditional": (train_sinkhorn, [*TINY, "--preset", "conditional"]),
    "follow": (train_sinkhorn, [*TINY, "--schedule", "follow"]),
    "learned-cost": (train_learned_cost, TINY),
    "dcgan": (train_gan, [*TINY, "--preset", "dcgan"]),
    "wgan-gp": (train_gan, [*TINY, "--preset", "wgan-gp"]),
    "wgan-clip": (train_gan, [*TINY, "--preset", "wgan-clip"]),
    "otgan": (train_otgan, [*TINY, "--flip", "--chunk", "20"]),
    "classifier": (train_classifier, ["--data", "digits"]),
    "mixture": (toy_mixture, ["--batch", "64", "--freeze", "12"]),
    "mixture-gan": (toy_mixture, ["--batch", "64", "--preset", "wgan-gp"]),
    "ellipses": (fit_ellipses, ["--losses", "mmd", "eps 1", "med .1"]),
}


@pytest.mark.parametrize("name", slow_but(RESUMED, "dropout"))
def test_every_script_resumes_exactly(name, tmp_path):
    """2N steps are N steps, a new start, and N steps."""
    script, options = RESUMED[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, stops in ((whole, ["20"]), (parts, ["9", "20"])):
        for i, stop in enumerate(stops):
            common = [*options, "--steps", "30", "--out", str(out), "--stop-at", stop]
            script.main(common + ["--resume"] * i)
    assert_same_run(whole, parts)


@pytest.mark.slow
def test_mixed_precision_trains(tmp_path):
    for script in (train_gan, train_otgan, train_sinkhorn, train_classifier):
        options = ["--data", "digits", "--amp", "--steps", "11", "--stop-at", "10"]
        script.main([*options, "--out", str(tmp_path / script.__name__)])
        assert np.isfinite(losses(tmp_path / script.__name__)).all()


@pytest.mark.slow
def test_ellipses_are_found(tmp_path):
    fit_ellipses.main(["--steps", "150", "--losses", "mmd", "med 0.1", "--out", str(tmp_path)])
    assert (tmp_path / "ellipses.png").is_file()
    for name, found in report_of(tmp_path)["metrics"].items():
        assert_falls(losses(tmp_path, name), 0)
        counts = np.array(found["counts"])
        right, wrong = counts.trace(), counts.sum() - counts.trace()
        assert (found["diagonal"], found["off_diagonal"]) == (right, wrong)
        assert right - wrong > 90


def test_ellipsoids_hold_what_they_draw():
    torch.manual_seed(0)
    model = fit_ellipses.Ellipsoids(torch.tensor([[0.0, 0, 0], [9, 0, 0]]))
    with torch.no_grad():
        model.axes[1].copy_(torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 0, 0.5]]))
    inside = model.inside(model.draw(400).detach())
    assert inside[0, ::2].all()
    assert inside[1, 1::2].all()
    assert not inside[1, ::2].any()
    assert not model.inside(torch.tensor([[11.5, 0, 0]])).any()


@pytest.mark.slow
def test_mixture_is_approached(tmp_path):
    options = ["--steps", "120", "--freeze", "60", "--batch", "128", "--lr", "1e-3"]
    toy_mixture.main([*options, "--out", str(tmp_path)])
    report = report_of(tmp_path)
    assert (tmp_path / "mixture.png").is_file()
    # With the critic frozen the generator descends alone.
    assert_falls(losses(tmp_path)[6:], 0)
    assert report["floors"]["modes"] == 8
    assert report["floors"]["near"] > 0.98
    assert [entry["step"] for entry in report["evaluations"]] == [24, 48, 60, 72, 96, 120]


def test_mixture_score():
    on_modes = toy_mixture.centres().repeat(5, 1)
    assert toy_mixture.score(on_modes) == {"modes": 8, "near": 1.0, "least": 0.125}
    collapsed = toy_mixture.score(torch.cat((on_modes[:2].repeat(10, 1), torch.zeros(20, 2))))
    assert collapsed == {"modes": 2, "near": 0.5, "least": 0.0}


# --- OT-GAN ----------------------------------------------------------------------------------


def game(*options: str) -> train_otgan.Game:
    """A small game on 8x8 images, the same at every call."""
    torch.manual_seed(0)
    args = train_otgan.parse(["--data", "digits", "--steps", "8", "--width", ".0625", *options])
    generator = train_otgan.generator_of((1, 8, 8), 5, "uniform", args.width)
    critic = train_otgan.critic_of((1, 8, 8), args.width)
    train_otgan.initialise_from_data(generator, generator.draw(50))
    train_otgan.initialise_from_data(critic, generator.generate(generator.draw(50)))
    return train_otgan.Game(args, generator, critic)


@pytest.mark.parametrize("match", ["ot", "random"])
def test_critic_ascends_first_and_generator_descends(match):
    played = game("--match", match, "--n-gen", "2")
    real = torch.rand(24, 1, 8, 8) * 2 - 1
    for i, mover in enumerate(["critic", "generator", "generator", "critic"]):
        before = {name: weights_of(played, name) for name in ("critic", "generator")}
        played.step(i, real)
        for name, state in before.items():
            assert all(map(torch.equal, state, weights_of(played, name))) == (name != mover)
    # Along its own gradient a player changes the same loss in its own direction.
    z = played.generator.draw(24)

    def loss() -> torch.Tensor:
        return played._loss(played.critic(real), played.critic(played.generator(z)))

    for name, sign in (("critic", 1), ("generator", -1)):
        net = getattr(played, name).requires_grad_(True)
        before = loss()
        gradients = torch.autograd.grad(before, list(net.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(net.parameters(), gradients, strict=True):
                weight += sign * 1e-3 * gradient
        assert sign * (loss() - before) > 0


def weights_of(played: train_otgan.Game, name: str) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in getattr(played, name).parameters()]


def transported(costs: torch.Tensor) -> float:
    """The mean cost of the best matching."""
    return float(costs[linear_sum_assignment(costs)].mean())


def test_otgan_loss_is_twice_the_minibatch_energy_distance():
    """2 D² of four half-batches, with exact transport between unit vectors."""
    played = game("--eps", "0.002")
    real, fake = torch.randn(40, 6), torch.randn(40, 6)

    def exact(x: torch.Tensor, y: torch.Tensor) -> float:
        x, y = (torch.nn.functional.normalize(side.double(), dim=1) for side in (x, y))
        return transported(1 - x @ y.T)

    (x1, x2), (y1, y2) = real.chunk(2), fake.chunk(2)
    across = exact(x1, y1) + exact(x1, y2) + exact(x2, y1) + exact(x2, y2)
    squared = across / 2 - exact(x1, x2) - exact(y1, y2)
    assert played._loss(real, fake).item() == pytest.approx(2 * squared, abs=5e-3)
    random = game("--match", "random")._loss(real, fake).item()
    assert random > played._loss(real, fake).item() - 1


@pytest.mark.parametrize("turn", ["critic", "generator"])
def test_chunked_otgan_step_is_the_whole_one(turn):
    real = torch.rand(24, 1, 8, 8) * 2 - 1
    step = {"critic": 0, "generator": 1}[turn]
    losses_, gradients = [], []
    for words in ([], ["--chunk", "7"]):
        played = game(*words)
        losses_.append(played.step(step, real).item())
        gradients.append([w.grad for w in getattr(played, turn).parameters()])
    assert losses_[0] == pytest.approx(losses_[1], rel=1e-4)
    for whole, chunked in zip(*gradients, strict=True):
        assert_close(chunked, whole, rtol=1e-3, atol=1e-3 * whole.abs().max().item())


def test_chunked_gradient_with_random_layers():
    """Dropout draws the same mask in both passes, and random numbers go on as if unchunked."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
    net.double()
    x = torch.randn(10, 3, dtype=torch.float64)
    parts = [lambda part=part: net(part) for part in x.split(4)]
    found = []
    for chunked in (False, True):
        torch.manual_seed(1)
        net.zero_grad()
        value = chunks.backward(parts, lambda features: torch.pdist(features).sum(), chunked)
        found.append((value, *(weight.grad for weight in net.parameters()), torch.rand(3)))
    assert_close(*found, rtol=1e-12, atol=1e-8)


def test_edges_are_compared_beside_pixels():
    x, y = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)
    compared = train_sinkhorn.compared
    plain, both = (compared(x, edges) - compared(y, edges) for edges in (0.0, 2.0))
    off = (x - y).numpy()
    squares = [(np.diff(off, axis=axis) ** 2).sum((1, 2, 3)) for axis in (2, 3)]
    pixels = (off**2).sum((1, 2, 3))
    np.testing.assert_allclose(plain.square().sum(1), pixels)
    np.testing.assert_allclose(both.square().sum(1), pixels + 4 * sum(squares))


def test_upsampling_convolution_is_the_plain_one():
    layer = models.UpConv(3, 4).double()
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    upsampled = torch.nn.functional.interpolate(x, scale_factor=2)
    plain = torch.nn.functional.conv2d(upsampled, layer.weight, layer.bias, padding=2)
    assert torch.allclose(layer(x), plain)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_otgan_networks(shape):
    torch.manual_seed(0)
    generator = train_otgan.generator_of(shape, 100, "uniform", 0.0625)
    critic = train_otgan.critic_of(shape, 0.0625)
    z = generator.draw(200)
    train_otgan.initialise_from_data(generator, z)
    images = generator(z)
    assert images.shape == (200, *shape)
    train_otgan.initialise_from_data(critic, images)
    # Before the last tanh and the last CReLU every channel has mean 0 and variance 1.
    for outputs in (images.atanh(), critic[:-2](images)):
        variance, mean = torch.var_mean(outputs.transpose(0, 1).flatten(1), 1)
        assert mean.abs().max() < 1e-2
        assert (variance - 1).abs().max() < 1e-2


def test_full_width_networks_are_those_of_the_report():
    sizes = {(1, 28, 28): 25088, (3, 32, 32): 32768}
    for shape, features in sizes.items():
        with torch.device("meta"):
            critic = train_otgan.critic_of(shape, 1.0)
            assert critic(torch.empty(1, *shape)).shape == (1, features)


def test_resume_refuses_another_run(tmp_path):
    common = [*TINY, "--steps", "8", "--out", str(tmp_path / "run")]
    with pytest.raises(FileNotFoundError, match=r"--resume: .*ckpt.pt is missing"):
        train_sinkhorn.main([*common, "--resume"])
    train_sinkhorn.main([*common, "--stop-at", "2"])
    with pytest.raises(ValueError, match=r"--lr is 0\.5, expected 0\.003"):
        train_sinkhorn.main([*common, "--resume", "--lr", "0.5"])


@pytest.mark.parametrize("folder", ["file", "file/run", "/proc"])
def test_an_out_that_cannot_be_written_is_refused_at_once(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out is .*, expected a folder to write in"):
        train_sinkhorn.main([*TINY, "--out", str(tmp_path / folder)])


def test_interrupt_saves_a_whole_step(tmp_path):
    args = train_classifier.parse(["--data", "digits", "--steps", "100", "--out", str(tmp_path)])
    model = torch.nn.Linear(1, 1)
    training = run.Run(args, {"model": model})

    def step(i: int) -> dict[str, torch.Tensor]:
        if i == 3:
            os.kill(os.getpid(), signal.SIGINT)
        with torch.no_grad():
            model.bias.fill_(i)
        return {"loss": torch.tensor(0.0)}

    before = signal.getsignal(signal.SIGINT)
    for i in training:
        training.log(**step(i))
    assert not training.finished
    assert signal.getsignal(signal.SIGINT) is before
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 4
    assert checkpoint["state"]["model"]["bias"] == 3


def test_diverged_loss_is_an_error(tmp_path):
    args = train_classifier.parse(["--data", "digits", "--steps", "20", "--out", str(tmp_path)])
    training = run.Run(args, {})
    steps = iter(training)
    for _ in range(10):
        next(steps)
        training.log(loss=torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError, match="loss is nan at step 10"):
        next(steps)


def test_help_explains_every_script(capsys):
    for script in (*SCRIPTS, train_classifier, toy_mixture, fit_ellipses, score_by_age):
        with pytest.raises(SystemExit) as caught:
            script.main(["--help"])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        networks = () if script is fit_ellipses else ("--amp",)
        for option in ("--preset", "--out", "--steps", "--resume", "--device", "--seed", *networks):
            assert option in printed
        for preset in script.PRESETS if hasattr(script, "PRESETS") else ():
            assert preset in printed


def test_help_shows_the_defaults_of_the_preset(capsys):
    iterations = "iterations of the divergence, else to convergence (default: 10)"
    for words, expected in (([], "(default: 0.003)"), (["--preset", "geist-10"], iterations)):
        with pytest.raises(SystemExit):
            train_sinkhorn.main([*words, "--help"])
        assert expected in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        train_sinkhorn.main(["--preset", "gan"])
    assert "invalid choice: 'gan'" in capsys.readouterr().err


def test_command_line():
    command = [sys.executable, str(EXAMPLES / "train_sinkhorn.py"), "--help"]
    # With this checkout's otloss, installed or not.
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    printed = subprocess.check_output(command, text=True, env=environment)
    assert "usage: examples/train_sinkhorn.py" in printed


@pytest.mark.parametrize("script", SCRIPTS)
def test_presets_parse(script):
    for preset, settings in script.PRESETS.items():
        args = script.parse(["--preset", preset])
        changed = set(settings.get("by_data", {}).get(args.data, {}))
        for name in settings.keys() - changed - {"by_data"}:
            assert getattr(args, name) == settings[name]
        # The command line has the last word.
        assert script.parse(["--preset", preset, "--lr", "3"]).lr == 3


DIGITS = ["--data", "digits"]
BAD = [
    (train_sinkhorn, [*DIGITS, "--batch", "99"], "--batch is 99, expected an even number"),
    (train_sinkhorn, [*DIGITS, "--batch", "2000", "--steps", "1"], "2000, expected 1..1297"),
    (train_sinkhorn, [*DIGITS, "--batch", "2000"], "--batch is 2000, expected 1..1297"),
    (train_sinkhorn, [*DIGITS, "--n-iters", "5"], "--n-iters does nothing with --loss med"),
    (train_sinkhorn, ["--steps", "2", "--epochs", "1"], "--steps and --epochs are both given"),
    (train_sinkhorn, ["--label-weight", "2", "--labels", "1"], r"--labels is \[1\], expected none"),
    (train_flow, ["--preset", "plane", "--schedule", "follow"], "--schedule follow needs images"),
    (train_gan, [*DIGITS, "--steps", "3", "--eval-every", "3"], "--eval-every is 3, expected less"),
    (train_gan, ["--classifier", "x", "--classifier-preset", "cnn"], "--classifier-preset does no"),
    (fit_ellipses, ["--losses", "mmd", "--n-iters", "5"], "--n-iters does nothing without an"),
    (score_by_age, ["--epochs", "2", "--runs", "x"], "--ages has 25, expected at most 2 epochs"),
    (sweep_eps, ["--seed", "3"], "--seed is given, expected none: the sweep sets it"),
    (sweep_eps, ["--over", "batch", "--values", "4", "--batch", "3"], "--batch is given, expected"),
    (sweep_eps, ["--over", "batch"], "--over batch needs --values"),
    (train_sinkhorn, [*DIGITS, "--epochs", "0"], "--epochs 0.0 gives 0 steps"),
    (train_sinkhorn, [*DIGITS, "--ema", "1", "--steps", "1"], "--ema is 1.0, expected 0 <= ema"),
    (train_sinkhorn, [*DIGITS, "--limit-train", "0"], "--limit-train is 0"),
    (train_sinkhorn, [*DIGITS, "--steps", "0"], "--steps is 0, expected at least 1"),
    (train_sinkhorn, [*DIGITS, "--labels", "2", "11"], r"--labels has \[11\], .* digits: \[0, 1,"),
    (train_otgan, ["--chunk", "0"], "--chunk is 0, expected at least 1"),
    (train_otgan, ["--batch", "7"], "--batch is 7, expected an even number"),
    (train_gan, ["--n-critic", "0"], "--n-critic is 0, expected at least 1"),
    (toy_mixture, ["--batch", "7"], "--batch is 7, expected an even number"),
    (fit_ellipses, ["--losses", "kl"], "--losses has 'kl', expected 'mmd', 'eps <e>' or"),
]
if not torch.cuda.is_available():
    BAD += [(train_otgan, [*DIGITS, "--device", "cuda"], "--device is cuda, expected cpu: torch")]


@pytest.mark.parametrize(("script", "options", "message"), BAD)
def test_bad_options(script, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        script.main([*options, "--out", str(tmp_path)])


# --- data ------------------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_idx_set(root: Path, name: str, gz: bool) -> dict[str, np.ndarray]:
    """A tiny set of random images in the layout of the real ones."""
    rng, raw, arrays = np.random.default_rng(0), root / data.IDX_FOLDERS[name] / "raw", {}
    raw.mkdir(parents=True)
    for split, count in (("train", 7), ("test", 3)):
        images, labels = data.IDX_FILES[split]
        arrays[images] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[labels] = rng.integers(0, 10, count, dtype=np.uint8)
    for file, array in arrays.items():
        contents = idx_bytes(array)
        (raw / (file + ".gz" * gz)).write_bytes(gzip.compress(contents) if gz else contents)
    return arrays


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_idx_images(name, gz, tmp_path, monkeypatch):
    arrays = write_idx_set(tmp_path, name, gz)
    monkeypatch.setenv("OTLOSS_DATA", str(tmp_path))
    images = data.load(name)
    assert images.shape == (1, 28, 28)
    for split, files in data.IDX_FILES.items():
        stored = getattr(images, split)[:, 0], getattr(images, f"{split}_labels")
        for found, file in zip(stored, files, strict=True):
            assert np.array_equal(found.numpy(), arrays[file])


def test_spoilt_idx_is_named(tmp_path):
    path, raw = tmp_path / "train-images-idx3-ubyte", idx_bytes(np.zeros((2, 3, 3), np.uint8))
    for spoilt in (b"GIF8" + raw[4:], raw[:-1], b"\0"):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte .* expected"):
            data.read_idx(path)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_folders_and_archive(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "cifar10-jpeg"
    for split, count in (("train", 3), ("test", 1)):
        for shade, name in ((40, "airplane"), (200, "truck")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                grey = image.new("RGB", (32, 32), (shade, shade, shade))
                grey.save(folder / split / name / f"{i:04}.jpg")
    if packed:
        with tarfile.open(folder / "cifar10-jpeg.tar.xz", "w:xz") as archive:
            for split in ("train", "test"):
                archive.add(folder / split, split)
                (folder / split).rename(tmp_path / split)
    images = data.load("cifar10", tmp_path)
    assert images.train.shape == (6, 3, 32, 32)
    assert images.test.shape == (2, 3, 32, 32)
    # The label must have followed its image through the shuffle.
    assert torch.equal(images.train_labels, (images.train[:, 0, 0, 0] > 100).long())
    # What was decoded is kept, and read the next time.
    shutil.rmtree(folder)
    again = data.load("cifar10", tmp_path)
    assert torch.equal(again.train, images.train)
    assert torch.equal(again.test_labels, images.test_labels)


def test_cifar_binary_files(tmp_path):
    folder = tmp_path / data.CIFAR_FOLDER
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = [file for split in data.CIFAR_FILES.values() for file in split]
    records = {file: rng.integers(0, 10, (2, 3073), dtype=np.uint8) for file in files}
    for file, table in records.items():
        table.tofile(folder / file)
    images = data.load("cifar10", tmp_path)
    assert images.train.shape == (10, 3, 32, 32)
    assert images.test.shape == (2, 3, 32, 32)
    fifth = records["data_batch_3.bin"][0]
    assert images.train_labels[4] == fifth[0]
    # Red plane first, row by row.
    assert images.train[4, 1, 2, 3] == fifth[1 + 1024 + 2 * 32 + 3]
    (folder / "test_batch.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="has 3 bytes, expected a multiple of 3073"):
        data.load("cifar10", tmp_path)


def test_missing_images_say_what_is_expected(tmp_path):
    for name, expected in (
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("fashion", "FashionMNIST/raw/t10k-labels-idx1-ubyte"),
        ("cifar10", "cifar10-jpeg/cifar10-jpeg.tar.xz"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            train_sinkhorn.main(["--data", name, "--data-dir", str(tmp_path)])
        for part in (expected, data.SOURCES[name], f"--data-dir is {tmp_path}"):
            assert part in str(caught.value)


def test_auto_takes_digits_only_when_no_folder_was_named(tmp_path, monkeypatch):
    monkeypatch.setenv("OTLOSS_DATA", str(tmp_path))
    assert train_sinkhorn.parse([]).data == "digits"
    assert train_sinkhorn.parse(["--data-dir", str(tmp_path)]).data == "fashion"
    write_idx_set(tmp_path, "fashion", gz=True)
    assert train_sinkhorn.parse([]).data == "fashion"


def test_bundled_sets():
    images = data.load("digits")
    assert images.shape == (1, 8, 8)
    assert len(images.train) + len(images.test) == 1797
    pixels = data.to_float(images.train)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    with pytest.raises(ValueError, match="data is 'imagenet', expected one of digits"):
        data.load("imagenet")


def test_images_of_some_classes():
    images = data.load("digits").only([2, 7])
    for labels in (images.train_labels, images.test_labels):
        assert labels.unique().tolist() == [2, 7]
    assert len(images.train) == len(images.train_labels) > 200


def test_batches_depend_on_the_step_alone():
    batches = data.Batches(23, 5, seed=3)
    epoch = torch.cat([batches(step) for step in range(4)])
    assert len(epoch.unique()) == 20
    assert not torch.equal(batches(0), batches(4))
    assert torch.equal(data.Batches(23, 5, seed=3)(6), batches(6))


# --- metrics and models ----------------------------------------------------------------------


def test_inception_score_limits():
    assert metrics.inception_score(torch.zeros(50, 10)) == pytest.approx(1)
    certain = 50.0 * torch.eye(10).repeat(20, 1)
    assert metrics.inception_score(certain, splits=2) == pytest.approx(10)


def test_frechet_distance_of_gaussians():
    x = torch.randn(4000, 3, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    # Covariances I and 4I, means apart by 5: 25 + 3 + 12 - 2 * 6.
    shift = torch.tensor([3.0, 4.0, 0.0])
    assert metrics.frechet_distance(x, 2 * x + shift) == pytest.approx(28)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_coverage_by_neighbourhoods():
    line = torch.arange(20.0)[:, None]
    assert metrics.coverage(line, line) == 1
    assert metrics.coverage(line + 1000, line) == 0
    # The third neighbour of an inner point is 2 away, of the last one 3.
    probes = torch.tensor([[21.9], [22.1]])
    assert metrics.coverage(probes, line) == 0.5


def test_ot_distance_and_med2_are_those_of_exact_transport():
    images = data.to_float(data.load("digits").train[:400])
    x, y = images[:200], 0.8 * images[200:]

    def exact(x: torch.Tensor, y: torch.Tensor) -> float:
        x, y = (side.flatten(1).double() for side in (x, y))
        return transported(torch.cdist(x, y).square()) / 2

    assert metrics.ot_distance(x, y) == pytest.approx(exact(x, y), rel=2e-3)
    (x1, x2), (y1, y2) = x.chunk(2), y.chunk(2)
    across = sum(exact(p, q) for p in (x1, x2) for q in (y1, y2)) / 2
    expected = across - exact(x1, x2) - exact(y1, y2)
    assert metrics.med2(x, y) == pytest.approx(expected, rel=2e-2, abs=2e-3)


def test_latent_grid_and_generation():
    generator = models.mlp_generator((1, 4, 4), 2, "normal", hidden=(8,), dropout=0.5)
    grid = generator.latent_grid(3)
    assert grid.shape == (9, 2)
    assert torch.equal(grid[4], torch.zeros(2))
    images = generator.generate(grid, chunk=4)
    assert images.shape == (9, 1, 4, 4)
    assert generator.training
    # Neither dropout nor statistics of the batch.
    assert torch.allclose(images, generator.generate(grid), atol=1e-6)
    with pytest.raises(ValueError, match="--prior is 'cauchy'"):
        models.mlp_generator((1, 4, 4), 2, "cauchy")


def test_moving_average_follows_weights_and_buffers():
    model = torch.nn.BatchNorm1d(1)
    average = models.moving_average(model, 0.5)
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(-value)
            model.num_batches_tracked.add_(1)
        average.update_parameters(model)
    # Warm-up: the first update copies, then decays 2/11 and 3/12.
    second = 1 + (2 - 1) * (1 - 2 / 11)
    expected = second + (4 - second) * (1 - 3 / 12)
    assert average.module.weight.item() == pytest.approx(expected)
    assert average.module.running_mean.item() == pytest.approx(-expected)
    assert average.module.num_batches_tracked == 3


# --- the gallery ------------------------------------------------------------------------------

PICTURES = sorted(path.stem for path in GALLERY.glob("*.py"))


@pytest.mark.parametrize("name", slow_but(PICTURES, "first_loss"))
def test_gallery(name, monkeypatch):
    """Runs as a script, without a warning, and shows a figure with something in it."""
    plt.close("all")
    monkeypatch.setattr(plt, "show", lambda: None)
    runpy.run_path(str(GALLERY / f"{name}.py"), run_name="__main__")
    assert plt.get_fignums()
    for number in plt.get_fignums():
        assert all(axes.has_data() for axes in plt.figure(number).axes)
    plt.close("all")


@pytest.mark.slow
def test_gradient_flow_reaches_its_target(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    made = runpy.run_path(str(GALLERY / "gradient_flow.py"))
    nearest = torch.cdist(made["ends"][0.01], made["target"]).min(1).values
    plt.close("all")
    assert nearest.mean() < 0.1


def test_shapes_are_registered(tmp_path, capsys):
    register = importlib.import_module("register_shapes")
    options = ["--points", "500", "--blur", "0.1", "--steps", "8", "--out", str(tmp_path / "new")]
    register.main(options)
    assert "step 8/8: blur 0.100" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "new" / "steps.csv").open()))
    assert float(rows[-1]["divergence"]) < 0.02 * float(rows[0]["divergence"])
    assert np.load(tmp_path / "new" / "registered.npy").shape == (500, 3)
    assert (tmp_path / "new" / "steps.png").stat().st_size > 5000
    np.save(tmp_path / "flat.npy", np.ones(5))
    for wrong, said in (("missing.npy", "neither a file nor one of"), ("flat.npy", "must hold")):
        with pytest.raises(SystemExit, match=said):
            register.main(["--source", str(tmp_path / wrong)])


# --- the demo --------------------------------------------------------------------------------


def test_the_demo_needs_no_data_and_no_training_of_a_classifier(tmp_path, monkeypatch, capsys):
    write_idx_set(tmp_path, "fashion", gz=True)
    monkeypatch.setenv("OTLOSS_DATA", str(tmp_path))
    monkeypatch.setattr(train_classifier, "main", None)
    out = tmp_path / "runs" / "demo"
    train_sinkhorn.main(["--preset", "demo", "--steps", "40", "--out", str(out)])
    printed, log = capsys.readouterr()
    assert printed.startswith("digits, preset demo: 40 steps of 500 images on cpu")
    for text in ("real-real", "Better is", f"{out}/samples_000040.png", "What next"):
        assert text in printed
    assert (out / "samples_000040.png").is_file()
    last = log.splitlines()[-2:]  # of a log: a line at the end of the run, and none
    assert "demo: 40 of 40" in last[0]
    assert "loss=" in last[0]
    # Data that was asked for is never replaced by the digits.
    assert train_sinkhorn.parse(["--preset", "demo", "--data", "fashion"]).data == "fashion"
    with pytest.raises(ValueError, match=r"--data-dir is .*, expected none: digits come with"):
        train_sinkhorn.parse(["--preset", "demo", "--data-dir", str(tmp_path)])


def test_the_shipped_classifier_is_the_one_that_is_stated():
    folder = classifier.SHIPPED / "digits"
    report = report_of(folder)
    page = (classifier.SHIPPED / "README.md").read_text()
    assert report["args"]["command"] in page
    args = train_sinkhorn.parse(["--data", "digits"])
    images = data.load("digits")
    accuracy = classifier.accuracy_on_test(classifier.obtain(args, images), images)
    # Another machine may round one image of the 500 to another label.
    assert accuracy == pytest.approx(report["metrics"]["accuracy"], abs=0.0021)
    assert f"{report['metrics']['accuracy']:.1%}" in page


def test_a_missing_classifier_is_trained_before_the_generator(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifier, "SHIPPED", tmp_path / "none")
    words = [*TINY, "--steps", "3", "--out", str(tmp_path / "run")]
    parse = train_classifier.parse
    monkeypatch.setattr(train_classifier, "parse", lambda argv: parse([*argv, "--steps", "20"]))
    train_sinkhorn.main([*words, "--ema", "0.9"])
    printed, log = capsys.readouterr()
    assert f"training it in {tmp_path / 'classifier_digits'}" in printed
    assert log.index("classifier_digits: 20 of 20") < log.index("run: 3 of 3")
    # The generator's random numbers do not depend on it.
    first = weights(tmp_path / "run")
    train_sinkhorn.main([*words, "--ema", "0.9"])
    assert "training it" not in capsys.readouterr().out
    assert_close(weights(tmp_path / "run"), first, rtol=0, atol=0)
    # One that was named is not made up for, and one that was stopped is not used.
    with pytest.raises(FileNotFoundError, match=r"--classifier: .*weights.pt is missing"):
        train_sinkhorn.main([*words, "--classifier", str(tmp_path / "other")])
    monkeypatch.setattr(train_classifier, "main", lambda args: False)
    (tmp_path / "classifier_digits" / "weights.pt").unlink()
    with pytest.raises(SystemExit, match="without its classifier"):
        train_sinkhorn.main(words)
