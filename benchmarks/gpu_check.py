"""What needs a GPU, for a machine that is lent for minutes and reaches no network.

    python -m benchmarks.gpu_check prepare    # before, on a machine with nvcc and a network
    python -m benchmarks.gpu_check checks     # on the GPU: tests, compute-sanitizer; 3 minutes
    python -m benchmarks.gpu_check bench      # on the GPU: benchmarks; 4 minutes

``prepare`` compiles the CUDA kernels into ``build/cache`` and fetches other libraries and pytest
into ``build/gpu-peers``. Carried along with the checkout, they leave the GPU machine the bindings
to compile and the library to link. Python with a CUDA build of torch, g++ and a CUDA toolkit must
be there.

Each step is a process with a time limit. Logs, ``checks.json`` or ``bench.json`` and results are
in ``$OUT``, else in ``build/gpu-check``. The last line says whether all passed, as the exit status.
``--rehearse`` runs the commands without a GPU, on a few emulated tests and small clouds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import steps
from benchmarks.steps import ROOT, Result, Step

BUILD = ROOT / "build"
CACHE, CARRIED, TOOLCHAIN = BUILD / "cache", BUILD / "gpu-peers", BUILD / "toolchain"
MOST_MIB = 64  # of the checkout with all that is carried
ARCHITECTURES = "80;90a;90-virtual"  # the release list of setup.py

# POT 0.9.7 has 170 MB of something else.
PEERS = ["geomloss", "pot<0.9.7", "pykeops", "keopscore", "flash-sinkhorn"]
# What the tests and the build need, used only where the machine lacks one of them.
TOOLS = ["pytest", "pluggy", "iniconfig", "packaging", "pygments", "hypothesis", "sortedcontainers"]
TOOLS += ["pybind11", "setuptools", "ninja"]
NEEDED_MODULES = ("pytest", "hypothesis", "pybind11", "setuptools", "ninja")
PLATFORMS = ("2_28", "2_27", "2_24", "2_17", "2_12", "2_5")  # of glibc, as pip compares names

# Rows of tests: a name and pytest's arguments, each row a process. On a GPU machine `cuda` is in
# the name of all that runs on the GPU, and a regime stands at the start or after a dash.
KERNEL_TESTS = ["tests/test_cuda.py", "tests/test_regimes.py"]
REGIMES = ("auto", "block", "cluster", "dense", "streamed")
AROUND = ("cuda", "regimes", "examples", "benchmarks", "docs")  # not tests of the library
TESTS = {
    **{name: [*KERNEL_TESTS, "-k", f"cuda and ([{name} or -{name})"] for name in REGIMES},
    "others": [
        *KERNEL_TESTS,
        *("-k", " and ".join(["cuda", *(f"not [{name} and not -{name}" for name in REGIMES)])),
    ],
    "library": ["tests", *(f"--ignore=tests/test_{name}.py" for name in AROUND), "-k", "cuda"],
}
EMULATED_TESTS = {
    regime: ["tests/test_regimes.py", "-k", f"[{regime} and (order or finite)"]
    for regime in ("block", "streamed")
}
# A few small solves and gradients in every regime, tensor cores among them, for tools that slow
# the program down a hundredfold.
SANITIZED = [
    *KERNEL_TESTS,
    "-k",
    "cuda and ((test_sizes and (1-1 or 7-300 or 64-64)) or test_gradients_of_what_is_wanted"
    " or (test_autocast and streamed-64-dtype0))",
]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PASSED = r"\b[1-9]\d* passed"
BUILD_SECONDS, OTHER_BENCHMARKS_SECONDS = 90.0, 45.0


# ------------------------------------------------------------------------------------- prepare


def prepare(options: argparse.Namespace) -> int:
    """Everything that the GPU machine cannot fetch, and what would take it long to compile."""
    shutil.rmtree(CARRIED, ignore_errors=True)
    for folder, packages in (("peers", PEERS), ("tools", TOOLS)):
        print(f"fetching {' '.join(packages)} for Python {options.python}", flush=True)
        subprocess.run(pip(CARRIED / folder, packages, options.python), check=True)
    start = time.time()
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", str(BUILD / "gpu-library")]
    subprocess.run(build, cwd=ROOT, env={**os.environ, **carried_build()}, check=True)
    for path in CACHE.glob("*.o"):
        if path.stat().st_mtime < start - 1:  # setup.py touches those that it uses
            path.unlink()
    mib = {str(path.relative_to(ROOT)): size_mib(path) for path in (CARRIED, CACHE)}
    mib["the checkout"] = checkout_mib()
    text = ", ".join(f"{name} {value:.1f} MiB" for name, value in mib.items())
    if sum(mib.values()) > MOST_MIB:
        print(f"gpu_check prepare: FAILED, {text}, expected at most {MOST_MIB} MiB in all")
        return 1
    print(f"gpu_check prepare: done, {text}; carry build/gpu-peers and build/cache")
    return 0


def pip(target: Path, packages: list[str], python: str) -> list[str]:
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in PLATFORMS]
    return [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"),
        *("--target", str(target), "--python-version", python, "--implementation", "cp"),
        *(*platforms, "--platform=manylinux2014_x86_64", *packages),
    ]


def carried_build() -> dict[str, str]:
    """The environment in which setup.py finds the objects of one machine on another.

    It names an object after the compilers' commands and versions too. Both machines call theirs
    through scripts at the same place that give the same version; nothing else of a kernel's object
    depends on the machine.
    """
    toolkit = cuda_toolkit()
    shutil.rmtree(TOOLCHAIN, ignore_errors=True)
    (TOOLCHAIN / "bin").mkdir(parents=True)
    compilers = {"nvcc": toolkit / "bin/nvcc", "g++": shutil.which("g++")}
    for name, real in compilers.items():
        script = TOOLCHAIN / "bin" / name
        answer = f'[ "$1" = --version ] && exec echo "{name} of any machine"'
        script.write_text(f'#!/bin/sh\n{answer}\nexec "{real}" "$@"\n')
        script.chmod(0o755)
    library = next(toolkit.glob("lib*/libcudart_static.a"))
    (TOOLCHAIN / "lib64").symlink_to(library.parent.resolve())
    relative = TOOLCHAIN.relative_to(ROOT)
    return {
        "OTLOSS_CACHE": str(CACHE),
        "OTLOSS_BUILD_CUDA": "1",
        "OTLOSS_CUDA_ARCH": ARCHITECTURES,
        "CUDA_HOME": str(relative),
        "CXX": str(relative / "bin/g++"),
    }


def cuda_toolkit() -> Path:
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    homes += [str(Path(on_path).resolve().parents[1])] if on_path else []
    for home in filter(None, homes):
        if Path(home, "bin/nvcc").exists() and next(Path(home).glob("lib*/libcudart_static.a"), 0):
            return Path(home)
    sys.exit("gpu_check: FAILED, no CUDA toolkit was found; name it in CUDA_HOME")


def size_mib(path: Path) -> float:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**20


def checkout_mib() -> float:
    """What git tracks or does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = (ROOT / name for name in names.split("\0") if name)
    return sum(path.stat().st_size for path in paths if path.is_file()) / 2**20


# ------------------------------------------------------------------------------ on the GPU machine


class Check:
    """One command on the GPU machine: its time, its folder, its steps and the summary."""

    def __init__(self, name: str, seconds: float, gpu: str, out: Path) -> None:
        self.name, self.gpu, self.out = name, gpu, out
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.results: list[Result] = []
        self.skipped: list[str] = []
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.log").unlink(missing_ok=True)
        print(f"gpu_check {name}: {gpu}, at most {seconds:.0f} s, logs in {out}", flush=True)

    def run(self, *wanted: Step, together: int = 1) -> bool:
        """Whether all passed."""
        # One by one while they run; a machine that is lent may bring back only a few files.
        logs = BUILD / "gpu-check/logs"
        return all(r.passed for r in steps.run(wanted, self.end, logs, together, self.report))

    def report(self, result: Result, log: Path) -> None:
        self.results.append(result)
        print(f"  {result.name:<12} {result.status:<11} {result.seconds:6.1f} s  ", end="")
        print(result.last_line[:120], flush=True)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        if not result.passed:
            print(
                "\n".join(f"    | {line[:200]}" for line in lines[-steps.TAIL_LINES :]), flush=True
            )
        with (self.out / f"{self.name}.log").open("a") as file:
            file.write("\n".join([f"==== {result.name}: {result.command}", *lines, "", ""]))
        self.save()

    def save(self) -> None:
        failed = [result for result in self.results if not result.passed]
        document: dict[str, Any] = {
            "gpu": self.gpu,
            "seconds": round(time.monotonic() - self.start, 1),
            "passed": not failed,
            "skipped": self.skipped,
            "steps": [asdict(result) for result in self.results],
        }
        (self.out / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n")

    def finish(self) -> int:
        self.save()
        failed = [f"{r.name} ({r.status})" for r in self.results if not r.passed]
        skipped = f", skipped {'; '.join(self.skipped)}" if self.skipped else ""
        outcome = f"FAILED: {', '.join(failed)}" if failed else "passed"
        passed = f"{len(self.results) - len(failed)} of {len(self.results)} steps"
        seconds = time.monotonic() - self.start
        print(f"gpu_check {self.name}: {outcome}{skipped}; {passed}, {seconds:.0f} s", flush=True)
        return 1 if failed else 0


def find_gpu() -> tuple[str, str]:
    """The GPU that torch uses ("" for none) and torch's version, asked in a process of its own:
    this one must not hold the device."""
    script = "import torch; print(torch.__version__); "
    script += "print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return (lines[1], lines[0]) if len(lines) == 2 else ("", "missing")


def use_carried() -> None:
    """Other libraries, and pytest and build tools if some are missing, for this and all steps."""
    folders = [str(CARRIED / "peers")]
    if any(importlib.util.find_spec(name) is None for name in NEEDED_MODULES):
        folders.append(str(CARRIED / "tools"))
        os.environ["PATH"] += os.pathsep + str(CARRIED / "tools/bin")  # ninja itself
    sys.path[:0] = folders
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *([before] if before else [])])


def library(check: Check) -> bool:
    """Links what was carried; compiles all for this GPU if that fails."""
    code = "from otloss import ops; assert ops.CUDA_KERNELS, 'otloss was built without them'"
    build = '"$0" setup.py build_ext --inplace && exec "$0" -c "$1"'
    command = ["sh", "-c", build, sys.executable, code]
    here = {"OTLOSS_BUILD_CUDA": "1"}
    return check.run(Step("build", command, BUILD_SECONDS, "", carried_build())) or check.run(
        Step("build here", command, BUILD_SECONDS, "", here)
    )


def pytest_step(name: str, arguments: list[str], *wrapper: str, **environment: str) -> Step:
    # Names as they run: the log of a step that hangs ends with the test that does.
    command = [*wrapper, sys.executable, "-m", "pytest", "-v", "-o", "addopts=", "--tb=short"]
    command += ["-p", "no:cacheprovider", "--maxfail=5", *arguments]
    return Step(name, command, proof=PASSED, environment={"OMP_NUM_THREADS": "2", **environment})


def find_sanitizer() -> str | None:
    beside = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def checks(check: Check, options: argparse.Namespace) -> int:
    if options.rehearse:
        rows = [pytest_step(name, arguments) for name, arguments in EMULATED_TESTS.items()]
        check.run(*rows, together=options.together)
        return check.finish()
    if not library(check):
        return check.finish()
    rows = [pytest_step(name, arguments) for name, arguments in TESTS.items()]
    self_test = [sys.executable, "-m", "otloss.check"]
    rows.append(Step("self-test", self_test, proof=r"cuda:0: [1-9]\d* calls .* 0 wrong"))
    if tool := find_sanitizer():
        # Caching in torch's allocator would hide a read past the end of a tensor. (Without it there
        # is no graph capture.)
        plain = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        rows += [
            pytest_step(kind, SANITIZED, *sanitizer_command(tool, kind), **plain)
            for kind in SANITIZERS
        ]
    else:
        check.skipped.append("compute-sanitizer: it was not found")
    check.run(*rows, together=options.together)
    return check.finish()


def sanitizer_command(tool: str, kind: str) -> list[str]:
    return [tool, "--tool", kind, "--error-exitcode", "9"]


def bench(check: Check, options: argparse.Namespace) -> int:
    against = [sys.executable, "-m", "benchmarks.gpu", "--out", str(check.out / "gpu.json")]
    if options.rehearse:
        small = ["--tiny", "--device", "cpu", "--only", "graph", "--seconds", "60"]
        check.run(Step("libraries", [*against, *small], proof=" ms "))
        return check.finish()
    if not library(check):
        return check.finish()
    for module in ("ot", "geomloss", "pykeops", "flash_sinkhorn"):
        if importlib.util.find_spec(module) is None:
            check.skipped.append(f"{module}: it is not installed")
    left = check.end - time.monotonic() - OTHER_BENCHMARKS_SECONDS
    run = [sys.executable, "-m", "benchmarks.run", "iteration", "--device", "cuda", "--no-plot"]
    modes = [sys.executable, "-m", "benchmarks.gradient_modes", "--device", "cuda"]
    check.run(
        Step(
            "libraries",
            [*against, "--device", "cuda", "--seconds", f"{left:.0f}"],
            proof=" ms ",
        ),
        Step("iteration", [*run, "--out", str(check.out)]),
        Step("gradients", [*modes, "--out", str(check.out)]),
    )
    return check.finish()


COMMANDS = {"checks": (checks, 180.0), "bench": (bench, 240.0)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    before = commands.add_parser("prepare", help="fetch and compile what is carried to the GPU")
    version = "{}.{}".format(*sys.version_info)
    before.add_argument("--python", default=version, help="of the GPU machine, e.g. 3.12")
    for name, (_, seconds) in COMMANDS.items():
        command = commands.add_parser(name)
        command.add_argument("--seconds", type=float, default=seconds, help="for everything")
        command.add_argument("--together", type=int, default=8, help="rows of tests at a time")
        command.add_argument("--rehearse", action="store_true", help="without a GPU, emulated")
    options = parser.parse_args()
    if options.command == "prepare":
        return prepare(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what runs is ended on the way out
    begin = time.monotonic()
    gpu, torch_version = find_gpu()
    if not gpu and not options.rehearse:
        print(f"gpu_check {options.command}: FAILED, torch {torch_version} sees no GPU here")
        return 2
    use_carried()
    out = Path(os.environ.get("OUT") or BUILD / "gpu-check")
    seconds = options.seconds - (time.monotonic() - begin)
    check = Check(options.command, seconds, gpu or "no GPU, a rehearsal", out)
    return COMMANDS[options.command][0](check, options)


if __name__ == "__main__":
    sys.exit(main())
