"""``generate`` as a job on Ray."""
