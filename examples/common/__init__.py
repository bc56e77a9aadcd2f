"""What the training scripts share."""

import importlib.util


class UsageError(ValueError):
    """What the command line asks for cannot be done; the message says why."""


_NEEDED = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "scipy": "scipy", "PIL": "pillow"}
if _missing := [name for module, name in _NEEDED.items() if not importlib.util.find_spec(module)]:
    raise SystemExit(
        f"the examples need {', '.join(_missing)}: pip install -e '.[examples]' in the checkout"
    )
