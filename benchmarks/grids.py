"""Densities on a grid against OTT-JAX: value and gradient of the divergence, one thread.

Two images of 256 x 256, eps = 2 (4 pixels)^2, float64. CPU seconds and the error of the gradient
against a solve to 1e-9,
by the tolerance of each library.

    python -m benchmarks.grids [--size 256]           # otloss, and OTT-JAX where it is installed
    PYTHON_OTT=/path/to/python python -m benchmarks.grids   # OTT-JAX in another environment
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)


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

    shape = a.shape
    axes = [jnp.arange(n, dtype=jnp.float64) for n in shape]
    found = {}
    for tol in TOLERANCES:

        def divergence(u: jax.Array, v: jax.Array, tol: float = tol) -> jax.Array:
            geometry = grid.Grid(x=axes, epsilon=eps)

            def cost(p: jax.Array, q: jax.Array) -> jax.Array:
                options = {"threshold": tol, "max_iterations": 5000, "inner_iterations": 5}
                return linear.solve(geometry, p.ravel(), q.ravel(), **options).reg_ot_cost

            return cost(u, v) - 0.5 * cost(u, u) - 0.5 * cost(v, v)

        both = jax.jit(jax.value_and_grad(divergence))
        jax.block_until_ready(both(a, b))
        start = time.process_time()
        value, gradient = jax.block_until_ready(both(a, b))
        found[f"{tol:g}"] = np.append(np.asarray(gradient).ravel(), time.process_time() - start)
        print(
            f"OTT-JAX tol {tol:g}: {found[f'{tol:g}'][-1]:.2f} s, value {float(value):.6g}",
            flush=True,
        )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--ott", help="run OTT-JAX only, and save to this file")
    arguments = parser.parse_args()
    (a, b), eps = images(arguments.size), 2.0 * 4**2
    if arguments.ott:
        return with_ott(a, b, eps, arguments.ott)
    exact = centred(with_otloss(a, b, eps, 1e-9)[0], a)
    scale = np.sqrt((a * exact**2).sum())
    print(f"{'library':8s} {'tol':>7s} {'seconds':>8s} {'gradient error':>15s}")

    def show(name: str, tol: float, gradient: np.ndarray, seconds: float) -> None:
        error = np.sqrt((a * (centred(gradient, a) - exact) ** 2).sum()) / scale
        print(f"{name:8s} {tol:7.0e} {seconds:8.3f} {error:15.1e}", flush=True)

    for tol in TOLERANCES:
        show("otloss", tol, *with_otloss(a, b, eps, tol))
    python = os.environ.get("PYTHON_OTT", sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ott.npz")
        one_thread = {
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        }
        command = [python, __file__, "--size", str(arguments.size), "--ott", path]
        subprocess.run(command, env=os.environ | one_thread, check=False, timeout=3000)
        if not os.path.exists(path):
            return print("OTT-JAX is not installed")
        with np.load(path) as found:
            for tol in found.files:
                gradient = found[tol][:-1].reshape(a.shape)
                show("OTT-JAX", float(tol), gradient, found[tol][-1])


if __name__ == "__main__":
    main()
