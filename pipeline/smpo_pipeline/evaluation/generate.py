"""Generate one model's images with a diffusers pipeline and DDIM; noise depends on seed, prompt and index alone.

Shape suffixes: B batch, C h w a latent.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from smpo_common.errors import UserError
from smpo_common.files import write_bytes
from smpo_models.draws import image_noise
from smpo_models.family_bases.autoencoder import latent_factor
from smpo_models.family_bases.unet_family import load_unet_config
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_models.lora import check_lora, fuse_lora
from smpo_models.memory import is_out_of_memory
from smpo_models.noise_schedules.variance_preserving import check_scheduler
from smpo_models.part_config import native_resolution
from smpo_models.sampling import load_pipeline, sample
from smpo_models.weights import DTYPES, load_part, loading_errors
from smpo_pipeline.evaluation.model_sources import ModelSource
from smpo_pipeline.evaluation.results import Settings
from smpo_pipeline.isolation import FAILURES
from smpo_schemas.trained_model import UNET_FOLDER


@dataclass(frozen=True)
class Picture:
    """One image: its prompt, its number within the prompt, and its file."""

    prompt: str
    index: int
    path: Path


def check_generator(model: ModelSource, base: str | None, settings: Settings) -> tuple[int, int, int]:
    """Check a model by its configuration (and a LoRA's layers), without loading other weights.

    Returns:
        (C, h, w) of the latents that it samples.

    Raises:
        UserError: the model does not exist, has no text-to-image UNet, has fewer timesteps than ``settings.steps``, or
            is a LoRA that does not fit.
    """
    what, whole, _ = _read_index(model, base)
    scheduler = load_part(DDIMScheduler.load_config, whole, what, subfolder="scheduler")
    check_scheduler(scheduler, what)
    timesteps = scheduler.get("num_train_timesteps", settings.steps)
    if settings.steps > timesteps:
        raise UserError(f"--steps {settings.steps}: {what} has only {timesteps} timesteps")
    config = load_unet_config(model.source if model.kind == "unet" else whole, what)
    if model.kind == "lora":
        check_lora(model.lora_file, config, what, whole)
    return _latent_shape(config, latent_factor(whole, what), settings.resolution, what)


def load_generator(
    model: ModelSource, base: str | None, device: str, dtype: str, variant: str | None = None
) -> DiffusionPipeline:
    """Load a model for sampling with DDIM, without safety checker.

    Raises:
        UserError: it cannot be loaded, has no UNet, or lacks weights, which diffusers would initialise at random.
    """
    what, whole, _ = _read_index(model, base)
    parts = {}
    if model.kind != "pipeline":
        parts[UNET_FOLDER] = _tuned_denoiser(model, whole, what, variant).to(DTYPES[dtype])
    return load_pipeline(whole, what, parts, dtype=DTYPES[dtype], variant=variant).to(device)


def _read_index(model: ModelSource, base: str | None) -> tuple[str, str, dict[str, Any]]:
    """Return the model's name in errors, its whole model (itself or its base), and the whole model's index."""
    what = f"--model {model.name}={model.source}"
    whole = model.source if model.kind == "pipeline" else str(base)
    with loading_errors(what if model.kind == "pipeline" else f"--base {whole}"):
        index: dict[str, Any] = DiffusionPipeline.load_config(whole)
    if UNET_FOLDER not in index:
        raise UserError(f"{what}: a {index.get('_class_name', 'model')} has no unet; only such models can be evaluated")
    return what, whole, index


def _tuned_denoiser(model: ModelSource, whole: str, what: str, variant: str | None) -> torch.nn.Module:
    """Load the denoiser that smpo-train made from that of ``whole``, in float32."""
    folder = Path(model.source) if model.kind == "unet" else None
    family = load_family(whole, ("denoiser",), denoiser=folder, variant=variant)
    if family.denoiser is None:
        raise RuntimeError("the model was loaded without its denoiser")
    if model.kind == "lora":
        fuse_lora(family.denoiser, model.lora_file, what, whole)
    return family.denoiser


def latent_shape(pipeline: DiffusionPipeline, resolution: int | None = None) -> tuple[int, int, int]:
    """Return (C, h, w) of the pipeline's latents for ``resolution`` pixels (None: its native resolution)."""
    return _latent_shape(pipeline.unet.config, pipeline.vae_scale_factor, resolution, "--model")


def _latent_shape(config: Mapping[str, Any], factor: int, resolution: int | None, what: str) -> tuple[int, int, int]:
    side = resolution or native_resolution(config["sample_size"], factor, what, UNET_FOLDER)
    multiple = factor * 2 ** (len(config["block_out_channels"]) - 1)
    if side % multiple:
        raise UserError(f"--resolution {side}: {what} needs a multiple of {multiple}")
    return config["in_channels"], side // factor, side // factor


def denoiser_fingerprint(pipeline: DiffusionPipeline) -> str:
    """Fingerprint the denoiser; if it was loaded in fp32, this is the fingerprint in manifests of shards."""
    return fingerprint_module(pipeline.unet)


def generate(
    pipeline: DiffusionPipeline,
    pictures: Sequence[Picture],
    settings: Settings,
    batch_size: int,
    advance: Callable[[int], None],
) -> None:
    """Generate the pictures and write each as a PNG, atomically.

    Args:
        pipeline: from :func:`load_generator`.
        pictures: the images to generate.
        settings: of the sampling.
        batch_size: images at once; halved when memory runs out.
        advance: called after each batch with its number of images.

    Raises:
        UserError: memory is too small for a single image.
    """
    done = 0
    while done < len(pictures):
        batch = pictures[done : done + batch_size]
        try:
            images = _sample(pipeline, batch, settings)
        except FAILURES as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                half = "; --dtype fp16 needs half" if settings.dtype == "fp32" else ""
                raise UserError(f"too little memory to sample one image: {error}{half}") from error
            batch_size = len(batch) // 2
            continue
        for picture, image in zip(batch, images, strict=True):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            write_bytes(picture.path, buffer.getvalue())
        done += len(batch)
        advance(len(batch))


def _sample(pipeline: DiffusionPipeline, batch: Sequence[Picture], settings: Settings) -> list[Image.Image]:
    shape = latent_shape(pipeline, settings.resolution)
    noise = [image_noise(settings.seed, picture.prompt, picture.index, shape) for picture in batch]
    noise_BChw = torch.stack(noise).to(pipeline.device, pipeline.unet.dtype)
    prompts = [picture.prompt for picture in batch]
    with torch.inference_mode():
        images: list[Image.Image] = sample(
            pipeline, prompts, noise_BChw, steps=settings.steps, guidance_scale=settings.guidance_scale
        )
    return images
