"""Train the small CNN whose logits and features the metrics use: see ``common/classifier.py``."""

from __future__ import annotations

from collections.abc import Sequence

from common import classifier


def main(argv: Sequence[str] | None = None) -> None:
    classifier.train(classifier.parse(argv))


if __name__ == "__main__":
    main()
