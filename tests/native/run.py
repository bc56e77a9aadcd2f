"""Compiles the CPU kernels without torch, by any compiler, runs driver.cpp and compares what it
computes with what the ordinary build of g++ does.

    python tests/native/run.py g++ -fsanitize=thread
    python tests/native/run.py clang++ -fsanitize=memory
    python tests/native/run.py aarch64-linux-gnu-g++ -static --runner qemu-aarch64 --largest 64
    python tests/native/run.py g++ --runner "valgrind -q --error-exitcode=9" --largest 40

Compiler warnings are errors. Objects are kept in build/native, one folder per command.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-O2", "-g", "-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-pass-failed", f"-I{ROOT / 'csrc'}", "-pthread"]
ORDINARY = ["g++"]
# Solved in another order of summation: to the tolerance of the solver, relative to the sizes.
LEAST_SIZE = 1e-4  # of what is 0 but for rounding
ALLOWED = {"float": 2e-3, "double": 1e-6}


def built(command: list[str]) -> Path:
    folder = ROOT / "build/native" / hashlib.sha256(repr(command).encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    sources = [Path(__file__).with_name("driver.cpp"), *sorted((ROOT / "csrc/cpu").rglob("*.cpp"))]
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.h"))

    def compiled(source: Path) -> str:
        target = folder / f"{'-'.join(source.relative_to(ROOT).parts)}.o"
        changed = max(newest, source.stat().st_mtime)
        if not target.exists() or target.stat().st_mtime < changed:
            subprocess.run([*command, *FLAGS, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([*command, "-pthread", *objects, "-o", str(folder / "driver")], check=True)
    return folder / "driver"


def numbers(command: list[str], *sizes: int) -> list[tuple[str, float, float]]:
    done = subprocess.run([*command, *map(str, sizes)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} ended with status {done.returncode}")
    rows = (line.rsplit(maxsplit=2) for line in done.stdout.splitlines())
    return [(name, float(value), float(size)) for name, value, size in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runner", default="", help="what runs the program, as qemu-aarch64")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--largest", type=int, default=2000, help="number of points in a cloud")
    given, compiler = parser.parse_known_args()
    expected = numbers([str(built(ORDINARY))], 1, given.largest)
    command = [*shlex.split(given.runner), str(built(compiler))]
    got = numbers(command, given.threads, given.largest)
    assert [name for name, *_ in got] == [name for name, *_ in expected]
    largest = {"float": 0.0, "double": 0.0}
    for (name, value, _), (_, right, size) in zip(got, expected, strict=True):
        kind = name.split("/")[-1].split()[0]
        error = abs(value - right) / (size + LEAST_SIZE)
        largest[kind] = max(largest[kind], error)
        if not error <= ALLOWED[kind]:
            sys.exit(f"{name}: {value}, not {right}")
    differences = ", ".join(f"{kind} {error:.1e}" for kind, error in largest.items())
    tool = shlex.join([*compiler, *shlex.split(given.runner)])
    print(f"{tool}: {len(got)} numbers agree, largest differences {differences}")


if __name__ == "__main__":
    main()
