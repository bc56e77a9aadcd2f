"""The GPU benchmarks' code, on the CPU and on small clouds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_gpu_benchmarks_run_on_small_clouds(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu"]
    options = ["--only", "graph,batch", "--seconds", "240", "--out", str(out)]
    subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True)
    rows = [row for row in json.loads(out.read_text())["rows"] if "otloss" in row["library"]]
    assert {row["benchmark"] for row in rows} == {"graph", "batch"}
    assert all(row["ms"] > 0 for row in rows), rows
