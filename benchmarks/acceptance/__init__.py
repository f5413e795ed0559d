"""The checks of `benchmarks/gpu_acceptance.py` and their shared code."""
