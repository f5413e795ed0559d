"""Tuned denoisers: LoRAs and their file formats, merging, and guidance by a negative model."""
