"""``score`` as a job on Ray."""
