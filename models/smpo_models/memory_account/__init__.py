"""What a run needs of a GPU's memory, from a model's configs alone: no weights, no GPU, a few seconds.

The account holds tensors. Not in it are CUDA's context (about 0.5 GB), the workspaces of its libraries' kernels, and
what the allocator cannot use of its blocks.
"""
