"""Hostile inputs from seeds, and what the readers make of them: ``python -m tests.fuzz``."""
