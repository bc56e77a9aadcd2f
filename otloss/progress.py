"""What long solves show while they run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import threading
import time
from typing import Any

from otloss import ops

__all__ = ["progress"]

INTERVAL = 5.0  # seconds between printed lines


class progress:  # noqa: N801 - a switch, like torch.no_grad
    """Shows the progress of solves that take longer than a few seconds; off by default.

    Statement or context manager, like ``torch.autograd.set_grad_enabled``::

        otloss.progress()            # from here on, until otloss.progress(False)
        with otloss.progress():      # within the block
            loss = otloss.sinkhorn_divergence(x, y, eps)

    A bar of tqdm if that is installed, else a line on stderr every few seconds: the sweeps of the
    problem that is being solved and its marginal error, which ends the solve at ``tol``. Both start
    anew for each problem of a loss. Solves on a GPU, in plain torch and of ``n_iters`` iterations
    show nothing, and neither do gradients.

    Args:
        enabled: whether to show it.
        after: seconds that a call may take before anything is shown.

    Raises:
        TypeError: ``enabled`` is not a bool.

    Example:
        >>> with otloss.progress(after=10.0):  # silent: this takes no ten seconds
        ...     loss = otloss.sinkhorn_divergence(torch.rand(20, 2), torch.rand(30, 2), eps=0.1)
    """

    _current: progress | None = None

    def __init__(self, enabled: bool = True, *, after: float = 3.0) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(f"enabled must be True or False, got {enabled!r}")
        self.enabled, self.after = enabled, after
        self._before = progress._current
        self._calls: dict[int, _Call] = {}  # by thread
        self._switch(self)

    def __enter__(self) -> progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._switch(self._before)

    @staticmethod
    def _switch(state: progress | None) -> None:
        progress._current = state
        ops.set_progress(state._told if state is not None and state.enabled else None)

    def _told(self, sweeps: int, error: float) -> None:
        thread = threading.get_ident()
        call = self._calls.setdefault(thread, _Call())
        if sweeps == 0:
            call.end()
            del self._calls[thread]
        else:
            call.show(sweeps, error, self.after)


class _Call:
    """What is shown of one operation, from its first report on."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._bar: Any = None

    def show(self, sweeps: int, error: float, after: float) -> None:
        now = time.monotonic()
        if now - self._start < after:
            return
        if self._bar is None and _tqdm() is not None:
            form = "otloss: {elapsed}, {n} sweeps{postfix}"
            self._bar = _tqdm()(bar_format=form, leave=False)
        if self._bar is not None:
            self._bar.n = sweeps
            self._bar.set_postfix_str(f"error {error:.1e}")
        elif now - self._last >= INTERVAL or self._last == self._start:
            self._last = now
            line = f"otloss: {now - self._start:.0f} s, {sweeps} sweeps, error {error:.1e}"
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()


@functools.cache
def _tqdm() -> Any:
    """The bar's class, None if tqdm is not installed."""
    if importlib.util.find_spec("tqdm") is None:
        return None
    return importlib.import_module("tqdm").tqdm
