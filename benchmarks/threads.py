"""Thread counts of libraries that read them from the environment when they are loaded."""

from __future__ import annotations

import os

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


def set_thread_variables(threads: int) -> None:
    """Call this before torch or a peer is imported."""
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    flags = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}"
    os.environ["XLA_FLAGS"] = f"{flags} intra_op_parallelism_threads={threads}"
