"""What crashes workers: which pair was at work, and which pair it is."""
