"""The training of the embedded world's models by `benchmarks/build_toy_world.py`."""
