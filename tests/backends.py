"""What serves otloss's operations in a test: plain torch, the CPU kernels, the CUDA kernels run on
the host under tests/cuda_host/emulation.h, or a GPU.

The emulated kernels are a Python module of csrc/cuda and the bindings, compiled by g++ at first use
and kept in OTLOSS_CACHE (default ~/.cache/otloss). While it is enabled, it serves the operations on
CPU tensors in place of the CPU kernels.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from otloss import ops

ROOT = Path(__file__).parent.parent
EMULATION = ROOT / "tests/cuda_host"
SOURCES = [EMULATION / "emulated.cpp", ROOT / "csrc/bindings/operations.cpp"]
SOURCES += [
    path for end in ("cu", "cpp") for path in sorted((ROOT / "csrc/cuda").rglob(f"*.{end}"))
]
INCLUDED = [ROOT / "csrc", EMULATION]
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
# Barriers jump between stacks, which the checked longjmp of fortified builds refuses.
FLAGS += ["-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
MACROS = {
    "OTLOSS_WITH_CUDA": "",
    "OTLOSS_EMULATED": "",
    "OTLOSS_SOLVE_THREADS": "128",
    "TORCH_TARGET_VERSION": "0x020a000000000000",
}


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(build: ModuleType, source: Path, macros: dict[str, str]) -> Path:
    """The object of a source, from the build's cache if it is there."""
    import pybind11
    from torch.utils.cpp_extension import include_paths

    system = [pybind11.get_include(), *include_paths(), sysconfig.get_path("include")]
    command = ["g++", *FLAGS, *(f"-I{path}" for path in INCLUDED)]
    command += [f"-isystem{path}" for path in system]
    command += ["-x", "c++", "-c", str(source)]
    job = build.Compilation(source, command, torch.__version__)
    text = "".join(path.read_text() for path in job.files())
    given = [f"-D{k}={v}" for k, v in macros.items() if k in text]
    job = job._replace(command=[*command, *given])
    target: Path = job.object()
    if not target.exists():
        unfinished = target.with_suffix(".part")
        subprocess.run([*job.command, "-o", str(unfinished)], check=True)
        unfinished.replace(target)
    return target


def emulated(**macros: str) -> ModuleType:
    """The module for these macros. What cannot be compiled is not tried again by each test."""
    found = _loaded(**macros)
    if isinstance(found, Exception):
        raise found
    return found


@functools.cache
def _loaded(**macros: str) -> ModuleType | subprocess.CalledProcessError:
    try:
        return _load(**macros)
    except subprocess.CalledProcessError as error:
        return error


def _load(**macros: str) -> ModuleType:
    """Of several workers that need it, one compiles."""
    build = load("otloss_setup", ROOT / "setup.py")
    folder = build.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    # pybind11 takes two modules of one name for the same one.
    name = "_".join(["emulated", *(f"{k}_{v}" for k, v in sorted(macros.items()))])
    macros = {**MACROS, **macros, "OTLOSS_MODULE": name}
    with (folder / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: compiled(build, source, macros), SOURCES))
        names = hashlib.sha256(repr(objects).encode()).hexdigest()
        library = folder / f"{name}-{names[:16]}.o.so"  # *.o*: removed when it is old
        if not library.exists():
            unfinished = library.with_suffix(".part")
            torch_libraries = f"-L{Path(torch.__file__).parent / 'lib'}"
            link = ["g++", "-shared", *map(str, objects), torch_libraries, "-ltorch_cpu"]
            subprocess.run([*link, "-o", str(unfinished)], check=True)
            unfinished.replace(library)
    return load(name, library)


@contextmanager
def serving(module: ModuleType, **device: int) -> Iterator[ModuleType]:
    """Within: operations on CPU tensors run on an emulated GPU, and at least one kernel must."""
    module.configure(**device)
    module.enable()
    before = module.launches()
    try:
        yield module
    finally:
        module.disable()
    assert module.launches() > before, "no emulated kernel ran"


# ----------------------------------------------------------------------- as a parameter of a test


@dataclass(frozen=True)
class Backend:
    """One way to solve: ``method=`` on tensors of a device."""

    name: str

    @property
    def method(self) -> str:
        return self.name.rpartition("-")[2]

    @property
    def device(self) -> str:
        return "cuda" if self.name.startswith("cuda") else "cpu"

    @property
    def emulated(self) -> bool:
        return self.name.startswith("emulated")

    def __str__(self) -> str:
        return self.name


HAS_GPU = torch.cuda.is_available() and ops.CUDA_KERNELS
HAS_COMPILER = shutil.which("g++") is not None
CPU = ["dense", "streamed", "reference"]
GPU = ["cuda-dense", "cuda-streamed"] if HAS_GPU else []
EMULATED = ["emulated-dense", "emulated-streamed"] if HAS_COMPILER else []
BACKENDS = [*CPU, *GPU]  # of the quick tests: the emulated ones are slow


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Of a parameter that is its name."""
    chosen = Backend(request.param)
    if not chosen.emulated:
        yield chosen
        return
    with serving(emulated()):
        yield chosen
