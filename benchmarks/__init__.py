"""Measurements of the operator against other implementations, and of stage 1. Nothing of the product imports this.

`python -m benchmarks.operator` and `python -m benchmarks.distill`; README.md says what the columns mean.
"""
