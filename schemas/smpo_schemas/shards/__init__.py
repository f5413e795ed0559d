"""Shards: samples and their tars, single states, the index of where each lies."""
