"""Peak memory of a call, measured in a process of its own.

    from benchmarks.memory import peak
    peak("otloss", "gaussians_64d", 4000).added       # bytes that the call added

The child builds the problem, notes its peak resident memory, calls, and notes it again. On CUDA
the allocator's own record is used instead. It times the call too, and with ``errors`` compares its
result with the converged one afterwards. As a program (``python -m benchmarks.memory PEER
WORKLOAD N``) this file is that child.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.process import set_thread_variables

Call = Callable[[], Any]
ROOT = Path(__file__).resolve().parents[1]


class GaveUpError(RuntimeError):
    """A call took more CPU seconds than it was given."""


class Peak(NamedTuple):
    """Peak bytes before and after the call, whose difference is what it added; its seconds."""

    before: int
    after: int
    wall_seconds: float
    cpu_seconds: float
    gradient_error: float | None = None

    @property
    def added(self) -> int:
        return self.after - self.before


def resident_peak() -> int:
    """Peak resident bytes of this process.

    VmHWM where there is one: ru_maxrss also counts what the parent held when it forked.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak(
    peer: str,
    workload: str,
    n: int,
    *,
    eps: float | None = None,
    setting: str = "",
    errors: bool = False,
    device: str = "cpu",
    threads: int = 1,
    limit: float = 600,
) -> Peak:
    """Peak memory of value and gradient of a divergence, in a fresh process.

    ``eps`` is by default the workload's first; ``setting`` the label of a variant of the peer's
    ``divergence`` ladder, by default the first. ``limit`` is what the call may take in CPU seconds,
    which other work on the machine does not use up. Raises ``GaveUpError`` if it takes longer, and
    ``subprocess.SubprocessError`` when the child fails.
    """
    command = [sys.executable, "-m", "benchmarks.memory", peer, workload, str(n)]
    command += ["--setting", setting, "--device", device, "--threads", str(threads)]
    command += [] if eps is None else ["--eps", str(eps)]
    command += ["--errors"] * errors + ["--limit", str(limit)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ.copy(), check=True, capture_output=True
        )
    except subprocess.CalledProcessError as error:
        if error.returncode == -signal.SIGXCPU:
            raise GaveUpError(f"not done after {limit:.0f} s") from error
        raise
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """The process ends by SIGXCPU when the block takes more CPU seconds."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_CPU, before)


def _measure(arguments: argparse.Namespace) -> Peak:
    import torch

    from benchmarks import peers, reference, workloads

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    usable, skipped = peers.load([arguments.peer])
    if skipped:
        sys.exit(f"{arguments.peer}: {skipped[arguments.peer]}")
    peer = usable[arguments.peer]

    def make(n: int) -> workloads.Problem:
        return workloads.make(arguments.workload, n, arguments.eps)

    def ladder(problem: workloads.Problem) -> dict[str, Call]:
        return {variant.label: variant.call for variant in peer.divergence(problem.to(device))}

    def peak_now() -> int:
        return torch.cuda.max_memory_allocated(device) if on_gpu else resident_peak()

    on_gpu = device.type == "cuda"
    problem = make(arguments.n)
    calls = ladder(problem)
    label = arguments.setting or next(iter(calls))
    # A tiny call first: what is loaded or compiled once is not the problem's memory.
    ladder(make(8))[label]()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before, wall, cpu = peak_now(), time.perf_counter(), time.process_time()
    with cpu_limit(arguments.limit):
        result = calls[label]()
    after = peak_now()
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    if not arguments.errors:
        return Peak(before, after, *seconds)
    x, y, a, b = problem.x, problem.y, problem.a, problem.b
    solution = reference.divergence(x, y, a, b, problem.cost, problem.eps)
    return Peak(before, after, *seconds, solution.errors(*result)["gradient_error"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer")
    parser.add_argument("workload")
    parser.add_argument("n", type=int)
    parser.add_argument("--eps", type=float)
    parser.add_argument("--setting", default="")
    parser.add_argument("--errors", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600)
    arguments = parser.parse_args()

    set_thread_variables(arguments.threads)
    print(json.dumps(_measure(arguments)._asdict()))


if __name__ == "__main__":
    main()
