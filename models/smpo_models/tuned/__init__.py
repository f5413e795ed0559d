"""Denoisers that were trained further: LoRAs and their formats, merged ones, a negative one beside another."""
