"""A run's folder: the result, checkpoints, records of what was left out."""
