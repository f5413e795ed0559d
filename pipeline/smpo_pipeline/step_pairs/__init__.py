"""Pairs of draws of the sampler's own steps."""
