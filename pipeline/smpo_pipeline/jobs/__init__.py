"""The thin layer that runs the compute core on Ray Data. Nothing outside this folder imports Ray."""
