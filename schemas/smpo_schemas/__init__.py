"""The data contract: pairs, scores, shards, manifest, and what scores mean."""
