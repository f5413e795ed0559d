"""The training of the embedded world's models by `benchmarks/toy_world/build.py`."""
