"""Faults of a job that Ray does not handle."""
