"""On-policy rounds: a model is trained on its own images, then the tuned model on its own, and so on."""
