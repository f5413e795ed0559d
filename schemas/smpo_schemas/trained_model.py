"""Files of a trained model: what ``smpo-train`` writes and ``evaluate`` reads."""

UNET_FOLDER = "unet"
"""The denoiser, by the name that diffusers pipelines have for it."""

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The adapter in place of a denoiser, by the name that ``load_lora_weights`` looks for."""

METRICS_FILE = "metrics.jsonl"
"""One JSON object an optimizer step."""

TRAINING_FILE = "training.json"
"""Settings and result; written last."""
