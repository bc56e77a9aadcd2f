"""The tests that matter most in clean environments: versions of Python times versions of torch.

    python tests/matrix.py --python python3.10 python3.13 --torch torch==2.10.0 torch

Each cell is an environment of its own in build/matrix, made as a user makes it: torch from where
pip finds it, then `pip install` of a copy of this checkout, whose tests run with what was
installed. It is removed when its row stands in benchmarks/results/matrix.json, where it replaces an
older row of the cell, and in the table of docs/testing.md.

From the public index torch for Linux brings CUDA libraries: 8 GB of disk for as long as a cell
runs. With `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu` and torch==2.10.0+cpu it is
one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/matrix"
RESULTS, DOCS = ROOT / "benchmarks/results/matrix.json", ROOT / "docs/testing.md"
FILES = ("parity", "gradients", "kernels", "compile", "errors", "results")
COLUMNS = ("python", "torch", "inductor", "passed", "failed", "skipped", "date")
ABOUT = "import sys, torch; print('%d.%d.%d' % sys.version_info[:3], torch.__version__)"
# test_compile.py traces without generating code; here a loss goes through all of torch.compile.
INDUCTOR = """
import torch, otloss
loss = torch.compile(lambda x, y: otloss.sinkhorn_divergence(x.tanh(), y, 0.5), fullgraph=True)
x, y = torch.randn(40, 3, requires_grad=True), torch.randn(30, 3)
got, right = loss(x, y), otloss.sinkhorn_divergence(x.tanh(), y, 0.5)
torch.testing.assert_close(got, right)
torch.testing.assert_close(*(torch.autograd.grad(t, x) for t in (got, right)))
"""
Row = dict[str, str | int]


class Cell:
    """An environment, and a copy of what git tracks of this checkout, as it is now."""

    def __init__(self, python: str, torch: str) -> None:
        name = re.sub(r"[^\w.]+", "-", f"{python}-{torch}").strip("-")
        self.base, self.torch = python, torch
        self.folder, self.log = FOLDER / name, FOLDER / f"{name}.log"
        self.source, self.python = self.folder / "source", str(self.folder / "venv/bin/python")

    def make(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([self.base, "-m", "venv", self.folder / "venv"], check=True)
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True)
        for path in tracked.stdout.decode().splitlines():
            (self.source / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, self.source / path)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        own = {"OTLOSS_BUILD_CUDA": "0", "PIP_CACHE_DIR": str(FOLDER / "cache")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command, environment = [self.python, *arguments], {**os.environ, **own}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(command, cwd=self.source, env=environment, **pipes)
        with self.log.open("a") as file:
            file.write(f"$ {' '.join(arguments)}\n{done.stdout}\n")
        return done

    def install(self, *requirements: str) -> None:
        if self.run("-m", "pip", "-q", "install", "--no-compile", *requirements).returncode:
            raise RuntimeError(f"pip install {' '.join(requirements)} failed: {self.log}")

    def row(self) -> Row:
        self.make()
        self.install("--upgrade", "pip")
        self.install(self.torch)
        self.install("setuptools>=77", "wheel", "pybind11>=2.12", "ninja", "numpy")
        self.install("--no-build-isolation", ".[test]")
        shutil.rmtree(self.source / "otloss")  # so that what was installed is imported
        version = self.run("-c", ABOUT).stdout.split()
        inductor = self.run("-c", INDUCTOR)
        files = [f"tests/test_{name}.py" for name in FILES]
        tests = self.run("-m", "pytest", "-m", "not slow", "-n", "2", *files)
        found = re.findall(r"(\d+) (passed|failed|skipped|error)", tests.stdout)
        counts = {name: int(number) for number, name in found}
        return {
            **dict(zip(COLUMNS, version, strict=False)),
            "inductor": "failed" if inductor.returncode else "passed",
            "passed": counts.get("passed", 0),
            "failed": counts.get("failed", 0) + counts.get("error", 0),
            "skipped": counts.get("skipped", 0),
            "date": str(datetime.date.today()),
        }


def write(row: Row) -> None:
    def key(row: Row) -> list[tuple[int, ...]]:
        return [tuple(map(int, re.findall(r"\d+", str(row[c])))) for c in ("torch", "python")]

    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = sorted([row, *(other for other in kept if key(other) != key(row))], key=key)
    RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([row[c] for c in COLUMNS] for row in rows)]
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    before, after = DOCS.read_text().split(f"| {' | '.join(COLUMNS)} |", 1)
    DOCS.write_text(before + table + "\n\n" + after.split("\n\n", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=["python3"], help="commands")
    parser.add_argument("--torch", nargs="+", default=["torch"], help="as pip spells it")
    given = parser.parse_args()
    bad = 0
    for torch in given.torch:
        for python in given.python:
            cell = Cell(python, torch)
            try:
                row = cell.row()
                write(row)
                print(*(f"{name} {value}" for name, value in row.items()), flush=True)
                bad += bool(row["failed"]) or row["inductor"] == "failed" or not row["passed"]
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                print(python, torch, error, flush=True)
                bad += 1
            finally:
                shutil.rmtree(cell.folder, ignore_errors=True)
        shutil.rmtree(FOLDER / "cache", ignore_errors=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
