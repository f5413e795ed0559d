"""Images of fixed prompts and noise, drawn by the model in training (``--image-prompts``).

The pipeline with its VAE is loaded for each drawing and freed after it, so that it takes no memory in between. It uses
the text encoders of the training, or loads them where the shards have the text stored.

Shape suffixes: B batch, C h w a latent, H W an image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from smpo_common.errors import UserError
from smpo_common.files import write_bytes
from smpo_models.draws import gaussian, named_stream, torch_generator
from smpo_models.family import Family
from smpo_models.loading import load_family
from smpo_models.memory import is_out_of_memory
from smpo_models.sampling import load_pipeline, sample, sampling_in_words
from smpo_schemas.trained_model import VALIDATION_FOLDER
from smpo_trainer.experiment import Experiment
from smpo_trainer.model.policy import Policy
from smpo_trainer.settings import ImageOptions

_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Names of a family's text encoders in pipelines, in its order."""

_USUAL_STEPS = 20
"""Fewer than `evaluate` takes: the images are for comparison with each other."""

_SMALLEST_TILE = 256
"""Pixels along a side. Smaller tiles differ visibly, since the norms of the decoder depend on the tile."""


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    Attributes:
        sampler: its name.
        steps: number of the sampler's steps.
        guidance_scale: scale of classifier-free guidance, or of FLUX.1-dev's embedded guidance; None for models with
            neither.
    """

    sampler: str
    steps: int
    guidance_scale: float | None

    @classmethod
    def choose(cls, options: ImageOptions, family: Family) -> Sampling:
        """Choose how to sample; the model family decides what the options leave open.

        Raises:
            UserError: the model takes no guidance.
        """
        guidance = options.image_guidance_scale
        if guidance is not None and family.usual_guidance is None:
            raise UserError(f"--image-guidance-scale {guidance:g}: {family.kind} takes no guidance; leave it out")
        steps = options.image_sampling_steps or min(_USUAL_STEPS, family.sampler_steps)
        return cls(family.samplers["model"], steps, family.usual_guidance if guidance is None else guidance)

    def __str__(self) -> str:
        return sampling_in_words(self.sampler, self.steps, self.guidance_scale)


class ValidationImages:
    """Draws images of the validation prompts.

    Attributes:
        prompts: one for each image.
    """

    def __init__(self, experiment: Experiment, policy: Policy, accelerator: Accelerator, sampling: Sampling) -> None:
        self._settings, self.prompts = experiment.settings, experiment.image_prompts
        self._policy, self._accelerator, self._sampling = policy, accelerator, sampling
        self._side = experiment.shards.directories[0].manifest.resolution

    def due(self, step: int) -> bool:
        """Whether to draw after ``step`` steps: at step 0, every ``image_every`` steps and after the last."""
        return step % self._settings.images.image_every == 0 or step == self._settings.steps.max_steps

    def draw(self, step: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Draw after ``step`` steps, and save the images as one PNG.

        Called in the main process, or with FSDP in all processes, of which the main one saves. Does not change the
        training: its random state, modes and gradients are kept.

        Returns:
            The images, and the grid of them that is saved, each uint8 [H, W, 3].

        Raises:
            UserError: the pipeline cannot be loaded, or the PNG cannot be written.
        """
        device = self._accelerator.device
        # Loading a model draws random numbers; do not advance the generators of the training.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            images = [image for batch in self._batches() for image in batch]
        if device.type == "cuda":
            torch.cuda.empty_cache()  # return the memory of the VAE before the next training step
        grid_HW3 = _grid(images)
        buffer = io.BytesIO()
        Image.fromarray(grid_HW3).save(buffer, format="PNG")
        if self._accelerator.is_main_process:
            write_bytes(self._settings.out / VALIDATION_FOLDER / f"step-{step:06d}.png", buffer.getvalue())
        return images, grid_HW3

    def _batches(self) -> Iterator[np.ndarray]:
        """Draw the images batch by batch: uint8 [B, H, W, 3]."""
        settings, family = self._settings, self._policy.family
        pipeline = self._load_pipeline()
        pipeline.to(self._accelerator.device)
        pipeline.vae.enable_slicing()  # decode one image at a time
        shape = family.latent_shape(self._side, self._side)
        for start in range(0, len(self.prompts), settings.steps.batch_size):
            prompts = list(self.prompts[start : start + settings.steps.batch_size])
            numbers = range(start, start + len(prompts))
            # A random stream per prompt: its noise does not depend on the other prompts or the batch size.
            names = [f"validation\n{settings.steps.seed}\n{number}" for number in numbers]
            noise_BChw = torch.stack([gaussian(named_stream(name), shape) for name in names])
            # Do not compile the denoiser for the shapes of a drawing.
            with self._accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                latents_BChw = sample(
                    pipeline,
                    family,
                    prompts,
                    noise_BChw.to(self._accelerator.device),
                    steps=self._sampling.steps,
                    guidance_scale=self._sampling.guidance_scale,
                    generators=[torch_generator(f"{name}\nsampler") for name in names],
                    output_type="latent",
                )
            pixels_BHW3 = _decode(family, pipeline.vae, latents_BChw).permute(0, 2, 3, 1).cpu().nan_to_num().numpy()
            yield ((pixels_BHW3 + 1) * 127.5).round().astype(np.uint8)

    def _load_pipeline(self) -> DiffusionPipeline:
        """Load the pipeline around the denoiser in training; text encoders in the family's dtype, the rest in float32.

        Raises:
            UserError: a part cannot be loaded or lacks weights.
        """
        settings, family = self._settings, self._policy.family
        # With stored text the family has none: they are in memory only while images are drawn.
        variant = settings.denoiser.variant
        encoders = family.text_modules or load_family(settings.model, ("text",), variant=variant).text_modules
        parts = {
            family.denoiser_folder: self._policy.denoiser,
            **dict(zip(_TEXT_ENCODERS, encoders, strict=False)),
        }
        return load_pipeline(
            settings.model,
            f"--model {settings.model}",
            parts,
            dtype=torch.float32,
            variant=variant,
            kind=getattr(diffusers, family.pipelines[0]),
        )


def _decode(family: Family, vae: nn.Module, latents_BChw: torch.Tensor) -> torch.Tensor:
    """Decode normalised latents to float32 [B, 3, H, W] in [-1, 1]; in tiles if memory runs out."""
    latents_BChw = latents_BChw.float()  # SDXL's VAE overflows in float16
    tile = max(latents_BChw.shape[-2:])
    while True:
        try:
            return family.decode(latents_BChw, vae)
        except (RuntimeError, MemoryError) as error:
            if tile // 2 * family.latent_factor < _SMALLEST_TILE or not is_out_of_memory(error):
                raise
        # Outside the handler: its error keeps the tensors of the failed decoding alive.
        tile //= 2
        family.decode_in_tiles(vae, tile)


def _grid(images: Sequence[np.ndarray]) -> np.ndarray:
    """Arrange images in a grid that is about square: uint8 [H, W, 3]; empty cells are black."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width, _ = images[0].shape
    grid = np.zeros((rows * height, columns * width, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        grid[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    return grid
