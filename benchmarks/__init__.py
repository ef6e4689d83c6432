"""Measurements behind the documentation, each run as `python -m benchmarks.NAME`. No part of the installed package."""
