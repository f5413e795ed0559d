"""What is in a directory of shards.

Shape suffixes: W trajectories, S states of one image each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from smpo_common.errors import UserError
from smpo_pipeline.images.buckets import buckets_in_words
from smpo_pipeline.inspection.scores import print_sharpness
from smpo_pipeline.inversion.advice import believable, health_warnings, unsolved
from smpo_pipeline.terminal import QUANTILE_NAMES, counted, facts, histogram, make_table, percent, quantile_cells
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import Manifest
from smpo_schemas.preference.minmax import minmax
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.samples import Sample

_TIMESTEP_BINS = 10


@dataclass
class ShardsSummary:
    """Sums over the trajectories that were read; filled trajectory by trajectory.

    Attributes:
        manifest: of the directory.
        trajectories: number of trajectories read.
        flipped, dropped: how many of them.
        timesteps: of every stored state, once a pair.
        residual_timesteps, residuals: of every stored state, once an image.
        ref_errors: likewise.
        scores: per reward, [score of image_0, score of image_1] of every trajectory.
        chosen: trajectories for the contact sheet.
    """

    manifest: Manifest
    trajectories: int = 0
    flipped: int = 0
    dropped: int = 0
    timesteps: list[np.ndarray] = field(default_factory=list)
    residuals: list[np.ndarray] = field(default_factory=list)
    ref_errors: list[np.ndarray] = field(default_factory=list)
    scores: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    chosen: list[Sample] = field(default_factory=list)


def summarise_shards(
    directory: Path, *, limit: int | None, samples: int, advance: Callable[[int, int], None]
) -> ShardsSummary:
    """Check and read the shards, and keep some trajectories for the sheet, spread evenly over those read.

    Args:
        directory: output of invert.
        limit: read only the first so many trajectories (tars after them are not checked).
        samples: trajectories to keep.
        advance: told the number of trajectories read so far and of trajectories to read.

    Raises:
        UserError: unfinished, or a tar is missing or damaged.
    """
    shards = ShardDirectory(directory)
    total = shards.manifest.totals.samples
    total = min(total, limit) if limit else total
    wanted = set(np.linspace(0, max(0, total - 1), min(samples, total)).round().astype(int).tolist())
    summary = ShardsSummary(shards.manifest, scores={name: [] for name in shards.manifest.rewards})
    for sample in _first(shards.samples(), total):
        if summary.trajectories in wanted:
            summary.chosen.append(sample)
        summary.trajectories += 1
        summary.flipped += sample.meta.flipped
        summary.dropped += sample.meta.prompt_dropped
        summary.timesteps.append(sample.timestep_K.numpy())
        summary.residuals.append(sample.residual_K2.numpy())
        summary.ref_errors.append(sample.ref_error_K2.numpy())
        if set(sample.meta.scores) != set(summary.scores):
            raise UserError(
                f"{directory}: pair {sample.meta.pair_id} has scores of {sorted(sample.meta.scores)}, "
                f"the manifest names {sorted(summary.scores)}"
            )
        for name, scores in sample.meta.scores.items():
            summary.scores[name].append(scores)
        advance(summary.trajectories, total)
    return summary


def _first(samples: Iterator[Sample], count: int) -> Iterator[Sample]:
    """The first ``count``; unlike islice it does not touch what comes after them, where a tar would be checked."""
    for _, sample in zip(range(count), samples, strict=False):
        yield sample


def print_shards(summary: ShardsSummary, path: Path, console: Console) -> None:
    """Print what was found, warnings last."""
    manifest = summary.manifest
    totals = manifest.totals
    read = "all" if summary.trajectories == totals.samples else f"the first {summary.trajectories}"
    console.print(
        facts(
            f"shards: {path}",
            {
                "pairs": f"{totals.pairs_in} in = {totals.pairs} inverted + {totals.rejected} rejected",
                "rejected": counted(manifest.rejected_reasons),
                "trajectories": f"{totals.samples}, {totals.states} states of a pair; read {read} of them",
                "files": f"{len(manifest.shards)} tars, {totals.bytes / 1e6:.1f} MB",
                "model": f"{manifest.model.id} ({manifest.model.kind}, {manifest.model.prediction_type}), "
                f"{manifest.resolution} pixels",
                **_bucket_words(manifest),
                "reference": f"{manifest.model.reference[:16]}{_inverting_denoiser_words(manifest)}; its errors in "
                f"{manifest.ref_error_arithmetic}",
                "states": settings_in_words(manifest.inversion),
                "seed": f"{manifest.seed}",
                "flipped": percent(summary.flipped, summary.trajectories),
                "empty prompt": percent(summary.dropped, summary.trajectories),
                "rewards": ", ".join(manifest.rewards) or "none",
            },
        )
    )
    if not summary.trajectories:
        return
    timesteps = np.concatenate(summary.timesteps)
    edges = np.linspace(0, manifest.model.num_train_timesteps, _TIMESTEP_BINS + 1)
    console.print(histogram("timesteps of the states", timesteps, edges.tolist()))
    _print_bands(summary, timesteps, console)
    _print_health(manifest, console)
    rewards = {name: reward for name, reward in manifest.rewards.items() if reward.max > reward.min}
    scores = {name: np.array(summary.scores[name], dtype=np.float64).reshape(-1, 2) for name in rewards}
    print_sharpness({name: minmax(scores, rewards, {name: 1.0}) for name in rewards}, console)
    for warning in health_warnings(manifest.health, manifest.inversion):
        console.print(f"warning: {warning}", style="bold red", highlight=False, soft_wrap=True)


def _bucket_words(manifest: Manifest) -> dict[str, str]:
    return {"buckets": f"{buckets_in_words(manifest.buckets)}, height x width"} if manifest.buckets else {}


def _inverting_denoiser_words(manifest: Manifest) -> str:
    same = manifest.model.inverting_denoiser == manifest.model.reference
    return ", which inverted itself" if same else f"; inverted by {manifest.model.inverting_denoiser[:16]}"


def settings_in_words(settings: InversionSettings) -> str:
    """The inversion settings as a sentence."""
    if settings.source == "forward":
        noise = {"pair": "one noise a pair", "image": "one noise an image"}[settings.forward_noise]
        how = f"forward noise ({noise}) at {settings.steps} {settings.timesteps} timesteps"
    else:
        start = {"clean": "x0", "level0": "x0 at the first noise level"}.get(
            str(settings.start), f"forward noise up to t = {settings.start}"
        )
        how = (
            f"trajectories of {settings.steps} {settings.timesteps} steps from {start}, "
            f"{solver_in_words(settings)}"
            + (f", eta {settings.eta:g}" if settings.eta else "")
            + (f", guidance {settings.guidance_scale:g}" if settings.guidance_scale != 1 else "")
        )
    kept = "all states" if settings.states is None else f"{settings.states} states a trajectory"
    times = f"{settings.trajectories} {'trajectories' if settings.trajectories > 1 else 'trajectory'}"
    return (
        f"{how}; {kept} stored, {times} a pair; "
        f"VAE {settings.vae_latent}; prompt dropped with probability {settings.prompt_dropout:g}; "
        f"{'flips' if settings.hflip else 'no flips'}; {settings.dtype}"
    )


def solver_in_words(settings: InversionSettings) -> str:
    """How the steps of a trajectory were solved."""
    if settings.solver == "ddim":
        return "DDIM inversion without correction"
    if settings.solver == "renoise":
        average = "" if settings.renoise_average == "last2" else f", the mean of {settings.renoise_average} taken"
        return f"{settings.renoise_steps} ReNoise steps each{average}"
    depth = f" of depth {settings.anderson_depth}" if settings.solver == "anderson" else ""
    return (
        f"each solved by {settings.solver} iteration{depth} to {settings.tolerance:g} "
        f"or {settings.max_evaluations} evaluations"
    )


def _print_bands(summary: ShardsSummary, timesteps: np.ndarray, console: Console) -> None:
    """Quantiles of residual and reference error by timestep band."""
    for title, values, note in (
        ("residual", summary.residuals, "distance from the exact inversion, relative to the state"),
        ("ref_error", summary.ref_errors, "the reference's mean squared error at the stored state"),
    ):
        values_S2 = np.concatenate(values)
        table = make_table(f"{title}: {note}", ("timesteps", "states", *QUANTILE_NAMES))
        for band in summary.manifest.health:
            inside = values_S2[(timesteps >= band.start) & (timesteps < band.stop)].ravel()
            known = inside[~np.isnan(inside)]
            table.add_row(f"{band.start} .. {band.stop - 1}", f"{len(known)}", *quantile_cells(known))
        if np.isfinite(values_S2).any():
            console.print(table)


def _print_health(manifest: Manifest, console: Console) -> None:
    health = manifest.health
    columns = ["timesteps", "states", "noise ratio", "residual", "neighbour correlation"]
    with_tolerance = any(band.solved for band in health)
    if with_tolerance:
        columns.append("not converged, of all")
    table = make_table("are the states believable (on a sample; an exact inversion has noise ratio 1)", columns)
    for band in health:
        numbers = [
            "-" if value is None else f"{value:.3f}"
            for value in (band.noise_ratio, band.residual, band.neighbour_correlation)
        ]
        if with_tolerance:
            numbers.append(f"{band.unconverged} of {band.solved}")
        style = None if believable(band) and not unsolved(band, manifest.inversion) else "bold red"
        table.add_row(f"{band.start} .. {band.stop - 1}", f"{band.states}", *numbers, style=style)
    console.print(table)
