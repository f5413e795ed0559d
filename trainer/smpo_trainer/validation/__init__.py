"""Validation: held-out pairs, and images of fixed prompts."""
