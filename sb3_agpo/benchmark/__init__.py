"""Benchmarks of this package: ``python -m sb3_agpo.benchmark --help``."""
