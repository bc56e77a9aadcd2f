"""What the gradient modes cost and how exact they are: ``python -m benchmarks.gradient_modes``.

Three measurements, printed and kept in ``benchmarks/results/gradient_modes.json``:

- error: relative error of the gradient of the loss against the converged one, in float64, after k
  iterations, for each mode and objective. Drawn to ``docs/images/gradient_modes.png``.
- memory: what one loss and its gradient add to the peak memory, n = m = 1000, d = 64, 200
  iterations, against autograd through the same iterations written in torch; each in a process of
  its own.
- time: the backward pass over the forward pass of the same iterations, and an implicit gradient
  with its number of conjugate-gradient steps.

``--device cuda`` measures time only, on a GPU, and keeps it in a folder of that name.
``--streaming`` compares losses and gradients with stored cost matrices and without them, in
``streamed_gradients.json``: CPU seconds, which a busy machine changes little, and memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks.alone import RESULTS, keep
from benchmarks.memory import resident_peak
from benchmarks.timing import Timer
from otloss import ops

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs/images/gradient_modes.png"
ITERATIONS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377)
OBJECTIVES = ("regularized", "transport")


def clouds(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=dtype)
    y = torch.randn(n, d, generator=generator, dtype=dtype) * 0.7 + 0.5
    return x.requires_grad_(), y


# ----------------------------------------------------------------------------------------- error


def errors(n: int = 120, eps: float = 0.25) -> dict[str, Any]:
    """Relative gradient error after k iterations, per objective and mode."""
    x, y = clouds(n, 2, torch.float64)

    def gradient(objective: str, **kw: Any) -> Tensor:
        loss = otloss.sinkhorn_loss(x, y, eps, objective=objective, **kw)
        return torch.autograd.grad(loss, x)[0]

    result: dict[str, Any] = {"n": n, "eps": eps, "iterations": ITERATIONS}
    for objective in OBJECTIVES:
        exact = gradient(objective, backward="implicit", tol=1e-13, max_iters=100_000)
        for mode in ("envelope", "implicit", "unrolled"):
            result[f"{objective} {mode}"] = [
                float((gradient(objective, backward=mode, n_iters=k) - exact).norm() / exact.norm())
                for k in ITERATIONS
            ]
    return result


def draw(result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True, layout="constrained")
    styles = {"envelope": ":", "implicit": "--", "unrolled": "-"}
    for axis, objective in zip(axes, OBJECTIVES, strict=True):
        for mode, style in styles.items():
            error = [max(e, 1e-14) for e in result[f"{objective} {mode}"]]
            axis.loglog(result["iterations"], error, style, label=mode)
        axis.set(title=f'objective="{objective}"', xlabel="iterations")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative gradient error")
    axes[1].legend(fontsize=8)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=110)


# ---------------------------------------------------------------------------------------- memory


def torch_loop(x: Tensor, y: Tensor, eps: float, L: int) -> Tensor:
    """The same iterations as autograd's users write them; uniform weights."""
    C = torch.cdist(x, y).square()
    a = -torch.tensor(float(len(x))).log()
    b = -torch.tensor(float(len(y))).log()
    g = torch.zeros(len(y))
    for _ in range(L):
        f = -eps * torch.logsumexp(b + (g - C) / eps, dim=1)
        g = -eps * torch.logsumexp(a + (f[:, None] - C) / eps, dim=0)
    return f.mean() + g.mean()


def call(which: str, n: int, d: int, L: int, eps: float = 10.0) -> Tensor:
    x, y = clouds(n, d, torch.float32)
    if which == "otloss":
        loss = otloss.sinkhorn_loss(x, y, eps, n_iters=L, method="dense")
    elif which == "unrolled":
        loss = otloss.sinkhorn_loss(x, y, eps, n_iters=L, method="streamed")
    elif which == "implicit":
        loss = otloss.sinkhorn_loss(x, y, eps, objective="transport", method="streamed")
    else:
        loss = torch_loop(x, y, eps, L)
    loss.backward()
    assert x.grad is not None
    return x.grad


def added_memory(which: str, n: int, d: int, L: int) -> int:
    """Peak bytes that one call adds, in a process of its own (the child's ``--child``)."""
    command = [sys.executable, "-m", "benchmarks.gradient_modes", "--child", which, str(n), str(d)]
    done = subprocess.run([*command, str(L)], cwd=ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout)


def child(which: str, n: int, d: int, L: int) -> None:
    call(which, 32, d, 2)  # what torch allocates once
    before = resident_peak()
    call(which, n, d, L)
    print(resident_peak() - before)


def memory(n: int = 1000, d: int = 64, L: int = 200) -> dict[str, Any]:
    bytes_of = {which: added_memory(which, n, d, L) for which in ("otloss", "torch")}
    difference = (call("otloss", n, d, 3) - call("torch", n, d, 3)).norm()
    return {
        "n": n,
        "d": d,
        "iterations": L,
        "bytes": bytes_of,
        "ratio": bytes_of["torch"] / bytes_of["otloss"],
        "gradient_difference": float(difference / call("torch", n, d, 3).norm()),
    }


# ------------------------------------------------------------------------------------------ time


def fastest(function: Callable[[], Any], device: torch.device, repetitions: int = 9) -> float:
    timer = Timer(device)
    timer.seconds(function)
    return min(timer.seconds(function) for _ in range(repetitions))


def times(device: torch.device, sizes: tuple[int, ...], L: int = 50) -> list[dict[str, Any]]:
    """Nanoseconds per entry and iteration, forward with trace and backward; steps of implicit."""
    rows = []
    for dtype in (torch.float32, torch.float64):
        for n in sizes:
            x, y = (t.detach().to(device) for t in clouds(n, 16, dtype))
            costs = ops.cost([x[None], y[None]], [], [0, 1], 0)
            a = torch.full((1, n), 1 / n, dtype=dtype, device=device)
            head = ops.problems([a, a], [0, 1], [1.0], 4.0, costs=costs)
            transport, tail = head._replace(objective=1), ([0], [], True)
            one = torch.ones(1, dtype=dtype, device=device)

            def forward(head: Any = head) -> tuple[Tensor, ...]:
                return ops.solve(*head, [], ops.number(1e-3), 1, L, True, False)

            _, _, f, g, traces, _ = forward()

            def backward(
                head: Any = head, tail: Any = tail, traces: Any = traces, one: Tensor = one
            ) -> Any:
                return ops.unrolled_backward(one, [], [], *head, [], traces, *tail)

            def implicit(
                head: Any = transport, f: Any = f, g: Any = g, tail: Any = tail, one: Tensor = one
            ) -> tuple[Tensor, ...]:
                return ops.implicit_backward(one, [], [], *head, f, g, *tail)

            there, back = fastest(forward, device), fastest(backward, device)
            steps = int(implicit()[-1][0, 0, 0])
            scale = 1e9 / (n * n * L)
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "n": n,
                    "forward_ns": there * scale,
                    "backward_ns": back * scale,
                    "ratio": back / there,
                    "implicit_s": fastest(implicit, device),
                    "implicit_steps": steps,
                }
            )
    return rows


def loss_and_gradient(x: Tensor, y: Tensor, method: str, options: dict[str, Any]) -> None:
    eps = 0.3 * x.shape[1] ** 0.5
    loss = otloss.sinkhorn_loss(x, y, eps, objective="transport", method=method, **options)
    torch.autograd.grad(loss, (x, y))


def streaming(L: int = 20) -> list[dict[str, Any]]:
    """Seconds of a transport loss and its gradient in both clouds, with matrices and without."""
    timer, rows = Timer(torch.device("cpu"), "cpu"), []
    modes: dict[str, dict[str, Any]] = {"unrolled": {"n_iters": L}, "implicit": {}}
    dtypes, dims, sizes = (torch.float32, torch.float64), (2, 4, 8, 16), (1000, 2000, 4000)
    for dtype, d, n in itertools.product(dtypes, dims, sizes):
        x, y = (t.detach().requires_grad_() for t in clouds(n, d, dtype))
        for mode, options in modes.items():
            row: dict[str, Any] = {"mode": mode, "dtype": str(dtype)[6:], "d": d, "n": n}
            for method in ("dense", "streamed"):
                both = functools.partial(loss_and_gradient, x, y, method, options)
                row[method] = min(timer.seconds(both) for _ in range(4))
            rows.append(row)
    return rows


def streamed_memory(n: int = 10_000, d: int = 3, L: int = 100) -> dict[str, Any]:
    modes = ("unrolled", "implicit")
    return {"n": n, "d": d, "iterations": L} | {w: added_memory(w, n, d, L) for w in modes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--child", nargs=4, metavar=("WHICH", "N", "D", "L"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        which, *sizes = arguments.child
        child(which, *map(int, sizes))
        return
    device, out = torch.device(arguments.device), arguments.out
    result: dict[str, Any]
    if arguments.streaming:
        result = {"bytes": streamed_memory(), "seconds": streaming()}
        keep(out / "streamed_gradients.json", result, device)
        for row in (result["bytes"], *result["seconds"]):
            print(row)
        return
    if device.type == "cuda":
        result = {"time": times(device, (200, 1000, 2000, 4000))}
        out = out / device.type
    else:
        time = times(device, (128, 256, 512, 1000))
        result = {"error": errors(), "memory": memory(), "time": time}
        draw(result["error"])
    keep(out / "gradient_modes.json", result, device)
    if "memory" in result:
        print(json.dumps(result["memory"], indent=1))
    for row in result["time"]:
        print(row)
    for key, value in result.get("error", {}).items():
        print(key, [f"{v:.1e}" if isinstance(v, float) else v for v in value]
              if isinstance(value, list) else value)  # fmt: skip


if __name__ == "__main__":
    main()
