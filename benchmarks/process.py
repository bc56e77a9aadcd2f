"""Settings of the whole process, made before torch or a peer is imported."""

from __future__ import annotations

import ctypes
import os
import sys

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)
# Parameters of glibc's mallopt; the mmap threshold's largest accepted value.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_THRESHOLD = 1 << 25


def set_thread_variables(threads: int) -> None:
    """For libraries that read their thread counts from the environment when they are loaded."""
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    flags = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"
    os.environ["XLA_FLAGS"] = f"{flags} intra_op_parallelism_threads={threads}"


def keep_freed_memory() -> bool:
    """Let the allocator keep freed blocks of up to 32 MiB instead of returning them to the system.

    Solvers that allocate a matrix per operation otherwise spend more time in page faults than in
    arithmetic, or not, by the luck of what was allocated before. False where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim = mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    return bool(trim and mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD))
