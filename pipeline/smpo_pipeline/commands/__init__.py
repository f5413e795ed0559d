"""The commands of ``smpo-pipeline``, one file each: flags and help here, the work elsewhere."""
