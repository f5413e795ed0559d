"""Sample pictures from a base model of the world, with one seed per picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from smpo_pipeline.toy.world import IMAGE_SIZE

_BATCH = 64


def load_pipeline(folder: Path) -> DiffusionPipeline:
    """Load a model folder for :func:`sample_images`, in float32 on the CPU."""
    with _no_loading_bars():
        # diffusers warns of each part that the model is without (SD3's T5) unless it is told so.
        index = DiffusionPipeline.load_config(folder)
        absent = {name: None for name, part in index.items() if part == [None, None]}
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Hide the libraries' progress bars, which would last a tenth of a second."""
    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def from_pixels(pixels: torch.Tensor) -> np.ndarray:
    """Convert float [N, 3, H, W] pixels, clipped to -1 to 1, to uint8 [N, H, W, 3] pictures."""
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).contiguous().numpy()


@torch.no_grad()
def sample_images(
    pipeline: DiffusionPipeline,
    captions: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance_scale: float = 1.0,
    num_steps: int = 16,
    batch_size: int = _BATCH,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Sample one picture per caption with the pipeline's own scheduler.

    Args:
        pipeline: the model, on the CPU.
        captions: N prompts.
        seeds: N seeds of the pictures' initial noise.
        guidance_scale: classifier-free guidance; 1 is none.
        num_steps: denoising steps.
        batch_size: pictures at once; affects speed, and results only by rounding.
        progress: called after each batch with the number of pictures done.

    Returns:
        uint8 [N, H, W, 3], RGB.
    """
    batches = []
    for start in range(0, len(captions), batch_size):
        batch = slice(start, start + batch_size)
        latents = torch.stack([_initial_noise(pipeline, seed) for seed in seeds[batch]])
        decoded = _sample_batch(pipeline, list(captions[batch]), latents, guidance_scale, num_steps)
        batches.append(from_pixels(decoded))
        if progress is not None:
            progress(min(start + batch_size, len(captions)))
    return np.concatenate(batches)


def _initial_noise(pipeline: DiffusionPipeline, seed: int) -> torch.Tensor:
    config = (pipeline.unet if isinstance(pipeline, StableDiffusionPipeline) else pipeline.transformer).config
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _sample_batch(
    pipeline: DiffusionPipeline, captions: list[str], latents: torch.Tensor, guidance_scale: float, num_steps: int
) -> torch.Tensor:
    """Return the decoded pictures, [N, 3, H, W]."""
    if isinstance(pipeline, StableDiffusionPipeline):
        return _sample_sd(pipeline, captions, latents, guidance_scale, num_steps)
    made = pipeline(
        prompt=captions,
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        latents=latents,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images
    config = pipeline.vae.config
    return pipeline.vae.decode(made / config["scaling_factor"] + config["shift_factor"]).sample


def _sample_sd(
    pipeline: StableDiffusionPipeline,
    captions: list[str],
    latents: torch.Tensor,
    guidance_scale: float,
    num_steps: int,
) -> torch.Tensor:
    """Do the same with the parts of a Stable Diffusion pipeline."""
    guided = guidance_scale != 1.0
    texts = [""] * len(captions) + captions if guided else captions
    tokens = pipeline.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = pipeline.text_encoder(tokens).last_hidden_state
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(num_steps)
    latents = latents * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noise = pipeline.unet(torch.cat([latents, latents]) if guided else latents, timestep, states).sample
        if guided:
            unconditional, conditional = noise.chunk(2)
            noise = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return pipeline.vae.decode(latents / pipeline.vae.config["scaling_factor"]).sample
