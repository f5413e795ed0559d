"""What keeps a run from going wrong: terms of the loss, a beta that adapts, and detectors that watch the metrics."""
