"""Which inverted states are not to be trusted, and what to do about it (DESIGN 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

from smpo_schemas.manifest import BandHealth

LOWEST_RATIO = 0.8
HIGHEST_RATIO = 1.25

_REMEDIES = (
    "Remedies, the cheapest first: more ReNoise steps (--renoise-steps 5), then --start level0, "
    "then --start T (a timestep up to which images are noised forward)."
)
_MOST_UNCONVERGED = 0.05
"""Share of a band's states above which their solver's failure is worth a warning."""


def believable(band: BandHealth) -> bool:
    """Whether the denoiser predicts about as much noise at the band's states as it does while sampling.

    A band without states is: there is nothing in it to doubt.
    """
    return band.noise_ratio is None or LOWEST_RATIO <= band.noise_ratio <= HIGHEST_RATIO


def health_warnings(health: Sequence[BandHealth]) -> list[str]:
    """A sentence for each timestep band whose noise ratio is out of bounds, then one that names the remedies.

    Empty where all bands are well. Training on such states went from no gain to harm while loss, margin and implicit
    accuracy looked fine, so this is the place to find out.
    """
    warnings = [
        f"timesteps {band.start} to {band.stop - 1}: noise ratio {band.noise_ratio:.2f} is outside "
        f"{LOWEST_RATIO} .. {HIGHEST_RATIO}: these states are not what the model sees while sampling."
        for band in health
        if not believable(band)
    ]
    if warnings:
        warnings.append(_REMEDIES)
    warnings += [
        f"timesteps {band.start} to {band.stop - 1}: {band.unconverged} of {band.solved} images' states did not reach "
        "--tolerance; their residual says how far they are. Remedies: --solver anderson, more --steps, a wider --dtype."
        for band in health
        if band.unconverged > _MOST_UNCONVERGED * band.solved
    ]
    return warnings
