"""Commands that compare, merge and share models."""
