"""The record of a run: identity, committed units, lock, status, progress."""
