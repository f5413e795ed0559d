"""Sample pictures from a model in the layout of Stable Diffusion, with one seed per picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

_BATCH = 64


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Load a model folder for :func:`sample_images`, in float32 on the CPU."""
    with _no_loading_bars():
        pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
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
    pipeline: StableDiffusionPipeline,
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


def _initial_noise(pipeline: StableDiffusionPipeline, seed: int) -> torch.Tensor:
    config = pipeline.unet.config
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _sample_batch(
    pipeline: StableDiffusionPipeline,
    captions: list[str],
    latents: torch.Tensor,
    guidance_scale: float,
    num_steps: int,
) -> torch.Tensor:
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
