"""Outputs of the stages on the hub: what of a folder is shared, and the cards that describe it."""
