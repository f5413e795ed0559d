"""Autoencoders: one file a class of them, with its latents normalised as the pipelines that use it do."""
