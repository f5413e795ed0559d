"""The model in training: policy, reference errors, text, optimizer, weight average, FSDP."""
