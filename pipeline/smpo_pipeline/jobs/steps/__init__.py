"""``steps`` as a job on Ray."""
