"""Run benchmark suites: ``python -m benchmarks.run iteration overhead``.

Writes ``<out>/<device>/<suite>.json`` and ``.png``, and prints each suite's table.
"""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.process import keep_freed_memory, set_thread_variables

if TYPE_CHECKING:
    from benchmarks.suites import Context

RESULTS = Path(__file__).resolve().parent / "results"


def _parser(suites: list[str]) -> argparse.ArgumentParser:
    from benchmarks.suites import NAMES

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__.splitlines()[0]
    )
    parser.add_argument("suites", nargs="+", choices=NAMES, metavar="suite", help=", ".join(NAMES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=15, help="interleaved rounds")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: for one thread, busy machine"
    )
    parser.add_argument("--peers", help="comma-separated; default: every one that can run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-plot", action="store_true")
    for name in suites:
        importlib.import_module(f"benchmarks.suites.{name}").add_arguments(parser)
    return parser


def _threads_from_command_line() -> int:
    """The thread count, before anything is imported that reads it from the environment."""
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--threads", type=int, default=1)
    return early.parse_known_args()[0].threads


def _slug(device: str, name: str) -> str:
    """The results folder: ``cpu``, or the GPU's name in lower case."""
    return device if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _run_suite(context: Context) -> None:
    from benchmarks import plot

    suite = importlib.import_module(f"benchmarks.suites.{context.path.stem}")
    print(f"\n{suite.TITLE}", flush=True)
    result = suite.run(context)
    context.save(result)
    print(suite.table(result))
    print(f"-> {context.path.name}", flush=True)
    if not context.options.no_plot:
        plot.draw(context.path)


def main() -> None:
    # BLAS and OpenMP read their thread counts when loaded: set them before torch is imported.
    threads = _threads_from_command_line()
    set_thread_variables(threads)
    keeps_memory = keep_freed_memory()
    import torch

    from benchmarks import environment, peers
    from benchmarks.suites import NAMES, Context

    parser = _parser(list(NAMES))
    options = parser.parse_args()
    adds_up = options.threads != 1 and options.suites != ["floors"]
    if options.clock == "cpu" and (options.device != "cpu" or adds_up):
        parser.error("--clock cpu adds up threads and does not see a GPU: one thread only")
    torch.set_num_threads(threads)
    device = torch.device(options.device)
    wanted = options.peers.split(",") if options.peers else None
    usable, skipped = peers.load(wanted)
    for name, reason in skipped.items():
        print(f"{name}: skipped, {reason}")
    record = environment.record(usable, device)
    record |= {"allocator_keeps_memory": keeps_memory, "clock": options.clock}
    folder = options.out / _slug(device.type, environment.device_name(device))
    for name in options.suites:
        path = folder / f"{name}.json"
        _run_suite(Context(usable, device, options, record, path, dict(skipped)))


if __name__ == "__main__":
    main()
