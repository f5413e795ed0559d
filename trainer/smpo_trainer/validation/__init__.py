"""Held-out pairs, and images of fixed prompts."""
