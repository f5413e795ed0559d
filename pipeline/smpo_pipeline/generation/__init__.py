"""Sample images with a model's own diffusers pipeline; plain torch, without Ray."""
