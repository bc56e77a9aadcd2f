"""The code of the GPU check and its benchmarks, on the CPU and on small clouds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_check  # noqa: E402


def test_gpu_benchmarks_run_on_small_clouds(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu"]
    options = ["--only", "graph,batch", "--seconds", "240", "--out", str(out)]
    subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True)
    rows = [row for row in json.loads(out.read_text())["rows"] if "otloss" in row["library"]]
    assert {row["benchmark"] for row in rows} == {"graph", "batch"}
    assert all(row["ms"] > 0 for row in rows), rows


def test_the_gpu_check_kills_what_takes_too_long(capfd):
    report = gpu_check.Report(600)
    fast, slow = [sys.executable, "-c", "print('done')"], ["sh", "-c", "sleep 60 & wait"]
    assert report.run("fast", fast)
    assert not report.run_together({"fast": fast, "slow": slow}, limit=2)
    assert report.failed == ["slow"]
    output = capfd.readouterr().out
    assert output.count("done") == 2
    assert "slow: FAILED, stopped after 2 s" in output
