"""The code of the GPU check and its benchmarks, on the CPU and on small clouds."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import otloss

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_check, peers  # noqa: E402
from benchmarks.suites import Context, iteration  # noqa: E402


def test_gpu_benchmarks_run_on_small_clouds(tmp_path):
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


@pytest.fixture
def iteration_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Context:
    """otloss alone, on small random costs."""
    monkeypatch.setattr(iteration, "_cost", lambda n, eps: eps * torch.rand(n, n))
    options = argparse.Namespace(
        iteration_sizes=(20, 30), iteration_eps=(100.0,), repetitions=1, clock="wall"
    )
    usable, _ = peers.load(["otloss"])
    return Context(usable, torch.device("cpu"), options, {}, tmp_path / "iteration.json")


def test_benchmarks_need_no_installed_otloss(monkeypatch, iteration_context):
    """The GPU check builds in place."""

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert iteration_context.peers["otloss"].version() == otloss.__version__


def test_an_iteration_benchmark_that_is_stopped_keeps_what_it_measured(
    monkeypatch, iteration_context
):
    measure = iteration._measure

    def stopped(context: Context, n: int, eps: float) -> dict:
        if n == 30:
            raise KeyboardInterrupt
        return measure(context, n, eps)

    monkeypatch.setattr(iteration, "_measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        iteration.run(iteration_context)
    kept = json.loads(iteration_context.path.read_text())["result"]
    assert [row["n"] for row in kept["rows"]] == [20]
