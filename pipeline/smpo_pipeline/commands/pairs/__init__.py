"""Commands that make, score, weigh and choose pairs."""
