"""Ray: session, actor pools, errors. Shares the GPUs and memory of a cluster out."""
