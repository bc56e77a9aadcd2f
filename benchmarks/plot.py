"""Draw the figure of a result: ``python -m benchmarks.plot benchmarks/results/cpu/*.json``."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path


def draw(path: Path) -> Path:
    """Write ``<suite>.png`` beside ``<suite>.json``."""
    document = json.loads(path.read_text())
    suite = importlib.import_module(f"benchmarks.suites.{document['suite']}")
    figure = suite.figure(document["result"])
    environment = document["environment"]
    figure.suptitle(
        f"{document['title']}\n{environment['device']}, {environment['threads']} thread(s), "
        f"torch {environment['torch']}",
        fontsize=8,
    )
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    for path in parser.parse_args().results:
        print(draw(path))


if __name__ == "__main__":
    main()
