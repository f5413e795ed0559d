"""Weigh pairs by how much they look like those of a target distribution: DoRA's estimator (arXiv 2504.05831)."""
