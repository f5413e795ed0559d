"""Load and identify the models of jobs that make shards: ``invert`` and ``steps``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar, cast

from torch import nn

from smpo_common.errors import UserError
from smpo_models.family import Family
from smpo_models.fingerprint import fingerprint_module, settings_of
from smpo_models.loading import load_family, load_tuned_denoiser
from smpo_models.weights import DTYPES
from smpo_pipeline.jobs.invert.options import InversionOptions
from smpo_pipeline.jobs.steps.options import StepsOptions
from smpo_schemas.manifest import ModelInfo

ModelChoice = InversionOptions | StepsOptions
AnyOptions = TypeVar("AnyOptions", bound=ModelChoice)


def read_configs(options: ModelChoice) -> Family:
    """Read the model's configs and check the settings of the model against them, without loading weights.

    Raises:
        UserError: the model does not know a setting.
    """
    models = options.models
    family = load_family(models.model, (), denoiser=models.unet, vae=models.vae)
    _set_up(family, options)
    return family


def _set_up(family: Family, options: ModelChoice) -> None:
    guidance, steps = options.trajectory.embedded_guidance, options.trajectory.sampler_steps
    model = options.models.model
    if guidance is not None:
        if family.embedded_guidance is None:
            raise UserError(
                f"--embedded-guidance {guidance:g}: {model} ({family.kind}) is told no guidance scale; leave it out"
            )
        family.embedded_guidance = guidance
    if steps is not None:
        if family.noise_schedule.sampler_steps is None:
            raise UserError(
                f"--sampler-steps {steps}: the timesteps of {model} do not depend on it, only those of flow models "
                "whose schedule is shifted by the number of steps do; leave it out"
            )
        family.noise_schedule.sampler_steps = steps
    family.encodes_empty_prompt = options.storing.empty_prompt == "encoded"


def choose_text(options: AnyOptions) -> AnyOptions:
    """Replace ``--text auto`` by what the model's family says.

    Raises:
        UserError: the model is missing or of no known family.
    """
    if options.storing.text != "auto":
        return options
    text = "stored" if load_family(options.models.model, ()).stores_text else "live"
    return cast("AnyOptions", options.replace(text=text))


def load_models(options: ModelChoice, *, text: bool = True) -> tuple[Family, nn.Module]:
    """Load the model with its reference denoiser, and the inverting denoiser (default: the reference), on the CPU.

    Args:
        options: name them.
        text: whether to load the text encoders.
    """
    models = options.models
    parts = ("denoiser", "text", "vae") if text else ("denoiser", "vae")
    # Not on the GPU: before they are cast, the two denoisers take twice the memory that they need later.
    family = load_family(
        models.model,
        parts,
        denoiser=models.unet,
        vae=models.vae,
        variant=models.variant,
        denoiser_dtype=DTYPES[options.settings.dtype],
    )
    _set_up(family, options)
    if models.inverting_unet is None:
        return family, family.denoiser
    path = models.inverting_unet
    return family, load_tuned_denoiser(family, models.model, path, f"{models.inverting_flag} {path}", models.variant)


def load_text_encoders(options: ModelChoice) -> Family:
    """Load the model's text encoders alone, on the CPU."""
    family = load_family(options.models.model, ("text",), variant=options.models.variant)
    family.encodes_empty_prompt = options.storing.empty_prompt == "encoded"
    return family


class ModelIdentity(ModelInfo):
    """The manifest's description of the models, plus their settings, which no fingerprint covers."""

    settings: dict[str, Any]

    def is_of(self, family: Family, inverting_denoiser: nn.Module, options: ModelChoice) -> bool:
        """Whether these models, perhaps loaded without their text encoders, are the described ones."""
        loaded = describe_model(options, family, inverting_denoiser)
        if family.text_modules:
            return loaded == self
        settings = {name: value for name, value in self.settings.items() if name in loaded.settings}
        return loaded == self.model_copy(update={"text": loaded.text, "settings": settings})

    def has_text_of(self, family: Family) -> bool:
        """Whether the loaded text encoders are those of the described model."""
        settings = family.text_settings()
        return fingerprint_module(*family.text_modules) == self.text and settings == {
            name: self.settings.get(name) for name in settings
        }

    def info(self) -> ModelInfo:
        """Return the part that the manifest holds."""
        return ModelInfo(**self.model_dump(exclude={"settings"}))


def describe_model(options: ModelChoice, family: Family, inverting_denoiser: nn.Module) -> ModelIdentity:
    """Identify the models; call it before they are cast from float32."""
    reference = fingerprint_module(family.denoiser)
    return ModelIdentity(
        id=options.models.model,
        kind=family.kind,
        prediction_type=family.noise_schedule.prediction_type,
        reference=reference,
        inverting_denoiser=reference
        if inverting_denoiser is family.denoiser
        else fingerprint_module(inverting_denoiser),
        text=fingerprint_module(*family.text_modules),
        vae=fingerprint_module(family.vae),
        scheduler=family.noise_schedule.fingerprint(),
        num_train_timesteps=family.noise_schedule.num_train_timesteps,
        embedded_guidance=family.embedded_guidance,
        sampler_steps=family.noise_schedule.sampler_steps,
        settings={**family.settings(), "inverting_denoiser": settings_of(inverting_denoiser)},
    )


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of all weights."""
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())
