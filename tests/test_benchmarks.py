"""The code of the GPU check and its benchmarks, on the CPU and on small clouds."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

import otloss

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_check, peers, steps  # noqa: E402
from benchmarks.suites import Context, iteration  # noqa: E402


def test_gpu_benchmarks_run_on_small_clouds(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu"]
    options = ["--only", "graph,batch", "--seconds", "240", "--out", str(out)]
    subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True)
    rows = [row for row in json.loads(out.read_text())["rows"] if "otloss" in row["library"]]
    assert {row["benchmark"] for row in rows} == {"graph", "batch"}
    assert all(row["ms"] > 0 for row in rows), rows


def process_exists(pid: str) -> bool:
    return Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()


def test_steps_end_with_all_that_they_started(tmp_path: Path) -> None:
    """Within their time or not, deaf to interrupts or not; and only what ran has passed."""
    deaf = "trap '' INT; sleep 300 & echo $!; wait"
    scripts = {"fast": "sleep 300 & echo $!", "slow": deaf, "silent": "true", "late": "echo 1"}
    wanted = [
        steps.Step(name, ["sh", "-c", script], limit=2, proof=r"\d")
        for name, script in scripts.items()
    ]
    logs = tmp_path / "logs"
    results = steps.run(wanted[:3], time.monotonic() + 60, logs, together=3)
    results += steps.run(wanted[3:], time.monotonic() + 4, logs)
    status = {result.name: result.status for result in results}
    expected = {"fast": "passed", "slow": "stopped", "silent": "failed", "late": "not started"}
    assert status == expected
    for name in ("fast", "slow"):
        assert not process_exists((logs / f"{name}.log").read_text().strip())


def test_a_gpu_check_is_rehearsed(tmp_path: Path, monkeypatch, capsys) -> None:
    """Rows of tests that pass, fail, are all skipped and hang: the summary tells each."""
    bodies = {
        "good": "pass",
        "bad": "assert False, 'reason'",
        "skipped": "__import__('pytest').skip()",
        "hanging": "__import__('time').sleep(300)",
    }
    rows = {}
    for name, body in bodies.items():
        path = tmp_path / f"test_{name}.py"
        path.write_text(f"def test_it():\n    {body}\n")
        rows[name] = [str(path), "--rootdir", str(tmp_path)]
    monkeypatch.setattr(gpu_check, "EMULATED_TESTS", rows)
    monkeypatch.setattr(gpu_check, "BUILD", tmp_path)
    options = argparse.Namespace(rehearse=True, together=4)
    check = gpu_check.Check("checks", 15, "no GPU", tmp_path / "out")
    assert gpu_check.checks(check, options) == 1
    summary = json.loads((tmp_path / "out" / "checks.json").read_text())
    status = {step["name"]: step["status"] for step in summary["steps"]}
    assert status == {"good": "passed", "bad": "failed", "skipped": "failed", "hanging": "stopped"}
    assert not summary["passed"]
    assert summary["seconds"] < 20
    assert "AssertionError: reason" in (tmp_path / "out" / "checks.log").read_text()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("gpu_check checks: FAILED: ")
    assert "hanging (stopped)" in last
    assert "; 1 of 4 steps, " in last


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("command", ["checks", "bench"])
def test_a_gpu_check_without_a_gpu_says_so(command: str) -> None:
    run = [sys.executable, "-m", "benchmarks.gpu_check", command]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.startswith(f"gpu_check {command}: FAILED, torch {torch.__version__} sees no")
    assert done.stdout.count("\n") == 1


def test_every_gpu_test_is_in_one_row() -> None:
    """Collected as on a machine with a GPU."""
    script = """
import sys, pytest, torch
from otloss import ops
torch.cuda.is_available, ops.CUDA_KERNELS = lambda: True, True
from benchmarks.gpu_check import SANITIZED, TESTS
class Names:
    def pytest_collection_finish(self, session):
        found.extend(item.nodeid for item in session.items)
counts = []
of_cuda = ["tests", "--ignore=tests/test_docs.py", "-k", "cuda"]
for arguments in (of_cuda, SANITIZED, *TESTS.values()):
    found = []
    pytest.main(["--collect-only", *arguments], plugins=[Names()])
    counts.append(set(found))
everything, sanitized, *rows = counts
print(*map(len, counts), file=sys.stderr)
assert len(everything) > 100 and all(rows) and len(sanitized) > 30
assert sum(map(len, rows)) == len(set().union(*rows))
left = everything - set().union(*rows)
assert not left, left
"""
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compilers_have_one_name_and_version_on_every_machine(tmp_path: Path, monkeypatch) -> None:
    environments = []
    for version in ("13.0", "13.1"):
        toolkit = tmp_path / version
        (toolkit / "lib64").mkdir(parents=True)
        (toolkit / "lib64" / "libcudart_static.a").touch()
        (toolkit / "bin").mkdir()
        (toolkit / "bin" / "nvcc").write_text(f"#!/bin/sh\necho {version} $*\n")
        (toolkit / "bin" / "nvcc").chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(toolkit))
        monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
        monkeypatch.setattr(gpu_check, "TOOLCHAIN", tmp_path / "toolchain")
        environment = gpu_check.carried_build()
        nvcc = tmp_path / environment["CUDA_HOME"] / "bin/nvcc"
        told = [
            subprocess.check_output([nvcc, *words]) for words in (["--version"], ["-c", "x.cu"])
        ]
        assert told[1] == f"{version} -c x.cu\n".encode()
        assert (nvcc.parents[1] / "lib64" / "libcudart_static.a").exists()
        environments.append((environment, told[0]))
    assert environments[0] == environments[1]


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
