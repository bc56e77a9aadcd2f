"""Signals during an operation: what their handlers raise leaves it as it is, in place of a result;
handlers that return change nothing; calls of other threads are left alone."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import METHODS, randn, slow_but
from torch import Tensor

import otloss

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")

FOREVER = 10**8
CPU = ("dense", "streamed")


class Ended(BaseException):
    """No library knows it, so nothing can have made it up."""


@contextmanager
def alarm(handler: Callable[..., Any], first: float, interval: float = 0) -> Iterator[None]:
    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, first, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def ended(error: BaseException | None = None, after: float = 0.1) -> Iterator[None]:
    """What runs within is ended by an alarm, at once, and what its handler raises arrives. Time is
    the processor's: others may use the machine, too."""
    error = error or Ended()

    def handler(*_: Any) -> None:
        raise error

    start = time.process_time()
    with pytest.raises(type(error)) as caught, alarm(handler, after):
        yield
    assert caught.value is error
    assert time.process_time() - start < after + 10


def endless(method: str, n: int = 60, **options: Any) -> Tensor:
    x = torch.linspace(0, 1, n)[:, None]
    return otloss.sinkhorn_divergence(
        x, x**2, 0.1, n_iters=FOREVER, backward="envelope", method=method, **options
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "error", [TimeoutError("late"), SystemExit(3), KeyboardInterrupt(), Ended()], ids=repr
)
def test_what_a_handler_raises_arrives(method, count, error, threads):
    torch.set_num_threads(count)
    with ended(error):
        endless(method)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_thread_that_waits_for_others_listens(swapped, threads):
    """Of three problems one takes half a minute, and it may be the calling thread's or not."""
    torch.set_num_threads(2)
    clouds = torch.linspace(0, 1, 2000)[:, None], torch.zeros(2, 1)
    with ended(after=0.5):
        otloss.sinkhorn_divergence(
            *clouds[:: -1 if swapped else 1], 0.1, n_iters=30_000, backward="envelope"
        )


@pytest.mark.parametrize("method", CPU)
@pytest.mark.parametrize("backward", ["unrolled", "implicit", "envelope"])
def test_backward(method, backward, rng):
    """Nothing of an interrupted gradient is added to what is there."""
    n = 400 if backward == "unrolled" else 12_000 if method == "streamed" else 5000
    options = {"n_iters": 3000} if backward == "unrolled" else {"tol": 0.5}
    x, y = randn(rng, n, 3).requires_grad_(), randn(rng, n, 3)
    objective = "transport" if backward == "implicit" else "regularized"
    loss = otloss.sinkhorn_loss(
        x, y, 0.5, method=method, backward=backward, objective=objective, **options
    )
    with ended(after=0.06):
        loss.backward()
    assert x.grad is None


@pytest.mark.parametrize("method", CPU)
def test_handlers_that_return_change_nothing(method, rng, threads):
    torch.set_num_threads(2)
    x, y = randn(rng, 300, 3), randn(rng, 200, 3)

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        loss = otloss.sinkhorn_divergence(leaf, y, 0.1, n_iters=2000, method=method)
        return [loss, *torch.autograd.grad(loss, leaf)]

    heard = list[float]()

    def handler(*_: Any) -> None:
        heard.append(float(otloss.sinkhorn_loss(x[:5], y[:5], 0.1)))  # an operation within another

    expected = run()
    with alarm(handler, 0.01, 0.06):
        got = run()
    assert len(set(heard)) == 1
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_other_threads_are_left_alone(rng):
    """Also those that outlive a time limit on their result."""
    x, y = randn(rng, 300, 3), randn(rng, 300, 3)

    def solve() -> Tensor:
        return otloss.sinkhorn_loss(x, y, 0.1, n_iters=8000, backward="envelope")

    expected = solve()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(solve) for _ in range(2)]
        with pytest.raises(TimeoutError):
            futures[0].result(timeout=0.01)
        with ended(after=0.05):
            endless("dense")
        assert not all(future.done() for future in futures)
        for future in futures:
            assert torch.equal(future.result(), expected)


def test_a_warm_start_is_not_made_of_what_was_stopped(rng):
    x, y = randn(rng, 50, 2), randn(rng, 40, 2)
    losses = [otloss.SinkhornDivergence(0.1, warm_start=True) for _ in range(2)]
    for loss in losses:
        loss(x, y)
    converging = losses[0].options
    losses[0].options = converging._replace(n_iters=FOREVER)
    with ended():
        losses[0](x + 0.1, y)
    losses[0].options = converging
    one, other = (loss(x + 0.1, y) for loss in losses)
    assert torch.equal(one, other)


@pytest.mark.slow
def test_compiled():
    function = torch.compile(lambda: endless("dense"), fullgraph=True, backend="aot_eager")
    with ended(after=3):
        function()


def program(text: str, number: int) -> tuple[int, str]:
    """Exit status and errors of a program that is sent a signal half a second after `ready`."""
    command = [sys.executable, "-c", textwrap.dedent(text)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell starts background jobs, and so these tests, with SIGINT ignored.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, preexec_fn=heed, **pipes) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.5)
            assert process.poll() is None
            process.send_signal(number)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    return process.returncode, errors


ENDLESS = """
        x, y = torch.randn(600, 2), torch.randn(500, 2)
        otloss.sinkhorn_loss(x, y, 0.1)
        print("ready", flush=True)
        otloss.sinkhorn_divergence(
            x, y, 0.1, n_iters=100_000_000, method="{method}", backward="envelope"
        )
"""


@pytest.mark.parametrize("method", slow_but(METHODS, "dense"))
def test_ctrl_c(method):
    """Python's own handler ends a solve that would take hours, within a second or two."""
    status, errors = program(
        "        import torch, otloss" + ENDLESS.format(method=method), signal.SIGINT
    )
    assert status != 0
    assert "KeyboardInterrupt" in errors


def test_any_thread_may_import():
    text = """
        import signal, sys, threading
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        def first():
            import otloss
        thread = threading.Thread(target=first)
        thread.start()
        thread.join()
        import torch, otloss"""
    assert program(text + ENDLESS.format(method="dense"), signal.SIGTERM) == (7, "")


def test_python_may_end_during_a_solve_of_a_daemon_thread():
    text = """
        import threading, time, torch, otloss
        x = torch.randn(600, 2)
        options = {"n_iters": 100_000_000, "backward": "envelope"}
        def solve():
            otloss.sinkhorn_loss(x, x, 0.1, **options)
        threading.Thread(target=solve, daemon=True).start()
        time.sleep(1)"""
    command = [sys.executable, "-c", textwrap.dedent(text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_listens_in_its_own_main_thread():
    """Here that of the pool, which forks."""

    def forked() -> int:
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        faulthandler.dump_traceback_later(60, exit=True)
        torch.set_num_threads(1)  # torch has no others in a forked process
        try:
            with ended():
                endless("dense")
        except BaseException:
            os._exit(1)
        os._exit(0)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(forked).result() == 0


def test_a_notebook_cell_is_interrupted():
    """Its kernel is sent the signal, raises KeyboardInterrupt in the cell, and goes on."""
    pytest.importorskip("ipykernel")
    manager = pytest.importorskip("jupyter_client.manager")
    kernel, client = manager.start_new_kernel(cwd=str(Path(__file__).parents[1]))

    def reply(code: str, seconds: float | None = None) -> dict[str, Any]:
        call = client.execute(textwrap.dedent(code))
        if seconds is not None:
            time.sleep(seconds)
            kernel.interrupt_kernel()
        while True:
            message = client.get_shell_msg(timeout=60)
            if message["parent_header"].get("msg_id") == call:
                return message["content"]

    try:
        assert reply("""
            import torch, otloss
            x = torch.linspace(0, 1, 300)[:, None]
            before = otloss.sinkhorn_loss(x, x**2, 0.1)
        """)["status"] == "ok"  # fmt: skip
        endless = "otloss.sinkhorn_loss(x, x**2, 0.1, n_iters=100_000_000, backward='envelope')"
        assert reply(endless, seconds=1)["ename"] == "KeyboardInterrupt"
        after = "assert torch.equal(otloss.sinkhorn_loss(x, x**2, 0.1), before)"
        assert reply(after)["status"] == "ok"
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
