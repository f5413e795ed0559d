"""Calculate how much GPU memory a run needs, from a model's configs alone: no weights, no GPU, a few seconds.

Only tensors are counted. Not counted are CUDA's context (about 0.5 GB), the workspaces of its libraries' kernels, and
what the allocator loses to fragmentation.
"""
