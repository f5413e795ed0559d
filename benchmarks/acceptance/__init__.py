"""The checks of `benchmarks/gpu_acceptance.py`, and what they share."""
