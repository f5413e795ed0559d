"""Names of a trained model's files, which ``smpo-train`` writes and ``evaluate`` reads."""

UNET_FOLDER = "unet"
"""The denoiser; the name is that of diffusers' pipelines."""

DENOISER_FOLDERS = (UNET_FOLDER, "transformer")
"""The same, of all models."""

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The adapter, instead of a denoiser; the name is what ``load_lora_weights`` looks for."""

METRICS_FILE = "metrics.jsonl"
"""One JSON object per optimizer step."""

TRAINING_FILE = "training.json"
"""Settings and result; written last."""
