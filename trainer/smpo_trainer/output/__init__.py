"""The output folder of a run: the result, checkpoints, skipped steps."""
