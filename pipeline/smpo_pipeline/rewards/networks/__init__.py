"""What rewards are made of: the networks behind them, the pixels and prompts that these take, weight files."""
