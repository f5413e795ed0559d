"""Units of input on their way to the actors."""
