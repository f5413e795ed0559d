"""Commands about runs as a whole: their progress, their output, rounds of them, and data to try them on."""
