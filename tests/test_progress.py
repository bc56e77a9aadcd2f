"""What long solves show, and that nothing does unless asked to."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import randn

import otloss
from otloss import ops

MODULE = sys.modules["otloss.progress"]

pytestmark = pytest.mark.skipif(not ops.NATIVE, reason="the kernels report")


def long_solve(seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    x, y = (randn(rng, 3000, 3) for _ in range(2))
    return otloss.sinkhorn_divergence(x, y, 1e-2, tol=1e-5, method="streamed")


@pytest.fixture
def lines(monkeypatch):
    monkeypatch.setattr(MODULE, "_tqdm", lambda: None)
    monkeypatch.setattr(MODULE, "INTERVAL", 0.0)


def test_a_line_says_time_sweeps_and_error(lines, capsys):
    with otloss.progress(after=0.0):
        long_solve()
    shown = capsys.readouterr().err.splitlines()
    assert shown
    assert all(re.fullmatch(r"otloss: \d+ s, \d+ sweeps, error \d\.\de[-+]\d\d", s) for s in shown)


def test_nothing_unless_it_is_on_and_the_solve_is_long(lines, capsys):
    long_solve()
    with otloss.progress(after=600.0):  # more than a busy machine makes of half a second
        long_solve()
        with otloss.progress(False, after=0.0):
            long_solve()
    long_solve()
    assert capsys.readouterr().err == ""


def test_a_switch_lasts_and_a_block_restores_what_was(lines, capsys):
    outer = otloss.progress(after=0.0)
    with otloss.progress(False):
        long_solve()
    assert capsys.readouterr().err == ""
    long_solve()
    assert capsys.readouterr().err != ""
    outer.__exit__(None, None, None)
    long_solve()
    assert capsys.readouterr().err == ""


def test_a_bar_where_tqdm_is_installed(capsys):
    pytest.importorskip("tqdm")
    with otloss.progress(after=0.0):
        long_solve()
    assert "sweeps, error" in capsys.readouterr().err


def test_solves_of_several_threads_end_on_their_own(lines, capsys):
    with otloss.progress(after=0.0) as shown, ThreadPoolExecutor(2) as pool:
        values = list(pool.map(long_solve, range(4)))
    assert [float(v) for v in values] == [float(long_solve(seed)) for seed in range(4)]
    assert not shown._calls


def test_what_showing_raises_ends_the_solve(lines, monkeypatch):
    """And the next one is none the worse for it."""

    def broken(*_: object, **__: object) -> None:
        raise OSError("no space left")

    with otloss.progress(after=0.0), monkeypatch.context() as context:
        context.setattr("builtins.print", broken)
        with pytest.raises(OSError, match="no space"):
            long_solve()
    assert torch.isfinite(long_solve())


def test_enabled_is_a_truth_value():
    with pytest.raises(TypeError, match="enabled must be True or False"):
        otloss.progress("yes")
