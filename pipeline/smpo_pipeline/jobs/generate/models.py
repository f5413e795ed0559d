"""Load and identify the model of ``smpo-pipeline generate``."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_models.devices import default_dtype
from smpo_models.family import Family
from smpo_models.fingerprint import fingerprint_module, settings_of
from smpo_models.sampling import sampling_in_words
from smpo_pipeline.generation.generator import (
    Generator,
    check_sampling,
    load_denoiser,
    load_generator,
    read_configs,
)
from smpo_pipeline.generation.source import Loading
from smpo_pipeline.jobs.generate.options import GenerateOptions
from smpo_pipeline.options import batches_in_words
from smpo_schemas.choices import Dtype
from smpo_schemas.generation.candidates import CandidatesModel, GenerationSettings


class GeneratorIdentity(CandidatesModel):
    """The description of ``candidates.json``, plus settings, which no fingerprint covers."""

    settings: dict[str, Any]

    @property
    def content(self) -> dict[str, Any]:
        """See :func:`content_of`."""
        return {"parts": self.parts, "settings": self.settings}

    def info(self) -> CandidatesModel:
        """Return the part that ``candidates.json`` holds."""
        return CandidatesModel(**self.model_dump(exclude={"settings"}))


def choose_settings(options: GenerateOptions) -> tuple[Family, GenerationSettings]:
    """Check the settings against the model's configs; return these, and the settings with all defaults.

    Raises:
        UserError: the model is missing, or does not know a setting.
    """
    family = read_configs(options.source, options.model)
    sampling, storing = options.sampling, options.storing
    settings = GenerationSettings(
        sampler=family.samplers[sampling.sampler],
        steps=sampling.steps or family.sampler_steps,
        guidance_scale=family.usual_guidance if sampling.guidance_scale is None else sampling.guidance_scale,
        seed=sampling.seed,
        dtype=options.running.dtype or default_dtype(options.running.chosen_device),
        resolution=sampling.resolution or family.resolution(),
        images_per_prompt=sampling.images_per_prompt,
        image_format=storing.image_format,
        keep=storing.keep,
    )
    check_sampling({options.source.named: family}, settings, sampling.sampler, negative=options.negative is not None)
    if settings.num_states > settings.steps:
        raise UserError(f"--keep {settings.keep}: the sampler has {settings.steps} steps, hence as many states")
    if settings.num_states and settings.sampler != family.samplers["ddim"]:
        raise UserError(
            f"--keep {settings.keep}: {settings.sampler} takes no first-order steps between states of the noise "
            "schedule; give --sampler ddim"
        )
    return family, settings


def choices(options: GenerateOptions, settings: GenerationSettings, prompts: int) -> str:
    """Describe the job for the user: numbers of prompts and images, and what was chosen by default."""
    side, running = settings.resolution, options.running
    sampling = sampling_in_words(settings.sampler, settings.steps, settings.guidance_scale)
    images = f"{prompts} prompts x {settings.images_per_prompt} images of {side} x {side} pixels"
    computing = f"{running.device}, {settings.dtype}; {batches_in_words(running.batch_size, 'images')}"
    return f"{images}; {sampling}; {computing}; seed {settings.seed}"


def load(loading: Loading, device: str, dtype: str) -> Generator:
    """Load the model for sampling.

    Raises:
        UserError: it cannot be loaded.
    """
    return load_generator(loading.source, loading.base, device, dtype, loading.variant, loading.sampler)


def content_of(generator: Generator) -> dict[str, Any]:
    """Fingerprint the parts of a loaded model, and list their settings: equal for the same files in the same dtype."""
    return {"parts": _parts(generator), "settings": _settings(generator)}


def describe_generator(options: GenerateOptions, generator: Generator, dtype: Dtype) -> GeneratorIdentity:
    """Identify a loaded model."""
    if dtype == "fp32":
        denoiser = generator.fingerprint()
    else:
        denoiser = fingerprint_module(load_denoiser(options.source, options.model, options.sampling.variant))
    return GeneratorIdentity(
        id=options.model,
        unet=str(options.unet) if options.unet else None,
        lora=str(options.lora) if options.lora else None,
        negative=str(options.negative) if options.negative else None,
        kind=generator.family.kind,
        denoiser=denoiser,
        scheduler=generator.family.noise_schedule.fingerprint(),
        **content_of(generator),
    )


def origin_of(model: GeneratorIdentity, settings: GenerationSettings) -> str:
    """Fingerprint everything that decides an image besides its prompt and its number."""
    sampling = settings.model_dump(exclude={"images_per_prompt", "keep"})
    return sha256_json({**model.content, "sampling": sampling})


def weight_bytes(generator: Generator) -> int:
    """Return the bytes of all weights."""
    return sum(parameter.nbytes for module in _modules(generator).values() for parameter in module.parameters())


def _modules(generator: Generator) -> dict[str, nn.Module]:
    components = generator.pipeline.components
    return {name: part for name, part in sorted(components.items()) if isinstance(part, nn.Module)}


def _parts(generator: Generator) -> dict[str, str]:
    return {name: fingerprint_module(module) for name, module in _modules(generator).items()}


def _settings(generator: Generator) -> dict[str, Any]:
    """Return the settings of the scheduler and of diffusers' models, as JSON values."""
    diffusers_parts = {
        name: part for name, part in _modules(generator).items() if hasattr(part.config, "get") and part.config
    }
    found = {name: settings_of(part) for name, part in diffusers_parts.items()}
    return json.loads(json.dumps(found | {"scheduler": settings_of(generator.pipeline.scheduler)}))
