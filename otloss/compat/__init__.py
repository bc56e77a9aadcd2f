"""The calls of other libraries, answered by otloss: change the import, and nothing else.

Values are those of the original where it is right, and gradients are exact. docs/coming-from.md
lists the calls, the conventions behind them, and where an original is wrong.
"""

from otloss.compat import geomloss, pot

__all__ = ["geomloss", "pot"]
