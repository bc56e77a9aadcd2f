"""Everything that needs a GPU, in one command: ``python -m benchmarks.gpu_check``.

Builds the CUDA kernels in place (no downloads; torch, pybind11, setuptools, pytest and nvcc must be
there), reports their registers and spills, runs the host tests of the CUDA engine, and on a GPU its
tests, compute-sanitizer and the benchmarks, whose results go to ``benchmarks/results/<device>/``.

Without a GPU it builds, runs what can run, says what it skipped and succeeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# A few small solves in every regime, for tools that slow the program down a hundredfold.
SANITIZED = "test_sizes or test_small_eps or test_graph_capture"
SANITIZED_SIZES = "1-1 or 7-300 or 64-64"
PEERS = {
    "ot": "POT",
    "geomloss": "GeomLoss",
    "pykeops": "KeOps",
    "flash_sinkhorn": "FlashSinkhorn",
}


class Report:
    def __init__(self) -> None:
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def run(self, title: str, command: list[str], **environment: str) -> bool:
        print(f"== {title}", flush=True)
        start = time.perf_counter()
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        code = subprocess.run(command, cwd=ROOT, env=variables).returncode
        print(
            f"   {'ok' if code == 0 else f'FAILED ({code})'}, {time.perf_counter() - start:.0f} s"
        )
        if code != 0:
            self.failed.append(title)
        return code == 0

    def skip(self, what: str, why: str) -> None:
        print(f"== {what}: skipped, {why}", flush=True)
        self.skipped.append(f"{what}: {why}")

    def finish(self) -> int:
        print("\n== summary")
        for what in self.skipped:
            print(f"   skipped  {what}")
        for what in self.failed:
            print(f"   FAILED   {what}")
        if not self.failed:
            print("   everything that could run here passed")
        return len(self.failed)


def gpu_name() -> str | None:
    """The GPU torch uses, asked in a process of its own: this one must not hold the device."""
    script = (
        "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return result.stdout.strip() or None


def find_tool(name: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    on_path = shutil.which(name)
    candidates = [Path(home) / "bin" / name for home in homes if home]
    return on_path or next((str(tool) for tool in candidates if tool.exists()), None)


def resources(library: Path) -> None:
    """Registers, stack and shared memory of each kernel, from the machine code."""
    tool = find_tool("cuobjdump")
    if tool is None:
        print("   cuobjdump was not found: no report of registers")
        return
    command = [tool, "--dump-resource-usage", str(library)]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    pattern = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
    for name, registers, stack, shared in sorted(set(pattern.findall(output))):
        short = name.removeprefix("_ZN6otloss4cuda")[:60]
        print(f"   {short:<60} {registers:>3} registers, stack {stack}, shared {shared}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-benchmarks", action="store_true")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--no-build", action="store_true", help="use the library that is there")
    options = parser.parse_args()
    report = Report()
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if not options.no_build and not report.run("build", build):
        return report.finish()
    for library in (ROOT / "otloss").glob("_C*.so"):
        resources(library)
    report.run("CUDA engine on the host", [*pytest, "tests/test_cuda_host.py"])

    name = gpu_name()
    if name is None:
        why = "torch sees no GPU here"
        for what in ("CUDA tests", "compute-sanitizer", "CUDA benchmarks"):
            report.skip(what, why)
        return report.finish()

    print(f"== GPU: {name}")
    report.run("CUDA tests", [*pytest, "tests/test_cuda.py"])
    sanitizer = find_tool("compute-sanitizer")
    if options.no_sanitizer or sanitizer is None:
        why = "--no-sanitizer" if options.no_sanitizer else "compute-sanitizer was not found"
        report.skip("compute-sanitizer", why)
    else:
        # Caching in torch's allocator would hide a read past the end of a tensor.
        tests = ["tests/test_cuda.py", "-k", f"({SANITIZED}) and ({SANITIZED_SIZES} or not sizes)"]
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
            checked = [sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, "-x", *tests]
            report.run(f"compute-sanitizer {tool}", checked, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if options.no_benchmarks:
        report.skip("CUDA benchmarks", "--no-benchmarks")
        return report.finish()
    for module, peer in PEERS.items():
        if importlib.util.find_spec(module) is None:
            report.skip(f"benchmark against {peer}", "it is not installed")
    gradients = [sys.executable, "-m", "benchmarks.gradient_modes", "--device", "cuda"]
    report.run("gradients against iterations", gradients)
    iteration = [sys.executable, "-m", "benchmarks.run", "iteration", "--device", "cuda"]
    report.run("benchmark iteration", [*iteration, "--no-plot"])
    folder = ROOT / "benchmarks/results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    against = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder / "gpu.json")]
    report.run("benchmarks against other libraries", against)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
