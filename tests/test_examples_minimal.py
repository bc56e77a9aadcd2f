"""The one-file examples: a few steps of each, a picture, and at most 80 lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import slow_but

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples" / "minimal").glob("*.py"))
NAMES = [script.stem for script in SCRIPTS]


@pytest.mark.parametrize("name", slow_but(NAMES, "sinkhorn_generator"))
def test_it_runs_and_draws(name, tmp_path):
    script = ROOT / "examples" / "minimal" / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 80
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    picture = tmp_path / "picture.png"
    words = [sys.executable, str(script), "--steps", "3", "--out", str(picture)]
    printed = subprocess.check_output(words, text=True, env={**os.environ, "PYTHONPATH": path})
    assert printed.startswith("step 0: ")
    assert picture.stat().st_size > 1000
