"""The model in training: policy, reference, text, optimizer, averaging, sharding over processes."""
