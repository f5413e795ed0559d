"""Commands that turn pairs or prompts into shards, and estimate what that costs."""
