"""The toy world: a small text-to-image world whose true reward is known exactly."""
