"""Settings against the model they are for, before any work starts."""

from __future__ import annotations

from smpo_common.errors import UserError
from smpo_models.family import Family
from smpo_pipeline.images.buckets import Size, bucket_sizes
from smpo_pipeline.inversion.timesteps import plan_trajectory
from smpo_schemas.inversion_settings import InversionSettings


def check_settings(family: Family, model: str, resolution: int | None, settings: InversionSettings) -> int:
    """The resolution to use, in pixels.

    Raises:
        UserError: the model cannot be inverted with these settings.
    """
    chosen = resolution or family.resolution()
    if chosen % family.resolution_multiple():
        raise UserError(f"--resolution {chosen}: {model} needs a multiple of {family.resolution_multiple()}")
    start, last = settings.start, family.process.num_train_timesteps
    if isinstance(start, int) and not 0 <= start < last:
        raise UserError(f"--start {start}: {model} has timesteps 0 to {last - 1}")
    if isinstance(start, int) and settings.timesteps == "published":
        raise UserError(f"--start {start}: the published timesteps begin at x0; use --start clean")
    if settings.states is not None and settings.timesteps == "published":
        raise UserError(
            f"--states {settings.states}: a trajectory of --timesteps published has one state; leave it out"
        )
    plan_trajectory(settings, family.process, 0, "", 0)  # refuses what no trajectory can be planned with
    return chosen


def sizes_of_images(family: Family, resolution: int, settings: InversionSettings) -> tuple[Size, ...]:
    """The sizes that images may be brought to: the square alone, or with ``--buckets`` others of about its area."""
    if settings.buckets:
        return bucket_sizes(resolution, family.resolution_multiple())
    return ((resolution, resolution),)
