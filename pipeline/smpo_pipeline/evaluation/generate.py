"""Generate one model's images with its own diffusers pipeline; noise depends on seed, prompt and index alone.

Shape suffixes: B batch, C h w a latent.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from smpo_common.errors import UserError
from smpo_common.files import write_bytes
from smpo_models.draws import image_noise
from smpo_models.family import Family
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_models.lora import check_lora, fuse_lora
from smpo_models.memory import is_out_of_memory
from smpo_models.sampling import load_pipeline, sample
from smpo_models.weights import DTYPES
from smpo_pipeline.evaluation.model_sources import ModelSource
from smpo_pipeline.evaluation.results import Settings
from smpo_pipeline.isolation import FAILURES


@dataclass(frozen=True)
class Picture:
    """One image: its prompt, its number within the prompt, and its file."""

    prompt: str
    index: int
    path: Path


@dataclass(frozen=True)
class Generator:
    """A model that samples images.

    Attributes:
        family: its configs, without weights.
        pipeline: with weights.
    """

    family: Family
    pipeline: DiffusionPipeline

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's denoiser."""
        denoiser: nn.Module = getattr(self.pipeline, self.family.denoiser_folder)
        return denoiser

    def fingerprint(self) -> str:
        """Fingerprint the denoiser; if it was loaded in fp32, this is the fingerprint in manifests of shards."""
        return fingerprint_module(self.denoiser)


def read_configs(model: ModelSource, base: str | None) -> Family:
    """Read and check a model's configs, and a LoRA's layers, without loading other weights.

    Raises:
        UserError: the model does not exist or is of an unknown family; or it is a denoiser or a LoRA that does not fit
            ``base``.
    """
    whole, named = _whole(model, base)
    folder = Path(model.source) if model.kind == "denoiser" else None
    family = load_family(whole, (), denoiser=folder, what=named)
    if model.kind == "lora":
        check_lora(model.lora_file, family.empty_denoiser(), _named(model), whole)
    return family


def check_sampling(families: Mapping[str, Family], settings: Settings) -> None:
    """Check that models can be sampled with these settings, and from the same noise.

    Args:
        families: the models' configs, by their names.
        settings: of the sampling.

    Raises:
        UserError: they cannot.
    """
    for name, family in families.items():
        side = settings.resolution or family.resolution()
        family.check_resolution(side, f"--model {name}")
        # Refuses a number of steps that the sampler has no grid for.
        family.noise_schedule.grid(settings.steps, family.num_tokens(side, side))
        if family.usual_guidance is None and settings.guidance_scale is not None:
            raise UserError(
                f"--guidance-scale {settings.guidance_scale:g}: --model {name} takes no guidance; leave it out"
            )
    shapes = {name: latent_shape(family, settings) for name, family in families.items()}
    ways = {(family.sampler, family.usual_guidance is None) for family in families.values()}
    if len(set(shapes.values())) > 1 or len(ways) > 1:
        kinds = ", ".join(f"{name} ({family.kind}): {shapes[name]}" for name, family in families.items())
        raise UserError(
            f"--model: latents differ in shape, or the way to sample them ({kinds}), so the models cannot start from "
            "the same noise; compare models of one resolution and family"
        )


def latent_shape(family: Family, settings: Settings) -> tuple[int, int, int]:
    """Return (C, h, w) of the latents that are sampled."""
    side = settings.resolution or family.resolution()
    return family.latent_shape(side, side)


def load_generator(
    model: ModelSource, base: str | None, device: str, dtype: str, variant: str | None = None
) -> Generator:
    """Load a model for sampling: with DDIM, flow models with their own sampler, without safety checker.

    Raises:
        UserError: it cannot be loaded, or lacks weights, which diffusers would initialise at random.
    """
    whole, named = _whole(model, base)
    family, parts = read_configs(model, base), {}
    if model.kind != "pipeline":
        # Not the model's own `to`, which warns of layers to keep in float32 even where it names none.
        parts[family.denoiser_folder] = nn.Module.to(_tuned_denoiser(model, whole, named, variant), DTYPES[dtype])
    pipeline = load_pipeline(whole, named, parts, dtype=DTYPES[dtype], variant=variant)
    return Generator(family, pipeline.to(device))


def _named(model: ModelSource) -> str:
    """Return a model's name in errors."""
    return f"--model {model.name}={model.source}"


def _whole(model: ModelSource, base: str | None) -> tuple[str, str]:
    """Return the whole model, the model itself or its base, and that one's name in errors."""
    return (model.source, _named(model)) if model.kind == "pipeline" else (str(base), f"--base {base}")


def _tuned_denoiser(model: ModelSource, whole: str, named: str, variant: str | None) -> nn.Module:
    """Load the denoiser that smpo-train made from that of ``whole``, in float32."""
    folder = Path(model.source) if model.kind == "denoiser" else None
    family = load_family(whole, ("denoiser",), denoiser=folder, variant=variant, what=named)
    if family.denoiser is None:
        raise RuntimeError("the model was loaded without its denoiser")
    if model.kind == "lora":
        fuse_lora(family.denoiser, model.lora_file, _named(model), whole)
    return family.denoiser


def generate(
    generator: Generator,
    pictures: Sequence[Picture],
    settings: Settings,
    batch_size: int,
    advance: Callable[[int], None],
) -> None:
    """Generate the pictures and write each as a PNG, atomically.

    Args:
        generator: from :func:`load_generator`.
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
            images = _sample(generator, batch, settings)
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


def _sample(generator: Generator, batch: Sequence[Picture], settings: Settings) -> list[Image.Image]:
    family, pipeline = generator.family, generator.pipeline
    shape = latent_shape(family, settings)
    noise = [image_noise(settings.seed, picture.prompt, picture.index, shape) for picture in batch]
    noise_BChw = torch.stack(noise).to(pipeline.device, next(generator.denoiser.parameters()).dtype)
    with torch.inference_mode():
        images: list[Image.Image] = sample(
            pipeline,
            family,
            [picture.prompt for picture in batch],
            noise_BChw,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
        )
    return images
