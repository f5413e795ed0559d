"""Autoencoders: one file per class. Latents are normalised as the pipelines that use the class do."""
