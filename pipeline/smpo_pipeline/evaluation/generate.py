"""Images of one model: real diffusers pipelines, DDIM, noise that depends on seed, prompt and image index alone.

Shape suffixes: B batch, C h w a latent.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image

from smpo_models.fingerprint import fingerprint_module
from smpo_models.weights import DTYPES, load_part, loading_errors
from smpo_pipeline.evaluation.results import Settings
from smpo_pipeline.evaluation.sources import UNET_FOLDER, ModelSource
from smpo_schemas.errors import UserError
from smpo_schemas.files import write_bytes


@dataclass(frozen=True)
class Picture:
    """One image: its prompt, which of the prompt's images it is, and its file."""

    prompt: str
    index: int
    path: Path


def initial_noise(seed: int, prompt: str, index: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal noise, float32 of ``shape``, that depends on the arguments and on nothing else.

    So every model begins an image from the same noise, whatever the batch size, order, device or other prompts.
    """
    key = hashlib.sha256(f"{seed}\n{index}\n{prompt}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


def load_generator(model: ModelSource, base: str | None, device: str, dtype: str) -> DiffusionPipeline:
    """Load a model for sampling with DDIM, without safety checker.

    Raises:
        UserError: it cannot be loaded, or has no UNet.
    """
    what = f"--model {model.name}={model.source}"
    whole = model.source if model.kind == "pipeline" else str(base)
    with loading_errors(what if model.kind == "pipeline" else f"--base {whole}"):
        index: dict[str, Any] = DiffusionPipeline.load_config(whole)
    if UNET_FOLDER not in index:
        raise UserError(f"{what}: a {index.get('_class_name', 'model')} has no unet; only such models can be evaluated")
    replaced: dict[str, Any] = {}
    if "safety_checker" in index:
        replaced = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if model.kind == "unet":
        replaced[UNET_FOLDER] = load_part(
            UNet2DConditionModel.from_pretrained, model.source, what, subfolder=UNET_FOLDER, **options
        )
    pipeline = load_part(DiffusionPipeline.from_pretrained, whole, what, **options, **replaced)
    if model.kind == "lora":
        with loading_errors(what):
            pipeline.load_lora_weights(model.source)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
    # clip_sample defaults to True and survives from schedulers that lack it; latents must not be clipped.
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def latent_shape(pipeline: DiffusionPipeline) -> tuple[int, int, int]:
    """(C, h, w) of the latents that the pipeline samples by default."""
    config = pipeline.unet.config
    return (config["in_channels"], config["sample_size"], config["sample_size"])


def denoiser_fingerprint(pipeline: DiffusionPipeline) -> str:
    """The denoiser's fingerprint, comparable with a shard manifest's where it was loaded in fp32."""
    return fingerprint_module(pipeline.unet)


def generate(
    pipeline: DiffusionPipeline,
    pictures: Sequence[Picture],
    settings: Settings,
    batch_size: int,
    advance: Callable[[int], None],
) -> None:
    """Make the pictures and write each as a PNG, atomically.

    Args:
        pipeline: from :func:`load_generator`.
        pictures: what to make.
        settings: how.
        batch_size: images at once.
        advance: told how many images have been finished, after each batch.
    """
    shape = latent_shape(pipeline)
    for start in range(0, len(pictures), batch_size):
        batch = pictures[start : start + batch_size]
        noise_BChw = np.stack([initial_noise(settings.seed, each.prompt, each.index, shape) for each in batch])
        with torch.inference_mode():
            images: list[Image.Image] = pipeline(
                prompt=[each.prompt for each in batch],
                latents=torch.from_numpy(noise_BChw).to(pipeline.device, pipeline.unet.dtype),
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
            ).images
        for each, image in zip(batch, images, strict=True):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            write_bytes(each.path, buffer.getvalue())
        advance(len(batch))
