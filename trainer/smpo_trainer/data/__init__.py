"""From shards to batches: the table of states, their order, the loader."""
