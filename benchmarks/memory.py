"""Peak memory of a call, measured in a process of its own.

    from benchmarks.memory import peak
    peak("otloss", "gaussians_64d", 4000)       # bytes that the call added

The child builds the problem, notes its peak resident memory, calls, and notes it again. On CUDA
the allocator's own record is used instead. As a program (``python -m benchmarks.memory PEER
WORKLOAD N``) this file is that child.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.process import set_thread_variables

ROOT = Path(__file__).resolve().parents[1]


class Peak(NamedTuple):
    """Peak bytes before and after the call; their difference is what the call added."""

    before: int
    after: int

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
    setting: str = "",
    device: str = "cpu",
    threads: int = 1,
    timeout: float = 600,
) -> Peak:
    """Peak memory of value and gradient of a divergence, in a fresh process.

    ``setting`` is the label of a variant of the peer's ``divergence`` ladder, by default the
    first. Raises ``subprocess.SubprocessError`` when the child fails or takes too long.
    """
    command = [sys.executable, "-m", "benchmarks.memory", peer, workload, str(n)]
    command += ["--setting", setting, "--device", device, "--threads", str(threads)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ.copy(), timeout=timeout, check=True, capture_output=True
    )
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _measure(arguments: argparse.Namespace) -> Peak:
    import torch

    from benchmarks import peers, workloads

    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    usable, skipped = peers.load([arguments.peer])
    if skipped:
        sys.exit(f"{arguments.peer}: {skipped[arguments.peer]}")
    peer = usable[arguments.peer]

    def ladder(n: int) -> dict:
        problem = workloads.make(arguments.workload, n).to(device)
        return {variant.label: variant.call for variant in peer.divergence(problem)}

    calls = ladder(arguments.n)
    label = arguments.setting or next(iter(calls))
    # A tiny call first: what is loaded or compiled once is not the problem's memory.
    ladder(8)[label]()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.max_memory_allocated(device)
        calls[label]()
        return Peak(before, torch.cuda.max_memory_allocated(device))
    before = resident_peak()
    calls[label]()
    return Peak(before, resident_peak())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer")
    parser.add_argument("workload")
    parser.add_argument("n", type=int)
    parser.add_argument("--setting", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    set_thread_variables(arguments.threads)
    print(json.dumps(_measure(arguments)._asdict()))


if __name__ == "__main__":
    main()
