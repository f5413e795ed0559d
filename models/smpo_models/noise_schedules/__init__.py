"""Noise schedules: one file each."""
