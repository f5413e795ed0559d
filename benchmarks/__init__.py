"""Experiments and measurements behind the numbers in docs/, each run from the repository's root by ``python -m``."""
