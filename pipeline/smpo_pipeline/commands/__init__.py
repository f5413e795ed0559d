"""The commands of ``smpo-pipeline``, one file each: they parse flags and print; the work is done elsewhere."""
