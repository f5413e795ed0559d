"""Embeddings of images and prompts by a frozen CLIP, computed once and kept on disk; for ``weigh`` and ``refresh``."""
