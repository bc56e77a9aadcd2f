"""Run every experiment of the page of results, one after the other.

    python examples/reproduce.py --list                       # what is finished, and what is left
    python examples/reproduce.py --only french li-liang       # these experiments, or runs by name
    python examples/reproduce.py --hours 3                    # as much as there is time for

The commands are those of ``comparison/settings.py``, each in a folder of ``--runs`` of its own.
What is finished is skipped and what was begun is continued, so the same command goes on after a
stop by Ctrl-C, by SIGTERM, or at the end of ``--hours``. A run that fails is named at the end and
the next one begins. ``compare.py`` makes the page of what is there.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import options
from comparison.settings import COMMANDS, EXPERIMENTS, names_of

HERE = Path(__file__).resolve().parent


def chosen(only: Sequence[str]) -> list[str]:
    """Names of runs, of all experiments or of these experiments, runs and their seeds."""
    names: list[str] = []
    for word in only or EXPERIMENTS:
        if word in EXPERIMENTS:
            names += [name for base in EXPERIMENTS[word] for name in names_of(base)]
        elif word in COMMANDS:
            names.append(word)
        else:
            raise options.UsageError(
                f"--only has {word}, expected {', '.join(EXPERIMENTS)} or a run of --list"
            )
    return list(dict.fromkeys(names))


def words_of(name: str, runs: Path) -> list[str]:
    """The command line of a run, which continues what is there of it."""
    script, *words = shlex.split(COMMANDS[name].format(runs=runs))
    begun = script != "sweep_eps.py" and (runs / name / "ckpt.pt").is_file()
    out = ["--out", str(runs / name), *(["--resume"] if begun else [])]
    return [sys.executable, str(HERE / script), *words, *out]


def finished(name: str, runs: Path) -> bool:
    return (runs / name / "metrics.json").is_file()


def state(name: str, runs: Path) -> str:
    """In a word, for --list."""
    return (
        "finished" if finished(name, runs) else "begun" if (runs / name).is_dir() else "not begun"
    )


class Queue:
    """Runs processes one at a time, and hands on what stops it."""

    def __init__(self, hours: float | None) -> None:
        self.ends = time.monotonic() + hours * 3600 if hours else None
        self.stopped = False
        self.process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, *_: object) -> None:
        """The run at hand saves itself on SIGTERM; a second one ends it at once."""
        self.stopped = True
        if self.process:
            self.process.terminate()

    def run(self, words: Sequence[str]) -> bool:
        """``False`` for a command that failed."""
        left = max(0.0, self.ends - time.monotonic()) if self.ends else None
        # A session of its own: Ctrl-C reaches it through `stop`, and so only once.
        self.process = subprocess.Popen(words, start_new_session=True)
        try:
            return self.process.wait(left) == 0
        except subprocess.TimeoutExpired:
            self.stop()
            return self.process.wait() == 0
        finally:
            self.process = None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="examples/reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    add("--only", nargs="+", default=[], help="experiments or runs, in this order (default: all)")
    add("--hours", type=float, help="stop after this time, in the middle of a run if need be")
    add("--list", action="store_true", help="show the commands and how far they are")
    args = parser.parse_args(argv)
    names = chosen(args.only)
    if args.list:
        for name in names:
            print(f"{state(name, args.runs):>9}  {name:24} {COMMANDS[name]}")
        return
    queue, failed = Queue(args.hours), []
    for name in names:
        if finished(name, args.runs):
            continue
        words = words_of(name, args.runs)
        print(f"\n{name}: {shlex.join(words[1:])}", flush=True)
        worked = queue.run(words)
        if queue.stopped:
            print("stopped; the same command continues")
            return
        if not worked or not finished(name, args.runs):
            failed.append(name)
    print(f"\n{len(names) - len(failed)} of {len(names)} runs are finished")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    options.run_from_shell(main)
