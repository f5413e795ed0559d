"""Metrics, their logs, health checks and the console."""
