"""otloss against other libraries on a GPU: ``python -m benchmarks.gpu --out results.json``.

Every benchmark runs in a process of its own with a time limit, prints a line of JSON per
measurement as it goes, and each measurement catches its own failure: what is missing, fails or
takes too long costs only itself. ``--seconds`` bounds the whole run, ``--tiny`` runs every
benchmark on small clouds, on the CPU too, to try the code.

All solve OT with C = |x - y|^2 between normal clouds; eps is a tenth of the mean cost.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
ITERATIONS = 10
SMALL_ITERATIONS = 50
TARGETS = (1e-2, 1e-3)  # relative gradient errors
LARGEST_MATRIX = 1 << 28  # entries that peers which store costs are asked for

Row = dict[str, Any]
# (x, y) -> loss; x may require a gradient
Loss = Callable[[Tensor, Tensor], Tensor]


class Setting(NamedTuple):
    """What is asked of a library: exactly so many iterations, or an accuracy of its own scale."""

    eps: float
    debias: bool
    iterations: int | None = None
    effort: int = 0  # rung of its ladder from cheap to exact, without `iterations`


# ------------------------------------------------------------------------------------ libraries


def otloss_loss(s: Setting, method: str = "auto") -> Loss:
    import otloss

    loss = otloss.sinkhorn_divergence if s.debias else otloss.sinkhorn_loss
    options: dict[str, Any] = {"method": method, "backward": "envelope"}
    if s.iterations is not None:
        return partial(loss, eps=s.eps, n_iters=s.iterations, **options)
    return partial(loss, eps=s.eps, tol=10 ** (-s.effort / 4), max_iters=3000, **options)


def flash_loss(s: Setting, tf32: bool) -> Loss:
    from flash_sinkhorn import SamplesLoss

    iterations = s.iterations or round(4 * 2 ** (s.effort / 2))
    return SamplesLoss(
        "sinkhorn",
        backend="alternating",
        use_epsilon_scaling=False,
        eps=s.eps,
        n_iters=iterations,
        debias=s.debias,
        allow_tf32=tf32,
    )


def geomloss_loss(s: Setting, backend: str, diameter: float) -> Loss:
    """C = |x - y|^2 / 2 at eps / 2 is half of it. It takes steps of eps from the diameter down."""
    from geomloss import SamplesLoss

    blur = math.sqrt(s.eps / 2)
    scaling = 0.25 ** (1.3**-s.effort)
    if s.iterations is not None:
        scaling = min(0.999, (blur / diameter) ** (1 / max(1.0, s.iterations - 2.5)))
    module = SamplesLoss(
        "sinkhorn", p=2, blur=blur, scaling=scaling, debias=s.debias, backend=backend,
        diameter=diameter,
    )  # fmt: skip
    return lambda x, y: 2 * module(x, y)


def pot_loss(s: Setting) -> Loss:
    import ot

    iterations = s.iterations or round(4 * 2 ** (s.effort / 2))

    def transport(x: Tensor, y: Tensor) -> Tensor:
        return ot.solve_sample(
            x, y, metric="sqeuclidean", reg=s.eps, reg_type="KL", grad="envelope", tol=0.0,
            max_iter=iterations,
        ).value  # fmt: skip

    def divergence(x: Tensor, y: Tensor) -> Tensor:
        return transport(x, y) - (transport(x, x) + transport(y, y)) / 2

    return divergence if s.debias else transport


def libraries(x: Tensor, y: Tensor, methods: tuple[str, ...] = ("auto",)) -> dict[str, Any]:
    """Setting -> loss of each library that can be imported and take clouds of this size."""
    found: dict[str, Any] = {
        f"otloss {method}": partial(otloss_loss, method=method) for method in methods
    }
    (n, d), m = x.shape[-2:], y.shape[-2]
    has = {name for name in ("flash_sinkhorn", "geomloss", "pykeops", "ot") if importable(name)}
    if "flash_sinkhorn" in has and x.is_cuda:
        found["FlashSinkhorn float32"] = partial(flash_loss, tf32=False)
        found["FlashSinkhorn TF32"] = partial(flash_loss, tf32=True)
    points = torch.cat([x.reshape(-1, d), y.reshape(-1, d)])
    diameter = float((points.amax(0) - points.amin(0)).norm())
    if "geomloss" in has and n * m <= LARGEST_MATRIX:
        found["GeomLoss"] = partial(geomloss_loss, backend="tensorized", diameter=diameter)
    if {"geomloss", "pykeops"} <= has and d <= 64 and x.dim() == 2:
        found["GeomLoss KeOps"] = partial(geomloss_loss, backend="online", diameter=diameter)
    if "ot" in has and n * m <= LARGEST_MATRIX and x.dim() == 2:
        found["POT"] = pot_loss
    return found


def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def versions() -> dict[str, str]:
    found = {}
    for package in ("flash-sinkhorn", "geomloss", "pykeops", "POT"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


# -------------------------------------------------------------------------------------- timing


def clouds(
    n: int, d: int, device: str, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(n + d)
    x = torch.randn(*batch, n, d, generator=generator).to(device, dtype)
    y = (0.8 * torch.randn(*batch, n, d, generator=generator) + 0.5).to(device, dtype)
    return x, y, 0.1 * d * (1 + 0.64 + 0.25)


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def value_and_gradient(loss: Loss, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = loss(x, y)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def seconds(call: Callable[[], object], x: Tensor, budget: float = 3.0) -> Row:
    """Median of up to 20 calls after two that warm up, within about ``budget`` seconds."""
    call()
    samples: list[float] = []
    begin = time.perf_counter()
    for repetition in range(21):
        synchronize(x)
        start = time.perf_counter()
        call()
        synchronize(x)
        if repetition > 0:
            samples.append(time.perf_counter() - start)
        if samples and time.perf_counter() - begin > budget:
            break
    return {
        "ms": 1e3 * statistics.median(samples),
        "ms_min": 1e3 * min(samples),
        "calls": len(samples),
    }


def emit(row: Row, measure: Callable[[], Row]) -> None:
    """Prints the row with what was measured, or with why it was not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = {**row, **measure()}
    except Exception as error:
        row = {**row, "error": f"{type(error).__name__}: {error}"[:300]}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(json.dumps(row), flush=True)


def emit_times(row: Row, loss: Callable[[], Loss], x: Tensor, y: Tensor) -> None:
    """Forward alone, and with the gradient of x."""

    def forward() -> Row:
        call = loss()
        with torch.no_grad():
            return seconds(lambda: call(x, y), x)

    def both() -> Row:
        call = loss()
        return seconds(lambda: value_and_gradient(call, x, y), x)

    emit({**row, "gradient": False}, forward)
    emit({**row, "gradient": True}, both)


# ---------------------------------------------------------------------------------- benchmarks


def iterations(n: int, d: int, device: str, kinds: tuple[bool, ...] = (False, True)) -> None:
    """The same number of iterations for all."""
    x, y, eps = clouds(n, d, device)
    methods = ("dense", "streamed") if n * n <= LARGEST_MATRIX else ("streamed",)
    for debias in kinds:
        setting = Setting(eps, debias, ITERATIONS)
        for name, make in libraries(x, y, methods).items():
            row = {"library": name, "n": n, "d": d, "debias": debias, "iterations": ITERATIONS}
            emit_times(row, partial(make, setting), x, y)


def iterations_at(n: int, d: int) -> Callable[[str, bool], None]:
    def run(device: str, tiny: bool) -> None:
        iterations(n // 50 if tiny else n, d, device)

    return run


def large(device: str, tiny: bool) -> None:
    iterations(700 if tiny else 50_000, 64, device, (False,))


def million(device: str, tiny: bool) -> None:
    """A million points each in three dimensions: two iterations, and a whole solve by otloss."""
    n = 2000 if tiny else 1_000_000
    x, y, eps = clouds(n, 3, device)
    row: Row = {"n": n, "d": 3, "debias": False}
    for name, make in libraries(x, y, ("streamed",)).items():

        def twice(make: Any = make) -> Row:
            loss = make(Setting(eps, False, 2))
            with torch.no_grad():
                return seconds(lambda: loss(x, y), x, 0.0)

        emit({**row, "library": name, "iterations": 2}, twice)

    def solve() -> Row:
        loss = otloss_loss(Setting(eps, False, None, 8), "streamed")
        return seconds(lambda: value_and_gradient(loss, x, y), x, 0.0)

    emit({**row, "library": "otloss streamed", "tol": 1e-2, "gradient": True}, solve)


def accuracy_at(n: int, d: int) -> Callable[[str, bool], None]:
    """Time to a gradient error, each library along its own ladder of settings."""

    def run(device: str, tiny: bool) -> None:
        import otloss

        size = 100 if tiny else n
        x, y, eps = clouds(size, d, device)
        exact = partial(
            otloss.sinkhorn_divergence, eps=eps, tol=1e-9, max_iters=5000, backward="envelope"
        )
        _, truth = value_and_gradient(exact, x.double(), y.double())
        result = otloss.solve_sample(x.double(), y.double(), eps, tol=1e-9, max_iters=5000)
        emit(
            {"n": size, "d": d, "reference": "float64"}, lambda: {"error_l1": result.marginal_error}
        )
        for name, make in libraries(x, y, ("dense", "streamed")).items():
            row = {"library": name, "n": size, "d": d, "debias": True}
            emit_ladder(row, ladder(make, eps, x, y, truth), x, y)

    return run


def ladder(
    make: Any, eps: float, x: Tensor, y: Tensor, truth: Tensor
) -> Iterator[tuple[int, float, Loss]]:
    for effort in range(2, 25):
        loss = make(Setting(eps, True, None, effort))
        _, gradient = value_and_gradient(loss, x, y)
        yield effort, float((gradient.double() - truth).norm() / truth.norm()), loss


def emit_ladder(row: Row, rungs: Iterator[tuple[int, float, Loss]], x: Tensor, y: Tensor) -> None:
    """The first rung that reaches each target; stops at the last target or after 15 s."""
    reached: dict[float, tuple[int, float, Loss]] = {}

    def climb() -> Row:
        begin, best = time.perf_counter(), math.inf
        for rung in rungs:
            best = min(best, rung[1])
            reached.update({t: rung for t in TARGETS if t not in reached and rung[1] <= t})
            if len(reached) == len(TARGETS) or time.perf_counter() - begin > 15:
                break
        return {"best_error": best}

    emit({**row, "ladder": True}, climb)
    for target, (effort, error, loss) in reached.items():
        call = partial(value_and_gradient, loss, x, y)
        rung = {"target": target, "effort": effort, "gradient_error": error}
        emit({**row, **rung}, partial(seconds, call, x))


def small(device: str, tiny: bool) -> None:
    """Minibatches of images."""
    for n in (20, 30) if tiny else (64, 256, 512, 1000):
        x, y, eps = clouds(n, 784, device)
        setting = Setting(eps, True, SMALL_ITERATIONS)
        for name, make in libraries(x, y, ("auto", "streamed")).items():
            row = {"library": name, "n": n, "d": 784, "debias": True}
            emit_times({**row, "iterations": SMALL_ITERATIONS}, partial(make, setting), x, y)


def batch(device: str, tiny: bool) -> None:
    size, n = (3, 20) if tiny else (64, 256)
    x, y, eps = clouds(n, 64, device, (size,))
    setting = Setting(eps, True, SMALL_ITERATIONS)
    for name, make in libraries(x, y).items():
        row = {"library": name, "batch": size, "n": n, "d": 64, "debias": True}
        emit_times({**row, "iterations": SMALL_ITERATIONS}, partial(make, setting), x, y)


def first_call(device: str, tiny: bool) -> None:
    """From the import to the first value and gradient, torch and its context being there."""
    n = 50 if tiny else 1000
    x, y, _ = clouds(n, 64, device)
    for name in libraries(x, y):
        command = [sys.executable, "-m", "benchmarks.gpu", "--first", name, "--device", device]

        def measure(command: list[str] = command) -> Row:
            command = [*command, "--size", str(n)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
            if done.returncode != 0:
                raise RuntimeError(done.stderr.strip()[-250:])
            return json.loads(done.stdout.splitlines()[-1])

        emit({"library": name, "n": n, "d": 64, "first_call": True}, measure)


def measure_first(name: str, n: int, device: str) -> Row:
    x, y, eps = clouds(n, 64, device)
    (x @ y.mT).sum().item()  # torch's own libraries are loaded
    make = libraries(x, y)[name]
    start = time.perf_counter()
    value_and_gradient(make(Setting(eps, True, ITERATIONS)), x, y)
    synchronize(x)
    return {"ms": 1e3 * (time.perf_counter() - start)}


def graph(device: str, tiny: bool) -> None:
    """A training step of a small generator: eager, and replayed from a CUDA graph."""
    import otloss

    n, d = (30, 20) if tiny else (500, 784)
    generator = torch.nn.Sequential(
        torch.nn.Linear(16, 256), torch.nn.ReLU(), torch.nn.Linear(256, d)
    ).to(device)
    optimizer = torch.optim.SGD(generator.parameters(), lr=1e-3)
    z, (_, y, eps) = torch.randn(n, 16, device=device), clouds(n, d, device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        value = otloss.sinkhorn_divergence(generator(z), y, eps)
        value.backward()
        optimizer.step()
        return value

    row = {"library": "otloss auto", "n": n, "d": d, "step": "training"}
    emit({**row, "graph": False}, partial(seconds, step, z))

    def replayed() -> Row:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        return seconds(captured.replay, z)

    if device == "cuda":
        emit({**row, "graph": True}, replayed)


# The most telling ones first: the time may run out.
BENCHMARKS: dict[str, Callable[[str, bool], None]] = {
    "small": small,
    "5000-3": iterations_at(5000, 3),
    "5000-64": iterations_at(5000, 64),
    "10000-3": iterations_at(10_000, 3),
    "10000-64": iterations_at(10_000, 64),
    "accuracy-3": accuracy_at(5000, 3),
    "accuracy-64": accuracy_at(5000, 64),
    "batch": batch,
    "graph": graph,
    "first-call": first_call,
    "50000-64": large,
    "million": million,
    "5000-512": iterations_at(5000, 512),
    "10000-512": iterations_at(10_000, 512),
}


# --------------------------------------------------------------------------------------- running


def rows_of(name: str, options: argparse.Namespace, limit: float) -> list[Row]:
    """Runs one benchmark in a process; what it printed before it failed counts."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", name, "--device", options.device]
    if options.tiny:
        command.append("--tiny")
    note = ""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = process.communicate(timeout=limit)
        if process.returncode != 0:
            note = f"ended with {process.returncode}: {errors.strip()[-300:]}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        note = f"stopped after {limit:.0f} s"
    rows = []
    for line in output.splitlines():
        try:
            rows.append({"benchmark": name, **json.loads(line)})
        except ValueError:  # something else was printed, or the line was cut off
            continue
    return [*rows, {"benchmark": name, "error": note}] if note else rows


def text(row: Row) -> str:
    rest = {k: v for k, v in row.items() if k not in ("benchmark", "ms", "ms_min", "calls")}
    time_text = f"{row['ms']:10.3f} ms" if "ms" in row else " " * 13
    return f"   {row['benchmark']:<12} {time_text}  " + " ".join(
        f"{k}={v}" for k, v in rest.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file, rewritten after every benchmark")
    parser.add_argument("--seconds", type=float, default=420, help="for everything")
    parser.add_argument("--only", help="comma-separated names")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", choices=list(BENCHMARKS), help=argparse.SUPPRESS)
    parser.add_argument("--first", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=1000, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first:
        print(json.dumps(measure_first(options.first, options.size, options.device)))
        return 0
    if options.one:
        BENCHMARKS[options.one](options.device, options.tiny)
        return 0
    from benchmarks import environment

    names = options.only.split(",") if options.only else list(BENCHMARKS)
    end, rows = time.perf_counter() + options.seconds, []
    for name in names:
        left = end - time.perf_counter()
        if left < 5:
            rows.append({"benchmark": name, "error": "no time was left"})
        else:
            rows += rows_of(name, options, min(left, options.seconds / 4))
        for row in rows:
            if row["benchmark"] == name:
                print(text(row), flush=True)
        if options.out:
            record = environment.record({}, torch.device(options.device))
            record["command"] = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
            record["libraries"] = versions()
            options.out.parent.mkdir(parents=True, exist_ok=True)
            document = {"environment": record, "rows": rows}
            options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
