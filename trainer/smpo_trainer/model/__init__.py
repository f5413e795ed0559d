"""The model in training: policy, adapter, quantization, reference errors, optimizer, weight average, FSDP."""
