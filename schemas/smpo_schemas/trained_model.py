"""Names of a trained model's files, which ``smpo-train`` and ``merge`` write and ``evaluate`` reads."""

from typing import Literal

UNET_FOLDER = "unet"
"""Folder of a UNet, named as in diffusers' pipelines."""

DENOISER_FOLDERS = (UNET_FOLDER, "transformer")
"""Folders of denoisers, over all model families."""

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The adapter, instead of a denoiser; the name is what ``load_lora_weights`` looks for."""

LoraFormat = Literal["diffusers", "kohya", "comfyui"]
"""How a LoRA file names its layers."""

EXTRA_LORA_FILES = {"kohya": "kohya_lora.safetensors", "comfyui": "comfyui_lora.safetensors"}
"""Files with the same adapter for other programs, by format."""

METRICS_FILE = "metrics.jsonl"
"""One JSON object per optimizer step."""

VALIDATION_FOLDER = "validation"
"""Images that were drawn during the run."""

TRAINING_FILE = "training.json"
"""Settings and result; written last."""

MERGED_FILE = "merged.json"
"""Settings of a merged model and its fingerprint; written last."""


def lora_file(lora_format: LoraFormat) -> str:
    """Return the name of the file in a format."""
    return EXTRA_LORA_FILES.get(lora_format, LORA_FILE)
