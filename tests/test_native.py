"""The driver of the CPU kernels without torch, for `make sanitize`, follows their launchers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_driver_compiles():
    flags = ["-fsyntax-only", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    driver = str(ROOT / "tests/native/driver.cpp")
    done = subprocess.run(["g++", *flags, driver], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
