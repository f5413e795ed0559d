"""A run's folder: the result, checkpoints, steps that were skipped."""
