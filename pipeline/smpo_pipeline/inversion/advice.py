"""Which inverted states are not to be trusted, and what to do about it (DESIGN 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

from smpo_schemas.manifest import BandHealth, InversionSettings

LOWEST_RATIO = 0.8
HIGHEST_RATIO = 1.25

_ENOUGH_STEPS = 5
"""ReNoise steps that mended every low ratio that was measured with a VAE that fits (docs/walks.md)."""

_MOST_UNCONVERGED = 0.05
"""Share of a band's states above which their solver's failure is worth a warning."""


def believable(band: BandHealth) -> bool:
    """Whether the denoiser predicts about as much noise at the band's states as it does while sampling.

    A band without states is: there is nothing in it to doubt.
    """
    return band.noise_ratio is None or LOWEST_RATIO <= band.noise_ratio <= HIGHEST_RATIO


def health_warnings(health: Sequence[BandHealth], settings: InversionSettings) -> list[str]:
    """A sentence for each timestep band whose noise ratio is out of bounds, then one a side that names the remedies.

    Empty where all bands are well. Training on such states went from no gain to harm while loss, margin and implicit
    accuracy looked fine, so this is the place to find out.
    """
    doubted = [band for band in health if not believable(band)]
    warnings = [
        f"timesteps {band.start} to {band.stop - 1}: noise ratio {band.noise_ratio:.2f} is outside "
        f"{LOWEST_RATIO} .. {HIGHEST_RATIO}: these states are not what the model sees while sampling."
        for band in doubted
    ]
    if doubted and settings.timesteps == "published":
        warnings.append(
            "--timesteps published uses states at timesteps that they do not belong to, which moves the ratio by "
            "itself; --timesteps jittered does not."
        )
    if any(band.noise_ratio < LOWEST_RATIO for band in doubted if band.noise_ratio is not None):
        warnings.append(f"Remedies for a low ratio, in this order: {', then '.join(_against_low(settings))}.")
    if any(band.noise_ratio > HIGHEST_RATIO for band in doubted if band.noise_ratio is not None):
        warnings.append(
            "Remedies for a high ratio, in this order: more --steps, then --start T (a timestep up to which images are "
            "noised forward). More corrections a step raise it further."
        )
    warnings += [
        f"timesteps {band.start} to {band.stop - 1}: {band.unconverged} of {band.solved} images' states did not reach "
        f"--tolerance; their residual says how far they are. Remedies: {', '.join(_against_unconverged(settings))}."
        for band in health
        if band.unconverged > _MOST_UNCONVERGED * band.solved
    ]
    return warnings


def _against_low(settings: InversionSettings) -> list[str]:
    """What these walks have not tried yet."""
    remedies = []
    if settings.solver == "ddim":
        remedies.append("ReNoise steps (--solver renoise --renoise-steps 5)")
    elif settings.solver == "renoise" and settings.renoise_steps < _ENOUGH_STEPS:
        remedies.append(f"more ReNoise steps (--renoise-steps {_ENOUGH_STEPS})")
    if settings.start == "clean":
        remedies.append("--start level0")
    further = " further on" if isinstance(settings.start, int) else ""
    remedies.append(f"--start T{further} (a timestep up to which images are noised forward)")
    return [*remedies, "the VAE that the model was trained with, if this is another"]


def _against_unconverged(settings: InversionSettings) -> list[str]:
    anderson = [] if settings.solver == "anderson" else ["--solver anderson"]
    return [*anderson, "more --steps", *([] if settings.dtype == "fp32" else ["a wider --dtype"])]
