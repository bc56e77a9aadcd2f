"""What the training scripts share."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UsageError(ValueError):
    """What the command line asks for cannot be done; the message says why."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of ``path`` that takes its place once it is written."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


_NEEDED = {name: name for name in ("matplotlib", "scipy", "tqdm")}
_NEEDED |= {"sklearn": "scikit-learn", "PIL": "pillow"}
if _missing := [name for module, name in _NEEDED.items() if not importlib.util.find_spec(module)]:
    raise SystemExit(
        f"the examples need {', '.join(_missing)}: pip install -e '.[examples]' in the checkout"
    )
