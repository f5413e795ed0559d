"""Utilities that know nothing of diffusion: user errors, files and URLs, retries, a run lock, command lines."""
