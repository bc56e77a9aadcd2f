"""Runs programs within a time limit, several at once, and ends for sure all that they started."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 5.0  # with less left a step is not started
SECONDS_TO_END = 3.0  # between an interrupt, after which pytest tells what failed, and the end
TAIL_LINES = 30  # of the log of a step that failed


class Step(NamedTuple):
    """A program, and what must be found in its output for it to have passed."""

    name: str
    command: list[str]
    limit: float = 1e9  # seconds
    proof: str = ""  # pattern: a test run whose tests were all skipped ends well too
    environment: dict[str, str] | None = None


@dataclass
class Result:
    name: str
    status: str  # passed, failed, stopped or not started
    seconds: float
    command: str
    last_line: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


@dataclass
class Running:
    """A started step. Its process leads a group, which is ended as a whole."""

    step: Step
    log: Path
    seconds: float  # that it may take
    start: float = field(default_factory=time.monotonic)
    interrupted: float | None = None

    def __post_init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        self.output: IO[bytes] = self.log.open("wb")
        self.process = subprocess.Popen(
            self.step.command,
            cwd=ROOT,
            env={**environment, **(self.step.environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def ended(self) -> bool:
        """Whether it has ended; past its time it is interrupted, then killed."""
        now = time.monotonic()
        if self.interrupted is None and now - self.start > self.seconds:
            self.interrupted = now
            self.signal(signal.SIGINT)
        elif self.interrupted is not None and now - self.interrupted > SECONDS_TO_END:
            self.signal(signal.SIGKILL)
        return self.process.poll() is not None

    def finish(self) -> Result:
        """Ends whatever is left of the group, and says how it went."""
        self.signal(signal.SIGKILL)
        code = self.process.wait()
        self.output.close()
        text = self.log.read_text(errors="replace")
        if self.interrupted is not None:
            status = "stopped"
        else:
            status = "passed" if code == 0 and re.search(self.step.proof, text) else "failed"
        lines = text.strip().splitlines()
        seconds = round(time.monotonic() - self.start, 1)
        command = shlex.join(self.step.command)
        return Result(self.step.name, status, seconds, command, lines[-1] if lines else "")


def run(
    steps: Sequence[Step],
    end: float,
    logs: Path,
    together: int = 1,
    report: Callable[[Result, Path], None] = lambda result, log: None,
) -> list[Result]:
    """Runs ``steps`` in their order, ``together`` at a time, until ``end`` (``time.monotonic``).

    ``logs/NAME.log`` is the output of a step; ``report`` is called as each one ends.
    """
    logs.mkdir(parents=True, exist_ok=True)
    pending, running, results = list(steps), list[Running](), list[Result]()

    def done(result: Result, log: Path) -> None:
        results.append(result)
        report(result, log)

    try:
        while pending or running:
            while pending and len(running) < together:
                step = pending.pop(0)
                log = logs / f"{step.name}.log"
                left = end - SECONDS_TO_END - time.monotonic()
                if left < LEAST_SECONDS:
                    done(Result(step.name, "not started", 0.0, shlex.join(step.command)), log)
                else:
                    running.append(Running(step, log, min(step.limit, left)))
            for item in [item for item in running if item.ended()]:
                running.remove(item)
                done(item.finish(), item.log)
            time.sleep(0.05)
    finally:  # an interrupt or an error here must leave nothing running either
        for item in running:
            item.finish()
    return results
