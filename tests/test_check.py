"""The kernels against plain torch on the machine at hand: at the first call, and for reports."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import otloss
from otloss import check, first_use, ops

CPU = torch.device("cpu")


@pytest.fixture
def used(monkeypatch):
    """As on a machine with one GPU, which is the CPU here, before its first call."""
    served = []
    monkeypatch.setattr(first_use, "_used", set())
    monkeypatch.setattr(ops, "CUDA_KERNELS", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040, raising=False)
    monkeypatch.setattr(ops, "build_info", lambda: {"cuda_architectures": "80;90a"})
    monkeypatch.setattr(ops, "serve_in_plain_torch", served.append)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return served


def use():
    first_use.first_use(torch.ones(1))


def test_kernels_that_agree_stay(used):
    use()
    assert not used


def test_kernels_agree_under_another_default_device():
    with torch.device("meta"):
        assert first_use.disagreement(CPU) is None


@pytest.mark.parametrize("name", ["solve", "envelope_backward"])
def test_kernels_that_disagree_are_not_used(used, monkeypatch, name):
    right = getattr(ops, name)

    def off(*arguments):
        first, *rest = right(*arguments)
        scaled = [1.1 * t for t in first] if isinstance(first, list) else 1.1 * first
        second = [[1.1 * t for t in rest[0]], *rest[1:]] if isinstance(first, list) else rest
        return scaled, *second

    monkeypatch.setattr(ops, name, off)
    with pytest.warns(
        UserWarning,
        match=r"a GPU: the (value|gradient) .* up to 12.4, .* 80;90a",
    ):
        use()
    use()  # said once
    assert used == ["CUDA"]


def test_kernels_that_cannot_be_loaded_are_not_used(used, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(ops, "solve", fails)
    with pytest.warns(UserWarning, match="no kernel image is available for execution on the dev"):
        use()
    assert used == ["CUDA"]


def test_it_can_be_left_out(used, monkeypatch):
    monkeypatch.setattr(ops, "solve", None)
    monkeypatch.setenv("OTLOSS_CUDA_CHECK", "0")
    use()
    monkeypatch.delenv("OTLOSS_CUDA_CHECK")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    use()
    assert not used


def test_plain_torch_takes_the_place_of_kernels():
    """In a process of its own, since there is no way back."""
    program = """
import torch, otloss
from otloss import ops, reference
x = torch.rand(9, 2, requires_grad=True)
before = otloss.sinkhorn_loss(x, x.detach() + 1, 0.1)
ops.serve_in_plain_torch("CPU")
reference.operations.solve_batch = None  # what only plain torch calls
try:
    otloss.sinkhorn_loss(x, x.detach() + 1, 0.1)
except TypeError:
    print("served by", "plain torch")
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "served by plain torch" in run.stdout


@pytest.mark.slow
def test_report(capsys):
    assert check.main() == 0
    assert "216 calls compared with plain torch, 0 wrong" in capsys.readouterr().out


def test_report_finds_what_is_wrong(monkeypatch, capsys):
    right = otloss.sinkhorn_divergence

    def off(*args, **options):
        return right(*args, **options) * (1.01 if options["method"] == "streamed" else 1.0)

    monkeypatch.setattr(otloss, "sinkhorn_divergence", off)
    error = check._error(CPU, "streamed", "cosine", torch.float32, (4, 5, 2), {})
    assert error == "value is off by 1.0e-02"
