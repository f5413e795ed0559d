"""Image files -> model-sized pixels."""
