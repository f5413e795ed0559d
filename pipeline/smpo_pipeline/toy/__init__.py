"""The embedded world: a small text-to-image world whose true reward can be computed exactly."""
