"""Stages 1 and 2: score preference pairs, invert them into shards; evaluate and inspect."""
