"""Load a model and sample images with it; noise depends on seed, prompt and index alone.

Shape suffixes: B batch, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from smpo_common.errors import UserError
from smpo_models.draws import image_noise, named_stream, torch_generator
from smpo_models.family import Family
from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_family
from smpo_models.sampling import load_pipeline, sample
from smpo_models.tuned.lora import check_lora, fuse_lora
from smpo_models.tuned.negative import guide_with_negative, require_guidance
from smpo_models.weights import DTYPES
from smpo_pipeline.generation.source import ModelSource
from smpo_schemas.choices import SamplerChoice
from smpo_schemas.generation.candidates import GenerationSettings

_TRIAL_STEPS = 4


class Sampling(Protocol):
    """How images are sampled."""

    @property
    def steps(self) -> int:
        """Number of the sampler's steps."""

    @property
    def guidance_scale(self) -> float | None:
        """Classifier-free guidance, 1 is none; or the input of FLUX.1-dev; None for models without."""

    @property
    def seed(self) -> int:
        """Seed of all noise."""

    @property
    def resolution(self) -> int | None:
        """Side of the images in pixels; None: the model's native resolution."""


Wanted = tuple[str, int]
"""An image to sample: its prompt, and its number among the images of this prompt, from 0."""


@dataclass(frozen=True)
class Sampled:
    """One image.

    Attributes:
        image: in RGB.
        latents_Chw: what was decoded: normalised, float32, on the CPU.
        states_Chw: kept inputs of the sampler's steps by their timesteps: normalised, float32, on the CPU.
    """

    image: Image.Image
    latents_Chw: torch.Tensor
    states_Chw: dict[float, torch.Tensor]


@dataclass(frozen=True)
class Generator:
    """A model that samples images.

    Attributes:
        family: its configs, without weights.
        pipeline: with weights.
        denoiser: of the model; guided by a negative model, the pipeline holds both.
    """

    family: Family
    pipeline: DiffusionPipeline
    denoiser: nn.Module

    def fingerprint(self) -> str:
        """Fingerprint the denoiser; if it was loaded in fp32, this is the fingerprint in manifests of shards."""
        return fingerprint_module(self.denoiser)

    def sample(
        self, wanted: Sequence[Wanted], sampling: Sampling, nodes: Sequence[Sequence[int]] | None = None
    ) -> list[Sampled]:
        """Sample images, each from the noise of its prompt and index alone.

        Args:
            wanted: prompt and index of each of B images.
            sampling: how.
            nodes: per image, the numbers of the sampler's steps, from 0, whose input to keep.
        """
        shape = latent_shape(self.family, sampling)
        noise = [image_noise(sampling.seed, prompt, index, shape) for prompt, index in wanted]
        noise_BChw = torch.stack(noise).to(self.pipeline.device, next(self.denoiser.parameters()).dtype)
        states: list[dict[int, torch.Tensor]] = [{} for _ in wanted]
        last_BChw = noise_BChw

        def watch(step: int, latents_BChw: torch.Tensor) -> None:
            nonlocal last_BChw
            last_BChw = latents_BChw
            keep(step + 1, latents_BChw)

        def keep(step: int, latents_BChw: torch.Tensor) -> None:
            for image, kept in enumerate(nodes or ()):
                if step in kept:
                    states[image][step] = latents_BChw[image].float().cpu()

        keep(0, noise_BChw)
        with torch.inference_mode():
            images = sample(
                self.pipeline,
                self.family,
                [prompt for prompt, _ in wanted],
                noise_BChw,
                steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                generators=[torch_generator(f"{sampling.seed}/sampler/{index}/{prompt}") for prompt, index in wanted],
                watch=watch,
            )
        side = sampling.resolution or self.family.resolution()
        # Not the scheduler's own timesteps: Sana's are rounded to whole numbers.
        timesteps = sorted(
            self.family.noise_schedule.grid(sampling.steps, self.family.num_tokens(side, side)), reverse=True
        )
        return [
            Sampled(image, latents_Chw, {timesteps[step]: state for step, state in kept.items()})
            for image, latents_Chw, kept in zip(images, last_BChw.float().cpu(), states, strict=True)
        ]


def state_nodes(settings: GenerationSettings, prompt: str) -> list[int]:
    """Draw the numbers of the sampler's steps whose input is kept, increasing, from seed and prompt alone.

    The images of a prompt share them: both images of a pair need states at the same timesteps.
    """
    stream = named_stream(f"{settings.seed}/states/{prompt}")
    return sorted(stream.choice(settings.steps, settings.num_states, replace=False).tolist())


def sampling_trials(
    generator: Generator, wanted: Sequence[Wanted], settings: GenerationSettings
) -> Callable[[int], object]:
    """Return a function that samples a batch of the given number of images, to choose a batch size with.

    Args:
        generator: on the device.
        wanted: images to sample, in turns.
        settings: of the sampling. A few steps are enough: all take the same time and memory.
    """
    few, trials = settings.model_copy(update={"steps": min(settings.steps, _TRIAL_STEPS)}), cycle(wanted)
    return lambda size: generator.sample(list(islice(trials, size)), few)


def read_configs(model: ModelSource, base: str | None) -> Family:
    """Read and check a model's configs, and a LoRA's layers, without loading other weights.

    Raises:
        UserError: the model does not exist or is of an unknown family; or it is a denoiser or a LoRA that does not fit
            ``base``.
    """
    whole, named = _whole(model, base)
    family = load_family(whole, (), denoiser=model.denoiser, what=named)
    if model.kind == "lora":
        check_lora(model.lora_file, family.empty_denoiser(), model.named, whole)
    if model.negative:
        require_guidance(family, model.negative.named)
        read_configs(model.negative, base)
    return family


def check_sampling(
    families: Mapping[str, Family], sampling: Sampling, sampler: SamplerChoice, *, negative: bool = False
) -> None:
    """Check that models can be sampled with these settings, and from the same noise.

    Args:
        families: the models' configs, by what errors call them, such as ``--model NAME``.
        sampling: how.
        sampler: as ``--sampler`` names it.
        negative: whether negative models guide.

    Raises:
        UserError: a model cannot be sampled so, or the models would start from different noise.
    """
    if negative and (sampling.guidance_scale or 0) <= 1:
        raise UserError(
            f"--negative: at --guidance-scale {sampling.guidance_scale:g} nothing is predicted for the unconditional "
            "prompt; choose a scale above 1"
        )
    for named, family in families.items():
        side = sampling.resolution or family.resolution()
        family.check_resolution(side, named)
        # Refuses a number of steps that the sampler has no grid for.
        family.noise_schedule.grid(sampling.steps, family.num_tokens(side, side))
        if family.usual_guidance is None and sampling.guidance_scale is not None:
            raise UserError(f"--guidance-scale {sampling.guidance_scale:g}: {named} takes no guidance; leave it out")
    shapes = {named: latent_shape(family, sampling) for named, family in families.items()}
    ways = {(family.samplers[sampler], family.usual_guidance is None) for family in families.values()}
    if len(set(shapes.values())) > 1 or len(ways) > 1:
        kinds = ", ".join(
            f"{named.removeprefix('--model ')} ({family.kind}, {family.samplers[sampler]}): {shapes[named]}"
            for named, family in families.items()
        )
        raise UserError(
            f"--model: latents differ in shape, or the way to sample them ({kinds}), so the models cannot start from "
            "the same noise; compare models of one resolution and family; --sampler ddim samples those with different "
            "schedulers alike"
        )


def latent_shape(family: Family, sampling: Sampling) -> tuple[int, int, int]:
    """Return (C, h, w) of the latents that are sampled."""
    side = sampling.resolution or family.resolution()
    return family.latent_shape(side, side)


def load_generator(
    model: ModelSource,
    base: str | None,
    device: str,
    dtype: str,
    variant: str | None = None,
    sampler: SamplerChoice = "model",
) -> Generator:
    """Load a model for sampling, without safety checker.

    Raises:
        UserError: it cannot be loaded, or lacks weights, which diffusers would initialise at random; or its negative
            model is of another architecture.
    """
    whole, named = _whole(model, base)
    family, parts = read_configs(model, base), {}
    if model.kind != "pipeline":
        # Not diffusers' own `to`, which warns about layers to keep in float32 even if the model names none.
        parts[family.denoiser_folder] = nn.Module.to(load_denoiser(model, base, variant), DTYPES[dtype])
    pipeline = load_pipeline(whole, named, parts, dtype=DTYPES[dtype], variant=variant, sampler=sampler).to(device)
    denoiser: nn.Module = getattr(pipeline, family.denoiser_folder)
    if model.negative:
        negative = nn.Module.to(load_denoiser(model.negative, base, variant), device, DTYPES[dtype])
        guide_with_negative(pipeline, family, negative, model.negative.named)
    return Generator(family, pipeline, denoiser)


def load_denoiser(model: ModelSource, base: str | None, variant: str | None = None) -> nn.Module:
    """Load a model's denoiser alone, in float32 on the CPU.

    Raises:
        UserError: it cannot be loaded.
    """
    whole, named = _whole(model, base)
    family = load_family(whole, ("denoiser",), denoiser=model.denoiser, variant=variant, what=named)
    if family.denoiser is None:
        raise RuntimeError("the model was loaded without its denoiser")
    if model.kind == "lora":
        fuse_lora(family.denoiser, model.lora_file, model.named, whole)
    return family.denoiser


def _whole(model: ModelSource, base: str | None) -> tuple[str, str]:
    """Return the whole model (the model itself or its base), and the name of that model in errors."""
    if model.kind == "pipeline":
        return model.source, model.named
    # A model with a flag of its own (--unet, --lora) completes --model.
    return str(base), f"--model {base}" if model.flag else f"--base {base}"


def quiet_libraries() -> None:
    """Silence diffusers and transformers: what they print per model and long prompt breaks the progress bars."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
