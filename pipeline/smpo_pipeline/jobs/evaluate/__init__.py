"""The job of ``smpo-pipeline evaluate``: sampling on all GPUs, by the actors of ``generate``."""
