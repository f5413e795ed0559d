"""Experiments about where the pairs come from, and what labels them."""
