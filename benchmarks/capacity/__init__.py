"""What fits into memory, and what a hundred million pairs need."""
