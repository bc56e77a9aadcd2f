"""Densities on a grid against OTT-JAX: value and gradient of the divergence, one thread.

Two images of 256 x 256, eps = 2 (4 pixels)^2, float64: by the tolerance of each library the CPU
seconds, those of compilation left out, and the error of the gradient against a solve to 1e-9.
Printed as the table of ``docs/benchmarks.md`` and kept in ``benchmarks/results/grids.json``.

    python -m benchmarks.grids [--size 256]                 # OTT-JAX where it is installed
    PYTHON_OTT=/path/to/python python -m benchmarks.grids   # in another environment
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
OTT_TOLERANCES = (1e-1, 1e-2, 1e-3)
OTT_SECONDS = 3000  # for all tolerances, on the clock


def images(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A ring and two blobs, on a background of 1e-3 of their height."""
    y, x = np.mgrid[:size, :size] / size
    ring = np.exp(-(((np.hypot(x - 0.4, y - 0.45) - 0.25) / 0.05) ** 2))
    blobs = sum(np.exp(-((x - u) ** 2 + (y - v) ** 2) / 0.01) for u, v in ((0.35, 0.7), (0.7, 0.4)))
    return tuple((image + 1e-3) / (image + 1e-3).sum() for image in (ring, blobs))


def with_ott(a: np.ndarray, b: np.ndarray, eps: float, path: str) -> None:
    """Times OTT-JAX at every tolerance and saves gradients and seconds."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    from ott.geometry import grid
    from ott.solvers import linear

    axes = [jnp.arange(n, dtype=jnp.float64) for n in a.shape]
    found = {}
    for tol in OTT_TOLERANCES:

        def divergence(u: jax.Array, v: jax.Array, tol: float = tol) -> jax.Array:
            geometry = grid.Grid(x=axes, epsilon=eps)

            def cost(p: jax.Array, q: jax.Array) -> jax.Array:
                options = {"threshold": tol, "max_iterations": 5000, "inner_iterations": 5}
                return linear.solve(geometry, p.ravel(), q.ravel(), **options).reg_ot_cost

            return cost(u, v) - 0.5 * cost(u, u) - 0.5 * cost(v, v)

        both = jax.jit(jax.value_and_grad(divergence)).lower(a, b).compile()
        start = time.process_time()
        _, gradient = jax.block_until_ready(both(a, b))
        seconds = time.process_time() - start
        print(f"OTT-JAX at {tol:g}: {seconds:.1f} s", flush=True)
        found[f"{tol:g}"] = np.append(np.asarray(gradient).ravel(), seconds)
        np.savez(path, **found)


def with_otloss(a: np.ndarray, b: np.ndarray, eps: float, tol: float) -> tuple[np.ndarray, float]:
    import torch

    import otloss

    torch.set_num_threads(1)
    u = torch.from_numpy(a)[None].requires_grad_()
    v = torch.from_numpy(b)[None]
    start = time.process_time()
    otloss.sinkhorn_divergence_grid(u, v, eps, tol=tol).sum().backward()
    return u.grad[0].numpy(), time.process_time() - start


def centred(gradient: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Gradients in weights are defined up to a constant."""
    return gradient - (a * gradient).sum()


def measure(size: int) -> list[dict[str, Any]]:
    (a, b), eps = images(size), 2.0 * 4**2
    exact = centred(with_otloss(a, b, eps, 1e-9)[0], a)
    scale, rows = np.sqrt((a * exact**2).sum()), []

    def keep(library: str, tol: float, gradient: np.ndarray, seconds: float) -> None:
        error = np.sqrt((a * (centred(gradient, a) - exact) ** 2).sum()) / scale
        row = {"library": library, "tol": tol, "seconds": float(seconds), "error": float(error)}
        print(row, flush=True)
        rows.append(row)

    for tol in TOLERANCES:
        keep("otloss", tol, *with_otloss(a, b, eps, tol))
    python = os.environ.get("PYTHON_OTT", sys.executable)
    flags = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ott.npz")
        command = [python, __file__, "--size", str(size), "--ott", path]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=os.environ | flags, check=False, timeout=OTT_SECONDS)
        if os.path.exists(path):
            with np.load(path) as found:
                for tol in found.files:
                    keep("OTT-JAX", float(tol), found[tol][:-1].reshape(a.shape), found[tol][-1])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    from benchmarks.alone import markdown

    head = ["library", "tolerance", "CPU seconds", "error of the gradient"]
    each = [
        [r["library"], f"{r['tol']:g}", f"{r['seconds']:.2f}", f"{r['error']:.1e}"] for r in rows
    ]
    return markdown(head, each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--ott", help="run OTT-JAX only, and save to this file")
    arguments = parser.parse_args()
    if arguments.ott:  # in an environment that may have no torch
        return with_ott(*images(arguments.size), 2.0 * 4**2, arguments.ott)
    from benchmarks.alone import RESULTS, keep

    rows = measure(arguments.size)
    keep(RESULTS / "grids.json", rows)
    print(table(rows))


if __name__ == "__main__":
    main()
