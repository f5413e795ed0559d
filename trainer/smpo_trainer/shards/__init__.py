"""Shards on disks and object stores: which belong to a run, fetching, caching."""
