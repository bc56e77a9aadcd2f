"""Train the small CNN whose logits and features the metrics use.

    python examples/train_classifier.py --data fashion --out runs/classifier_fashion

The other scripts train it themselves when ``classifier_<data>`` is not beside their ``--out``.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import classifier


def main(argv: Sequence[str] | None = None) -> None:
    classifier.train(classifier.parse(argv))


if __name__ == "__main__":
    main()
