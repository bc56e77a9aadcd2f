"""The emulated CUDA backend: csrc/bindings.cpp and csrc/cuda compiled by g++ under
tests/cuda_host/emulation.h, serving the operations on CPU tensors while it is enabled."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pybind11
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests/cuda_host/emulated.cpp"


def build(*macros: str) -> Path:
    """The module for these macros, compiled again only if a source or the command changed."""
    system = [pybind11.get_include(), *include_paths(), sysconfig.get_path("include")]
    command = ["g++", "-O1", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall"]
    command += ["-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # Barriers jump between stacks, which the checked longjmp of fortified builds refuses.
    command += ["-U_FORTIFY_SOURCE", "-DOTLOSS_WITH_CUDA", "-DOTLOSS_EMULATED"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DOTLOSS_SOLVE_THREADS=128", *macros]
    # Not csrc/cuda: its limits.h would stand in for the C library's.
    command += [f"-I{ROOT / 'csrc'}", f"-I{SOURCE.parent}", *(f"-isystem{p}" for p in system)]
    torch_libraries = Path(torch.__file__).parent / "lib"
    command += [str(SOURCE), f"-L{torch_libraries}", "-ltorch_cpu"]
    digest = hashlib.sha256(" ".join([*command, torch.__version__]).encode()).hexdigest()[:12]
    # pybind11 takes two modules of one name for the same one.
    command += [f"-DOTLOSS_MODULE=emulated_{digest}"]
    target = ROOT / f"build/emulated/emulated_{digest}.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    files = [p for folder in ("csrc", "tests/cuda_host") for p in (ROOT / folder).rglob("*.*")]
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several pytest workers, one compiles
        newest = max(p.stat().st_mtime for p in files)
        if not target.exists() or target.stat().st_mtime < newest:
            unfinished = target.with_suffix(".part")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            os.replace(unfinished, target)
    return target


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def serving(module: ModuleType, **device: int) -> Iterator[ModuleType]:
    """Within: the operations on CPU tensors run on an emulated GPU."""
    module.configure(**device)
    module.enable()
    try:
        yield module
    finally:
        module.disable()
