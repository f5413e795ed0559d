"""A run's record: identity, committed units, lock, status, progress."""
