"""Stage 3: preference optimization from shards."""
