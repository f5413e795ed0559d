"""Ray: starting it, sharing its GPUs and memory out, its errors."""
