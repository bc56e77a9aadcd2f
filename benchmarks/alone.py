"""What measurements that are programs of their own share: ``python -m benchmarks.NAME``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.environment import record

RESULTS = Path(__file__).resolve().parent / "results"
Result = TypeVar("Result")


def markdown(head: list[str], rows: list[list[str]], words: int = 1) -> str:
    """A table whose first ``words`` columns are words and the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])


def keep(path: Path, result: Any, device: torch.device | None = None) -> None:
    """Writes a result with the environment and the command that measured it."""
    main = sys.modules["__main__"].__spec__
    command = " ".join(["python -m", main.name if main else __name__, *sys.argv[1:]])
    environment = record({}, device or torch.device("cpu")) | {"command": command}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment, "result": result}, indent=1) + "\n")


def run(
    name: str, description: str, measure: Callable[[], Result], table: Callable[[Result], str]
) -> None:
    """Measures, keeps the result as ``NAME.json`` and prints its table."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    result = measure()
    keep(out / f"{name}.json", result)
    print(table(result))
