"""How far a loop is: a line that is rewritten on a terminal, one every few seconds in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

TERMINAL_SECONDS, LOG_SECONDS = 0.1, 5.0  # between two lines


class Progress:
    """Call it after every step; as a context manager it ends with the line of the last one."""

    def __init__(self, name: str, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        self.name, self.total, self.done, self.first = name, total, done, done
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.began = self.shown = time.monotonic()
        self.notes = ""
        self.width = 0

    def __call__(self, done: int) -> None:
        self.done = done
        interval = TERMINAL_SECONDS if self.terminal else LOG_SECONDS
        if done < self.total and time.monotonic() - self.shown >= interval:
            self._show("" if self.terminal else "\n")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._show("\n")

    def _show(self, end: str) -> None:
        self.shown = time.monotonic()
        rate = (self.done - self.first) / max(self.shown - self.began, 1e-9)
        parts = [f"{self.name}: step {self.done} of {self.total}", f"{rate:.3g} steps/s"]
        if rate > 0 and self.done < self.total:
            parts.append(f"{(self.total - self.done) / rate:.0f} s left")
        line = ", ".join(filter(None, [*parts, self.notes]))
        # Spaces over what a longer line before it left on the terminal.
        padded = f"\r{line:<{self.width}}" if self.terminal else line
        self.width = len(line)
        print(padded, end=end, file=self.stream, flush=True)
