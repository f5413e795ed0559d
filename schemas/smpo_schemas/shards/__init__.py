"""Shards: write and read tars of samples, read single states, index all samples."""
