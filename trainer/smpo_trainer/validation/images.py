"""Images of fixed prompts and noise, drawn by the model in training every so many steps (``--validation-prompts``).

The model's pipeline with its VAE is loaded for each drawing and let go after it: between drawings, it takes no memory.
It draws with the text encoders of the training, or, where ``--text cache`` has freed these, loads them too.

Shape suffixes: B batch, C h w a latent, H W an image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from smpo_common.files import write_bytes
from smpo_models.draws import gaussian, named_stream
from smpo_models.memory import is_out_of_memory
from smpo_models.sampling import load_pipeline, sample
from smpo_trainer.experiment import Experiment
from smpo_trainer.model.policy import Policy

VALIDATION_FOLDER = "validation"

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""As pipelines call those of a family, in its order."""

_SMALLEST_TILE = 32
"""Latents along one side; smaller ones differ visibly from the whole, whose statistics the decoder's norms take."""


class ValidationImages:
    """Draws them."""

    def __init__(self, experiment: Experiment, policy: Policy, accelerator: Accelerator) -> None:
        self._settings, self._prompts = experiment.settings, experiment.validation_prompts
        self._policy, self._accelerator = policy, accelerator
        self._side = experiment.shards.directories[0].manifest.resolution

    def due(self, step: int) -> bool:
        """Whether to draw after ``step`` steps: before the first, every ``validation_every`` and after the last."""
        return step % self._settings.images.validation_every == 0 or step == self._settings.steps.max_steps

    def draw(self, step: int) -> np.ndarray:
        """Draw after ``step`` steps, save the images as one PNG, and return it: uint8 [H, W, 3].

        For the main process alone, unless the denoiser is cut up, which takes all of them: then too that one saves.
        Random numbers, modes and gradients of the training are as they were.

        Raises:
            UserError: the pipeline cannot be loaded, or the PNG not be written.
        """
        device = self._accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            images = [image for batch in self._batches() for image in batch]
        if device.type == "cuda":
            torch.cuda.empty_cache()
        grid_HW3 = _grid(images)
        buffer = io.BytesIO()
        Image.fromarray(grid_HW3).save(buffer, format="PNG")
        if self._accelerator.is_main_process:
            write_bytes(self._settings.out / VALIDATION_FOLDER / f"step-{step:06d}.png", buffer.getvalue())
        return grid_HW3

    def _batches(self) -> Iterator[np.ndarray]:
        """The images, some at a time: uint8 [B, H, W, 3]."""
        settings, family = self._settings, self._policy.family
        pipeline = self._load_pipeline()
        pipeline.to(self._accelerator.device)
        pipeline.vae.enable_slicing()  # an image at a time
        shape = family.latent_shape(self._side, self._side)
        for start in range(0, len(self._prompts), settings.steps.batch_size):
            prompts = list(self._prompts[start : start + settings.steps.batch_size])
            numbers = range(start, start + len(prompts))
            streams = [named_stream(f"validation\n{settings.steps.seed}\n{number}") for number in numbers]
            noise_BChw = torch.stack([gaussian(stream, shape) for stream in streams]).to(self._accelerator.device)
            # Without compiling the denoiser for the shapes of a drawing.
            with self._accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                latents_BChw = sample(
                    pipeline,
                    prompts,
                    noise_BChw,
                    steps=settings.images.validation_sampling_steps,
                    guidance_scale=settings.images.validation_guidance_scale,
                    output_type="latent",
                )
            pixels_BHW3 = _decode(pipeline.vae, latents_BChw).permute(0, 2, 3, 1).cpu().nan_to_num().numpy()
            yield ((pixels_BHW3 + 1) * 127.5).round().astype(np.uint8)

    def _load_pipeline(self) -> DiffusionPipeline:
        """The model's pipeline around the denoiser in training, all in float32.

        Raises:
            UserError: a part cannot be loaded, or lacks weights.
        """
        settings, family = self._settings, self._policy.family
        parts = {"unet": self._policy.denoiser, **dict(zip(_TEXT_ENCODERS, family.text_modules, strict=False))}
        return load_pipeline(
            settings.model,
            f"--model {settings.model}",
            parts,
            # As in training: by themselves, text encoders come in the precision that they are stored in.
            dtype=torch.float32,
            variant=settings.denoiser.variant,
            kind=getattr(diffusers, family.pipelines[0]),
        )


def _decode(vae: AutoencoderKL, latents_BChw: torch.Tensor) -> torch.Tensor:
    """Images of scaled latents: float32 [B, 3, H, W], clamped to [-1, 1]; in tiles where memory runs out."""
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]
    # In float32: SDXL's VAE overflows in float16.
    unscaled_BChw = latents_BChw.float() / scale + shift
    tile = max(unscaled_BChw.shape[-2:])
    while True:
        try:
            return vae.decode(unscaled_BChw).sample.clamp(-1, 1)
        except (RuntimeError, MemoryError) as error:
            if tile // 2 < _SMALLEST_TILE or not is_out_of_memory(error):
                raise
        # Out of the handler, whose error holds what the decoder had allocated.
        tile //= 2
        vae.enable_tiling()
        vae.tile_latent_min_size = tile
        vae.tile_sample_min_size = tile * 2 ** (len(vae.config["block_out_channels"]) - 1)


def _grid(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images side by side, in rows, about as many as columns: uint8 [H, W, 3]; what is left over is black."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width, _ = images[0].shape
    grid = np.zeros((rows * height, columns * width, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        grid[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return grid
