"""Benchmarks of otloss and its peers: ``python -m benchmarks.run --help``."""
