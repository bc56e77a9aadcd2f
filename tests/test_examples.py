"""The training scripts: small runs on the bundled digits, and the parts that they share."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_classifier  # noqa: E402
import train_sinkhorn  # noqa: E402
from common import classifier, data, metrics, models, run  # noqa: E402

PRESETS = ["med", "geist-10"]  # the envelope gradient, and the one through the iterations
TINY = ["--data", "digits", "--width", "0.125", "--batch", "64", "--eval-samples", "300"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small matrices gain nothing from threads, and tests may run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "classifier_digits"
    train_classifier.main(["--data", "digits", "--epochs", "15", "--out", str(folder)])
    return folder


def losses(folder: Path) -> list[float]:
    with (folder / "loss.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    return {
        f"{part}.{name}": value
        for part, state in checkpoint["state"].items()
        for name, value in state.items()
        if torch.is_tensor(value)
    }


# --- training --------------------------------------------------------------------------------


def test_classifier_learns(digits_classifier: Path):
    report = json.loads((digits_classifier / "metrics.json").read_text())
    assert report["metrics"]["accuracy"] > 0.95
    assert losses(digits_classifier)[-1] < 0.2 * losses(digits_classifier)[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_generator_learns_and_writes_everything(
    preset: str, digits_classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    options = ["--preset", preset, "--steps", "60", "--out", str(out), "--eval-every", "30"]
    train_sinkhorn.main([*TINY, *options, "--classifier", str(digits_classifier)])

    values = losses(out)
    assert values[-1] < 0.7 * values[0]
    written = {path.name for path in out.iterdir()}
    assert {"ckpt.pt", "loss.csv", "loss.png", "metrics.json", "real.png"} <= written
    assert {"samples_000020.png", "samples_000060.png"} <= written  # first epoch, last step
    assert ("manifold.png" in written) == (preset == "geist-10")
    assert not [name for name in written if name.startswith(".")]

    report = json.loads((out / "metrics.json").read_text())
    assert report["steps"] == 60
    assert set(report["floors"]) == {"is", "fid", "precision", "recall", "ot", "med2"}
    assert set(report["floors"]) < set(report["metrics"])
    assert all(np.isfinite(list(report["metrics"].values())))
    assert [entry["step"] for entry in report["evaluations"]] == [30]
    printed = capsys.readouterr().out
    assert "real-real" in printed
    assert "metrics.json" in printed


@pytest.mark.parametrize("preset", PRESETS)
def test_resumed_run_equals_uninterrupted_run(preset: str, tmp_path: Path, digits_classifier: Path):
    """Same bits: weights, optimiser, weight average and log, across an epoch's end and in the
    middle of a row of the log."""
    common = [*TINY, "--preset", preset, "--ema", "0.9", "--steps", "46"]
    common += ["--classifier", str(digits_classifier)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_sinkhorn.main([*common, "--out", str(whole)])
    train_sinkhorn.main([*common, "--out", str(parts), "--stop-at", "23"])
    assert not (parts / "metrics.json").exists()
    train_sinkhorn.main([*common, "--out", str(parts), "--resume"])

    expected, found = weights(whole), weights(parts)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert (whole / "loss.csv").read_text() == (parts / "loss.csv").read_text()
    scores = [json.loads((path / "metrics.json").read_text()) for path in (whole, parts)]
    assert scores[0]["metrics"] == scores[1]["metrics"]


def test_resume_refuses_another_run(tmp_path: Path):
    common = [*TINY, "--steps", "8", "--out", str(tmp_path / "run")]
    with pytest.raises(FileNotFoundError, match=r"--resume: .*ckpt.pt is missing"):
        train_sinkhorn.main([*common, "--resume"])
    train_sinkhorn.main([*common, "--stop-at", "2"])
    with pytest.raises(ValueError, match=r"--lr is 0\.5, expected 0\.003"):
        train_sinkhorn.main([*common, "--resume", "--lr", "0.5"])


def test_interrupt_saves_a_whole_step(tmp_path: Path):
    args = classifier.parse(["--data", "digits", "--steps", "100", "--out", str(tmp_path)])
    model = torch.nn.Linear(1, 1)
    training = run.Run(args, {"model": model})

    def step(i: int) -> run.Losses:
        if i == 3:
            os.kill(os.getpid(), signal.SIGINT)
        with torch.no_grad():
            model.bias.fill_(i)
        return {"loss": torch.tensor(0.0)}

    before = signal.getsignal(signal.SIGINT)
    assert not training.train(step)
    assert signal.getsignal(signal.SIGINT) is before
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 4
    assert checkpoint["state"]["model"]["bias"] == 3


def test_diverged_loss_is_an_error(tmp_path: Path):
    args = classifier.parse(["--data", "digits", "--steps", "20", "--out", str(tmp_path)])
    training = run.Run(args, {})
    with pytest.raises(FloatingPointError, match="loss is nan at step 10"):
        training.train(lambda i: {"loss": torch.tensor(float("nan"))})


def test_command_line():
    command = [sys.executable, str(EXAMPLES / "train_sinkhorn.py"), "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for option in ("--preset", "--data", "--data-dir", "--epochs", "--steps", "--resume", "--ema"):
        assert option in printed


@pytest.mark.parametrize("preset", train_sinkhorn.PRESETS)
def test_presets_parse(preset: str):
    args = train_sinkhorn.parse(["--preset", preset, "--data", "digits"])
    assert args.preset == preset
    assert args.loss == train_sinkhorn.PRESETS[preset]["loss"]
    # The command line has the last word.
    assert train_sinkhorn.parse(["--preset", preset, "--data", "digits", "--eps", "3"]).eps == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "99"], "--batch is 99, expected an even number"),
        (["--batch", "2000", "--steps", "1"], "--batch is 2000, expected 1..1297"),
        (["--epochs", "0"], "gives 0 steps"),
        (["--ema", "1", "--steps", "1"], "--ema is 1.0, expected 0 <= ema < 1"),
        (["--limit-train", "0"], "--limit-train is 0"),
    ],
)
def test_bad_options(options: list[str], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        train_sinkhorn.main(["--data", "digits", "--out", str(tmp_path), *options])


# --- data ------------------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_idx_set(root: Path, name: str, gz: bool) -> dict[str, np.ndarray]:
    """A tiny set of random images in the layout of the real ones."""
    rng, raw = np.random.default_rng(0), root / data.IDX_FOLDERS[name] / "raw"
    raw.mkdir(parents=True)
    arrays = {}
    for split, count in (("train", 7), ("test", 3)):
        images, labels = data.IDX_FILES[split]
        arrays[images] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[labels] = rng.integers(0, 10, count, dtype=np.uint8)
    for file, array in arrays.items():
        contents = idx_bytes(array)
        path = raw / (f"{file}.gz" if gz else file)
        path.write_bytes(gzip.compress(contents) if gz else contents)
    return arrays


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_idx_images(name: str, gz: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arrays = write_idx_set(tmp_path, name, gz)
    monkeypatch.setenv("OTLOSS_DATA", str(tmp_path))
    images = data.load(name)
    assert images.shape == (1, 28, 28)
    for split, (image_file, label_file) in data.IDX_FILES.items():
        stored = getattr(images, split)
        assert np.array_equal(stored[:, 0].numpy(), arrays[image_file])
        assert np.array_equal(getattr(images, f"{split}_labels").numpy(), arrays[label_file])
    assert len(images.limited(2).train) == 2
    assert len(images.limited(2).test) == 3


@pytest.mark.parametrize(
    "spoil", [lambda raw: b"GIF8" + raw[4:], lambda raw: raw[:-1], lambda raw: b"\0"]
)
def test_spoilt_idx_is_named(spoil: Callable[[bytes], bytes], tmp_path: Path):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(spoil(idx_bytes(np.zeros((2, 3, 3), np.uint8))))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte .* expected"):
        data.read_idx(path)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_folders_and_archive(packed: bool, tmp_path: Path):
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("fashion", "FashionMNIST/raw/t10k-labels-idx1-ubyte"),
        ("cifar10", "cifar10-jpeg/cifar10-jpeg.tar.xz"),
    ],
)
def test_missing_images_say_what_is_expected(name: str, expected: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError) as caught:
        train_sinkhorn.main(["--data", name, "--data-dir", str(tmp_path)])
    message = str(caught.value)
    assert expected in message
    assert f"--data-dir is {tmp_path}" in message


def test_auto_takes_digits_only_when_no_folder_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
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
    measurements, species = data.load_iris()
    assert measurements.shape == (150, 4)
    assert species.bincount().tolist() == [50, 50, 50]
    with pytest.raises(ValueError, match="data is 'imagenet', expected one of digits"):
        data.load("imagenet")


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
        costs = torch.cdist(x.flatten(1).double(), y.flatten(1).double()).square().numpy()
        return costs[linear_sum_assignment(costs)].mean() / 2

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
