"""Metrics, their log, health, and what the console shows."""
