"""Everything that needs a GPU, in one command: ``python -m benchmarks.gpu_check``.

Builds the CUDA kernels in place (no downloads; torch, pybind11, setuptools, pytest and nvcc must be
there) for the GPU that is there, reports their registers and spills, and runs their tests,
compute-sanitizer and the benchmarks, whose results go to ``benchmarks/results/<device>/``. Every
step has a time limit, since a kernel that waits for ever cannot be interrupted from outside.

Without a GPU it builds for all architectures, runs the tests of the CUDA engine on the host, says
what it skipped and succeeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from math import inf
from pathlib import Path
from tempfile import TemporaryFile

ROOT = Path(__file__).resolve().parents[1]

# A few small solves and gradients in every regime, tensor cores among them, for tools that slow
# the program down a hundredfold.
SANITIZED = (
    "(test_sizes and (1-1 or 7-300 or 64-64))"
    " or test_small_eps"
    " or (test_unrolled_and_implicit_gradients and 7-300 and 0.7 and dtype0)"
    " or (test_autocast and streamed-64-dtype0)"
    " or (test_streamed_gradients_of_many_passes and 7-300 and 0.7 and dtype0)"
)
MOST_TEST_SECONDS, MOST_SANITIZER_SECONDS = 180, 90
SECONDS_OF_OTHERS = 45  # what the benchmarks after those against other libraries take
LEAST_SECONDS = 30  # that a step gets, however late it is
SECONDS_TO_END = 5  # for a program that is interrupted
PEERS = {
    "ot": "POT",
    "geomloss": "GeomLoss",
    "pykeops": "KeOps",
    "flash_sinkhorn": "FlashSinkhorn",
}


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """The process and its children; nothing if it has ended. An interrupt comes first: pytest then
    tells what failed so far."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_END)


class Report:
    """Runs commands, each with a limit within the time that is left, and tells what failed."""

    def __init__(self, seconds: float) -> None:
        self.failed: list[str] = []
        self.skipped: list[str] = []
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return max(LEAST_SECONDS, self.end - time.monotonic())

    def run(self, title: str, command: list[str], limit: float = inf, **environment: str) -> bool:
        return self.run_together({title: command}, limit, **environment)

    def run_together(
        self, commands: dict[str, list[str]], limit: float = inf, **environment: str
    ) -> bool:
        """At the same time; the output of several is shown one after the other."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        variables = {**os.environ, "PYTHONPATH": path, **environment}
        print(f"== {', '.join(commands)}", flush=True)
        start, limit, passed = time.perf_counter(), min(limit, self.left()), True
        with ExitStack() as files:
            running = {}
            for title, command in commands.items():
                output = files.enter_context(TemporaryFile()) if len(commands) > 1 else None
                started = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=variables,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # killed with all that it has started
                )
                files.callback(kill_group, started)
                running[title] = (started, output)
            for title, (process, output) in running.items():
                try:
                    code = process.wait(limit - (time.perf_counter() - start))
                    outcome = "ok" if code == 0 else f"FAILED ({code})"
                except subprocess.TimeoutExpired:
                    kill_group(process)
                    outcome = f"FAILED, stopped after {limit:.0f} s"
                if output is not None:
                    output.seek(0)
                    print(output.read().decode(errors="replace"), flush=True)
                print(f"   {title}: {outcome}, {time.perf_counter() - start:.0f} s", flush=True)
                if outcome != "ok":
                    self.failed.append(title)
                    passed = False
        return passed

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


def architecture() -> str | None:
    """What nvcc calls the GPU's architecture."""
    script = "import torch; print(*torch.cuda.get_device_capability(), sep='')"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    capability = result.stdout.strip()
    return f"{capability}a" if capability == "90" else capability or None


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
    parser.add_argument("--seconds", type=float, default=480, help="for everything on a GPU")
    options = parser.parse_args()
    name = gpu_name()
    report = Report(options.seconds if name else inf)
    # A test that takes a minute shows where it is.
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    pytest += ["--tb=short", "-o", "faulthandler_timeout=60"]

    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    target = os.environ.get("OTLOSS_CUDA_ARCH") or (architecture() if name else None)
    chosen = {"OTLOSS_CUDA_ARCH": target} if target else {}
    if not options.no_build and not report.run("build", build, **chosen):
        return report.finish()
    for library in (ROOT / "otloss").glob("_C*.so"):
        resources(library)
    if name is None:
        report.run("CUDA engine on the host", [*pytest, "tests/test_emulated.py"])
        why = "torch sees no GPU here"
        for what in ("CUDA tests", "compute-sanitizer", "CUDA benchmarks"):
            report.skip(what, why)
        return report.finish()

    print(f"== GPU: {name}")
    # Without nvcc the build leaves them out, and every test of them would be skipped.
    built = "from otloss import ops; assert ops.CUDA_KERNELS, 'otloss was built without them'"
    if not report.run("CUDA kernels", [sys.executable, "-c", built]):
        return report.finish()
    report.run("CUDA tests", [*pytest, "tests/test_cuda.py"], MOST_TEST_SECONDS)
    sanitizer = find_tool("compute-sanitizer")
    if options.no_sanitizer or sanitizer is None:
        why = "--no-sanitizer" if options.no_sanitizer else "compute-sanitizer was not found"
        report.skip("compute-sanitizer", why)
    else:
        # Caching in torch's allocator would hide a read past the end of a tensor. (Without it there
        # is no graph capture.)
        tests = ["tests/test_cuda.py", "-k", SANITIZED]
        checked = {
            f"compute-sanitizer {tool}": [
                *(sanitizer, "--tool", tool, "--error-exitcode", "9", *pytest, "-x", *tests)
            ]
            for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
        }
        report.run_together(checked, MOST_SANITIZER_SECONDS, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if options.no_benchmarks:
        report.skip("CUDA benchmarks", "--no-benchmarks")
        return report.finish()
    for module, peer in PEERS.items():
        if importlib.util.find_spec(module) is None:
            report.skip(f"benchmark against {peer}", "it is not installed")
    folder = ROOT / "benchmarks/results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    against = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder / "gpu.json")]
    seconds = max(LEAST_SECONDS, report.left() - SECONDS_OF_OTHERS)
    report.run("benchmarks against other libraries", [*against, "--seconds", f"{seconds:.0f}"])
    iteration = [sys.executable, "-m", "benchmarks.run", "iteration", "--device", "cuda"]
    report.run("benchmark iteration", [*iteration, "--no-plot"])
    gradients = [sys.executable, "-m", "benchmarks.gradient_modes", "--device", "cuda"]
    report.run("gradients against iterations", gradients)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
