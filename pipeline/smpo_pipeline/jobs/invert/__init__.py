"""``invert`` as a job on Ray."""
