"""Check an inversion's settings against the model, before any work starts."""

from __future__ import annotations

from smpo_common.errors import UserError
from smpo_models.family import Family
from smpo_pipeline.images.buckets import Size, bucket_sizes
from smpo_pipeline.inversion.timesteps import plan_trajectory
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import FLOW
from smpo_schemas.trained_model import UNET_FOLDER


def check_settings(family: Family, model: str, resolution: int | None, settings: InversionSettings) -> int:
    """Return the resolution to use, in pixels.

    Raises:
        UserError: the model cannot be inverted with these settings.
    """
    chosen = resolution or family.resolution()
    _check_resolution(family, model, chosen, settings)
    if family.noise_schedule.prediction_type == FLOW:
        _refuse_of_flow(model, settings)
    elif settings.timesteps == "published" and family.denoiser_folder != UNET_FOLDER:
        raise UserError(
            f"--timesteps published: the published code is for Stable Diffusion and SDXL; {model} is {family.kind}; "
            "use --timesteps jittered or grid"
        )
    start, last = settings.start, family.noise_schedule.num_train_timesteps
    if isinstance(start, int) and not 0 <= start < last:
        raise UserError(f"--start {start}: {model} has timesteps 0 to {last - 1}")
    if isinstance(start, int) and settings.timesteps == "published":
        raise UserError(f"--start {start}: the published timesteps begin at x0; use --start clean")
    if settings.states is not None and settings.timesteps == "published":
        raise UserError(
            f"--states {settings.states}: a trajectory of --timesteps published has one state; leave it out"
        )
    # Raises if no trajectory can be planned with these settings.
    plan_trajectory(settings, family.noise_schedule, 0, "", 0, tokens=family.num_tokens(chosen, chosen))
    return chosen


def _check_resolution(family: Family, model: str, chosen: int, settings: InversionSettings) -> None:
    """Check that the denoiser can be used at this resolution, and at the sizes of its buckets.

    Raises:
        UserError: it cannot.
    """
    family.check_resolution(chosen, model)
    _, largest = family.resolution_limits()
    side = max(side for size in sizes_of_images(family, chosen, settings) for side in size)
    if largest is not None and side > largest:
        raise UserError(
            f"--buckets: images would have up to {side} pixels a side, {model} knows no positions beyond {largest}; "
            f"take a smaller --resolution than {chosen}, or leave it out"
        )


def _refuse_of_flow(model: str, settings: InversionSettings) -> None:
    """Refuse what only the schedules of variance-preserving models define.

    Raises:
        UserError: the settings ask for it.
    """
    if settings.timesteps == "published":
        raise UserError(
            f"--timesteps published: the published code takes states from DDIM's grid of whole timesteps; {model} is a "
            "flow model, which has none; use --timesteps jittered or grid"
        )
    if settings.eta:
        raise UserError(
            f"--eta {settings.eta:g}: it is in standard deviations of DDIM's posterior; {model} is a flow model, "
            "which has none; leave it out"
        )


def sizes_of_images(family: Family, resolution: int, settings: InversionSettings) -> tuple[Size, ...]:
    """Return the sizes that images may be brought to: the square, or with ``--buckets`` others of its area, too."""
    if settings.buckets:
        return bucket_sizes(resolution, family.resolution_multiple())
    return ((resolution, resolution),)
