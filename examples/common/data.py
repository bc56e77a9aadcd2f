"""Images and small tables for the training scripts, read from disk. Nothing is ever downloaded.

Layouts (``root`` is ``--data-dir``; each IDX file may also be gzipped, as ``.gz``)::

    root/MNIST/raw/train-images-idx3-ubyte ...                    MNIST, as torchvision keeps it
    root/FashionMNIST/raw/train-images-idx3-ubyte ...             FashionMNIST, likewise
    root/cifar-10-batches-bin/{data_batch_1..5,test_batch}.bin    CIFAR-10, its binary version, or
    root/cifar10-jpeg/{train,test}/<class>/*.jpg                  as JPEG files, or
    root/cifar10-jpeg/cifar10-jpeg.tar.xz                         the same folders in one archive

``digits`` (1797 images of 8x8 pixels) come with scikit-learn and need no folder.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from common import UsageError, replacing

NAMES = ("digits", "mnist", "fashion", "cifar10")
BUNDLED = ("digits", "gaussians")  # the second is drawn, not read
IDX_FOLDERS = {"mnist": "MNIST", "fashion": "FashionMNIST"}
SOURCES = {
    "mnist": "https://yann.lecun.com/exdb/mnist",
    "fashion": "https://github.com/zalandoresearch/fashion-mnist",
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html",
}
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
DIGITS_TEST = 500


class ImageData(NamedTuple):
    """Images with labels, split into train and test. Bytes, because floats take four times more."""

    name: str
    train: Tensor  # (N, C, H, W) uint8
    train_labels: Tensor  # (N,) int64
    test: Tensor  # (M, C, H, W) uint8
    test_labels: Tensor  # (M,) int64

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> ImageData:
        """These images on ``device``."""
        return ImageData(self.name, *(tensor.to(device) for tensor in self[1:]))

    def only(self, labels: Sequence[int]) -> ImageData:
        """The images of these classes, in both splits."""
        present = self.train_labels.unique().tolist()
        if missing := sorted(set(labels) - set(present)):
            raise UsageError(f"--labels has {missing}, expected classes of {self.name}: {present}")
        wanted = torch.tensor(labels)
        train, test = (torch.isin(of, wanted) for of in (self.train_labels, self.test_labels))
        of_train = self.train[train], self.train_labels[train]
        return ImageData(self.name, *of_train, self.test[test], self.test_labels[test])


def to_float(images: Tensor) -> Tensor:
    """Bytes 0..255 to floats in [-1, 1], the range of the generators' tanh."""
    return images.float().div_(127.5).sub_(1.0)


def to_bytes(images: Tensor) -> Tensor:
    """The inverse, on the CPU."""
    return images.detach().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def default_dir() -> Path | None:
    """The folder that ``$OTLOSS_DATA`` names, if it is set."""
    return Path(os.environ["OTLOSS_DATA"]) if os.environ.get("OTLOSS_DATA") else None


def available(name: str, root: Path | None) -> bool:
    """Whether ``load(name, root)`` would find its files."""
    return name == "digits" or (root is not None and bool(_files(name, root)))


def load(name: str, root: Path | str | None = None) -> ImageData:
    """Read the data set called ``name`` from under ``root`` (default: :func:`default_dir`)."""
    if name not in NAMES:
        raise ValueError(f"data is {name!r}, expected one of {', '.join(NAMES)}")
    if name == "digits":
        return _load_digits()
    base = Path(root) if root is not None else default_dir()
    files = _files(name, base) if base is not None else []
    if base is None or not files:
        raise FileNotFoundError(_missing(name, base))
    return _load_cifar10(files, base) if name == "cifar10" else _load_idx(name, files)


class Batches:
    """Shuffled minibatches as a pure function of the step.

    ``batches(step)`` is row indices of batch ``step``; each epoch is a new permutation and its
    incomplete last batch is dropped. Since nothing but the step number decides, a resumed run
    sees exactly the batches that an uninterrupted one would have seen.
    """

    def __init__(self, n: int, batch: int, seed: int) -> None:
        if not 1 <= batch <= n:
            raise UsageError(f"--batch is {batch}, expected 1..{n}, the number of training images")
        self.n, self.batch, self.seed = n, batch, seed
        self.per_epoch = n // batch
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int) -> Tensor:
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
        return self._order[i * self.batch : (i + 1) * self.batch]


def _files(name: str, root: Path) -> list[Path]:
    """What there is of a data set: four IDX files, or one of the forms of CIFAR-10."""
    if name != "cifar10":
        raw = root / IDX_FOLDERS[name] / "raw"
        names = [file for split in IDX_FILES.values() for file in split]
        found = [[p for p in (raw / f, raw / f"{f}.gz") if p.is_file()][:1] for f in names]
        return [path for paths in found for path in paths] if all(found) else []
    folder = root / "cifar10-jpeg"
    binary = [root / CIFAR_FOLDER / file for files in CIFAR_FILES.values() for file in files]
    jpegs = [folder / split for split in CIFAR_FILES]
    forms = [[_cache(root)], binary, jpegs, [folder / "cifar10-jpeg.tar.xz"]]
    return next((form for form in forms if all(path.exists() for path in form)), [])


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes (plain, or gzipped when the name ends in ``.gz``)."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} begins with {raw[:4]!r}, expected an IDX file of unsigned bytes")
    header = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, header, 4)]
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(raw) != expected:
        raise ValueError(f"{path} has {len(raw)} bytes, expected {expected} for shape {shape}")
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).reshape(shape)


def _load_idx(name: str, files: Sequence[Path]) -> ImageData:
    splits = []
    for path, of_labels in zip(files[::2], files[1::2], strict=True):
        images, labels = read_idx(path), read_idx(of_labels)
        if images.dim() != 3 or labels.shape != images.shape[:1]:
            shapes = f"{tuple(images.shape)} with labels {tuple(labels.shape)}"
            raise ValueError(f"{path} has shape {shapes}, expected (N, H, W) with labels (N,)")
        splits += [images.unsqueeze(1), labels.long()]
    return ImageData(name, *splits)


def _load_digits() -> ImageData:
    table = load_digits()
    images = torch.from_numpy(np.rint(table.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(table.target).long()
    # The file groups writers, so a plain head/tail split would test on other hands.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    return ImageData("digits", images[train], labels[train], images[test], labels[test])


def _load_cifar10(files: Sequence[Path], root: Path) -> ImageData:
    if files[0].suffix == ".pt":
        return ImageData("cifar10", *torch.load(files[0], weights_only=True))
    if files[0].suffix == ".bin":
        return ImageData("cifar10", *_cifar_records(files[:-1]), *_cifar_records(files[-1:]))
    cache = _cache(root)
    print(f"cifar10: decoding the images in {files[0]}, once; kept as {cache}", flush=True)
    images = _cifar_jpegs(files)
    with suppress(OSError):  # without a cache they are decoded again the next time
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as part:
            torch.save(list(images[1:]), part)
    return images


def _cifar_records(paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Images and labels of binary files: records of a label and 3072 bytes of colour planes."""
    records = np.concatenate([np.fromfile(path, np.uint8) for path in paths])
    if len(records) == 0 or len(records) % 3073:
        raise ValueError(f"{paths[0].parent} has {len(records)} bytes, expected a multiple of 3073")
    table = torch.from_numpy(records).reshape(-1, 3073)
    return table[:, 1:].reshape(-1, 3, 32, 32).contiguous(), table[:, 0].long()


def _cifar_jpegs(files: Sequence[Path]) -> ImageData:
    found: dict[str, list[tuple[str, str, np.ndarray]]] = {split: [] for split in CIFAR_FILES}
    for name, contents in _jpegs(files):
        split, label, file = name.split("/")
        pixels = np.asarray(Image.open(io.BytesIO(contents)).convert("RGB"))
        found[split].append((label, file, pixels))
    if not all(found.values()):
        raise FileNotFoundError(f"{files[0]} holds {len(found['train'])} training images")
    classes = sorted({label for label, *_ in found["train"]})
    splits = []
    for images in found.values():
        images.sort(key=lambda image: image[:2])
        # In a fixed shuffle: folders come class by class, a head of the images must not.
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        pixels = torch.from_numpy(np.stack([image[2] for image in images])).permute(0, 3, 1, 2)
        labels = torch.tensor([classes.index(label) for label, *_ in images])
        splits += [pixels[order].contiguous(), labels[order]]
    return ImageData("cifar10", *splits)


def _jpegs(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Pairs (``split/class/file.jpg``, contents) from the two folders or from the archive."""
    if files[0].is_dir():
        paths = (path for folder in files for path in folder.glob("*/*.jpg"))
        yield from (("/".join(path.parts[-3:]), path.read_bytes()) for path in paths)
        return
    with tarfile.open(files[0], "r|xz") as archive:
        for member in archive:
            if member.name.endswith(".jpg") and (contents := archive.extractfile(member)):
                yield "/".join(Path(member.name).parts[-3:]), contents.read()


def _cache(root: Path) -> Path:
    """Where the decoded images are kept, since decoding takes most of a minute."""
    key = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return home / "otloss" / f"cifar10-{key}.pt"


def _missing(name: str, root: Path | None) -> str:
    if name == "cifar10":
        files = [f"{CIFAR_FOLDER}/{{data_batch_1..5,test_batch}}.bin, or"]
        files += ["cifar10-jpeg/{train,test}/<class>/*.jpg, or", "cifar10-jpeg/cifar10-jpeg.tar.xz"]
    else:
        names = (file for split in IDX_FILES.values() for file in split)
        files = [f"{IDX_FOLDERS[name]}/raw/{file}[.gz]" for file in names]
    where = f"is {root}" if root is not None else "is not given and $OTLOSS_DATA is not set"
    listing = "\n  ".join(files)
    return (
        f"data {name!r}: --data-dir {where}, expected a folder that holds\n  {listing}\n"
        f"Nothing is downloaded. It can be had from {SOURCES[name]}; --data digits needs no files."
    )
