"""The instruction sets that the kernels have versions for.

One is chosen when the library is loaded, so each is measured in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import torch

LEVELS: Final = ("avx512", "avx2", "baseline")
ROOT = Path(__file__).resolve().parents[1]


def at_each_level(module: str, *arguments: Any) -> dict[str, Any]:
    """What the module's ``worker(*arguments)`` returns, by instruction set."""
    code = (
        f"import json, torch; torch.set_num_threads({torch.get_num_threads()}); "
        f"from {module} import worker; print(json.dumps(worker(*{arguments!r})))"
    )
    found = {}
    for level in LEVELS:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OTLOSS_SIMD": level},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found[level] = json.loads(done.stdout)
    return found
