"""What a result depends on besides the code: machine, versions, threads, command line."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError):
            level, kind, size = ((index / f).read_text().strip() for f in ("level", "type", "size"))
            caches[f"L{level} {kind}"] = size
    return caches


def _git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _otloss_config() -> str:
    """What ``otloss.show_config()`` prints or returns, with the checkout's place left out."""
    import otloss

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        returned = otloss.show_config()
    text = printed.getvalue() or str(returned)
    return text.replace(str(ROOT), ".").strip()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def record(peers: dict[str, ModuleType], device: torch.device) -> dict[str, Any]:
    """The environment as plain JSON values."""
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "sources_changed": bool(_git("status", "--porcelain", "--", "otloss", "csrc")),
        "device": device_name(device),
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "caches": _caches(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.system() + " " + platform.machine(),
        "peers": {name: module.version() for name, module in peers.items()},
    }
    if "otloss" in peers:
        result["otloss_config"] = _otloss_config()
    return result
