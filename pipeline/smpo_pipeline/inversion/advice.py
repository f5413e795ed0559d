"""Tell which inverted states are not to be trusted, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

from smpo_schemas.inversion_settings import GENERATED, InversionSettings
from smpo_schemas.manifest import FLOW, BandHealth, Manifest

LOWEST_RATIO = 0.8
HIGHEST_RATIO = 1.25

HIGHEST_RESIDUAL = 0.2
"""Twice the largest mean residual of a band that any solver had on the embedded worlds: DDIM inversion in 5 steps, 0.1
(docs/results/trajectories.md). Beyond, a step was not solved at all."""

_ENOUGH_STEPS = 5
"""ReNoise steps that corrected every low ratio measured with a VAE that fits (docs/results/trajectories.md)."""

_MOST_UNCONVERGED = 0.05
"""Share of a band's states above which their solver's failure is worth a warning."""


def believable(band: BandHealth) -> bool:
    """Whether the denoiser predicts about as much noise at the band's states as it does while sampling.

    A band without states is: there is nothing in it to doubt.
    """
    return band.noise_ratio is None or LOWEST_RATIO <= band.noise_ratio <= HIGHEST_RATIO


def unsolved(band: BandHealth, settings: InversionSettings) -> bool:
    """Whether the band's states are too far from solving their steps, which the noise ratio alone does not see.

    With ``--eta`` the residual holds the noise that is added after each step, and says nothing of the solver.
    """
    return band.residual is not None and band.residual > HIGHEST_RESIDUAL and not settings.eta


def health_warnings(health: Sequence[BandHealth], settings: InversionSettings) -> list[str]:
    """Return a sentence for each timestep band whose noise ratio or residual is out of bounds, and the remedies.

    The list is empty if all bands are in bounds. Training on states out of bounds brought no gain or did harm, while
    loss, margin and implicit accuracy looked fine: only this check finds out.
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
    if doubted and settings.source == "truncated":
        return [
            *warnings,
            "Their x0 is the model's own estimate (--source truncated), for which no remedy was measured.",
        ]
    if doubted and settings.source in GENERATED:
        return [*warnings, f"Remedies: {', then '.join(_of_generated(settings))}."]
    if any(band.noise_ratio < LOWEST_RATIO for band in doubted if band.noise_ratio is not None):
        warnings.append(f"Remedies for a low ratio, in this order: {', then '.join(_against_low(settings))}.")
    if any(band.noise_ratio > HIGHEST_RATIO for band in doubted if band.noise_ratio is not None):
        warnings.append(
            "Remedies for a high ratio, in this order: more --steps, then --start T (a timestep up to which images are "
            "noised forward). More corrections a step raise it further."
        )
    remote = [band for band in health if unsolved(band, settings)]
    warnings += [
        f"timesteps {band.start} to {band.stop - 1}: residual {band.residual:.2f} is above {HIGHEST_RESIDUAL}: these "
        "steps were not solved, and sampling does not lead from their states to the images."
        for band in remote
    ]
    if remote:
        warnings.append(f"Remedies for a high residual, in this order: {', then '.join(_against_residual(settings))}.")
    warnings += [
        f"timesteps {band.start} to {band.stop - 1}: {band.unconverged} of {band.solved} images' states did not reach "
        f"--tolerance; their residual says how far they are. Remedies: {', '.join(_against_unconverged(settings))}."
        for band in health
        if band.unconverged > _MOST_UNCONVERGED * band.solved
    ]
    return warnings


def sampling_remarks(manifest: Manifest) -> list[str]:
    """Return a sentence for each way in which images were sampled otherwise than by the model that measures states."""
    told, remarks = manifest.model.embedded_guidance, []
    for scale in sorted({each.guidance_scale for each in manifest.samplings if each.guidance_scale is not None}):
        if told is None and scale != 1:
            remarks.append(
                f"the images were sampled at guidance scale {scale:g}, so their states lie off the path of the model "
                "without guidance, which measures ref_error and is trained"
            )
        if told is not None and scale != told:
            remarks.append(
                f"the images were sampled by the model told guidance scale {scale:g}, ref_error is of the model told "
                f"{told:g} (--embedded-guidance)"
            )
    if manifest.inversion.source == "tracked" and manifest.model.prediction_type != FLOW:
        remarks.append(
            "--source tracked approximates the sampler's states, whose path is curved: see the noise ratio; "
            "--source sampled takes the states themselves"
        )
    return remarks


def _of_generated(settings: InversionSettings) -> list[str]:
    """List the remedies if the states are those of images that `generate` made."""
    sampled = ["--source sampled (of `generate --keep states:M`)"] if settings.source == "tracked" else []
    return [*sampled, "images generated at --guidance-scale 1", "--source renoise"]


def _against_low(settings: InversionSettings) -> list[str]:
    """List the remedies for a low noise ratio that these settings do not use yet."""
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


def _against_residual(settings: InversionSettings) -> list[str]:
    anderson = [] if settings.solver == "anderson" else ["--solver anderson"]
    unguided = ["a smaller --guidance-scale"] if settings.guidance_scale > 1 else []
    return [*anderson, *unguided, "more --steps", "a trained --model at its own --resolution, if this is none"]


def _against_unconverged(settings: InversionSettings) -> list[str]:
    anderson = [] if settings.solver == "anderson" else ["--solver anderson"]
    return [*anderson, "more --steps", *([] if settings.dtype == "fp32" else ["a wider --dtype"])]
