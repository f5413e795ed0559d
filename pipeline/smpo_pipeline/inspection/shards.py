"""Describe a directory of shards.

Shape suffixes: S states, 2 images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from smpo_common.errors import UserError
from smpo_models.sampling import sampling_in_words
from smpo_pipeline.images.buckets import describe_buckets
from smpo_pipeline.inspection.scores import print_sharpness
from smpo_pipeline.inversion.advice import believable, health_warnings, sampling_remarks, unsolved
from smpo_pipeline.terminal import QUANTILE_NAMES, counted, facts, histogram, make_table, percent, quantile_cells
from smpo_schemas.inversion_settings import GENERATED, InversionSettings
from smpo_schemas.manifest import TEXT_FOLDER, Manifest, ModelInfo, StepSettings
from smpo_schemas.preference.minmax import minmax
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.samples import Sample
from smpo_schemas.shards.text import verify_text

_TIMESTEP_BINS = 10


@dataclass
class ShardsSummary:
    """Values of the trajectories that were read.

    Attributes:
        manifest: of the directory.
        trajectories: number of trajectories read.
        flipped, dropped: number of trajectories that are mirrored, or under the empty prompt.
        timesteps: per trajectory, [K].
        residuals, ref_errors: per trajectory, [K, 2].
        scores: per reward and trajectory, the scores of image_0 and image_1.
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
    """Verify and read the shards, and choose evenly spaced trajectories for the sheet.

    Args:
        directory: output of invert.
        limit: maximum number of trajectories to read; tars after them are not verified.
        samples: number of trajectories for the sheet.
        advance: called with the number of trajectories read so far and the number to read.

    Raises:
        UserError: the output is unfinished, or a tar or a file of stored text is missing or damaged.
    """
    shards = ShardDirectory(directory)
    if shards.manifest.text:
        verify_text(directory / TEXT_FOLDER, shards.manifest.text.index)
        for file in shards.manifest.text.files:
            verify_text(directory / TEXT_FOLDER, file)
    total = shards.manifest.totals.samples
    total = min(total, limit) if limit else total
    chosen = set(np.linspace(0, max(0, total - 1), min(samples, total)).round().astype(int).tolist())
    summary = ShardsSummary(shards.manifest, scores={name: [] for name in shards.manifest.rewards})
    for sample in _first(shards.samples(), total):
        if summary.trajectories in chosen:
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
                f"the manifest has {sorted(summary.scores)}"
            )
        for name, scores in sample.meta.scores.items():
            summary.scores[name].append(scores)
        advance(summary.trajectories, total)
    return summary


def _first(samples: Iterator[Sample], count: int) -> Iterator[Sample]:
    """Yield the first ``count`` samples; unlike islice, do not start on the next one, which may verify a large tar."""
    for _, sample in zip(range(count), samples, strict=False):
        yield sample


def _of_flow(model: ModelInfo) -> dict[str, str]:
    """Describe what only some flow models know."""
    values = {"embedded guidance": model.embedded_guidance, "sampler steps": model.sampler_steps}
    return {name: f"{value:g}" for name, value in values.items() if value is not None}


def _of_samplings(manifest: Manifest) -> dict[str, str]:
    """Describe how the images were made, where their latents were kept."""
    made = [sampling_in_words(each.sampler, each.steps, each.guidance_scale) for each in manifest.samplings]
    negative = ", with a negative model" if any(each.negative for each in manifest.samplings) else ""
    return {"images": f"generated, {'; '.join(dict.fromkeys(made))}{negative}"} if made else {}


def print_shards(summary: ShardsSummary, path: Path, console: Console) -> None:
    """Print the summary, warnings last."""
    manifest = summary.manifest
    totals = manifest.totals
    read = "all" if summary.trajectories == totals.samples else f"the first {summary.trajectories}"
    made = "drawn" if manifest.steps else "inverted"
    own = manifest.model.inverting_denoiser == manifest.model.reference
    console.print(
        facts(
            f"shards: {path}",
            {
                "pairs": f"{totals.pairs_in} in = {totals.pairs} {made} + {totals.rejected} rejected",
                "rejected": counted(manifest.rejected_reasons),
                "trajectories": f"{totals.samples} with {totals.states} states; {read} read",
                "files": f"{len(manifest.shards)} tars, {totals.bytes / 1e6:.1f} MB",
                "text": _describe_text(manifest),
                "model": f"{manifest.model.id} ({manifest.model.kind}, {manifest.model.prediction_type}), "
                f"{manifest.resolution} pixels",
                **({"buckets": f"{describe_buckets(manifest.buckets)}, height x width"} if manifest.buckets else {}),
                "reference": f"{manifest.model.reference[:16]}; its errors in {manifest.ref_error_arithmetic}",
                f"{made} by": "the reference" if own else manifest.model.inverting_denoiser[:16],
                **(
                    {"step pairs": _describe_steps(manifest.inversion, manifest.steps)}
                    if manifest.steps
                    else {"inversion": describe_settings(manifest.inversion)}
                ),
                **_of_flow(manifest.model),
                **_of_samplings(manifest),
                "seed": f"{manifest.seed}",
                "mirrored": percent(summary.flipped, summary.trajectories),
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
    for remark in sampling_remarks(manifest):
        console.print(f"remark: {remark}", highlight=False, soft_wrap=True)
    for warning in health_warnings(manifest.health, manifest.inversion):
        console.print(f"warning: {warning}", style="bold red", highlight=False, soft_wrap=True)


def _describe_text(manifest: Manifest) -> str:
    text = manifest.text
    if text is None:
        return "not stored: the trainer encodes the prompts"
    return f"{text.prompts} prompts stored once in {text.dtype}, {text.bytes / 1e6:.1f} MB in {len(text.files)} files"


def _describe_steps(settings: InversionSettings, steps: StepSettings) -> str:
    """Describe step pairs in one sentence."""
    return (
        f"{steps.candidates} draws of each of the sampler's steps {', '.join(map(str, steps.trained))} of "
        f"{settings.steps}, eta {settings.eta:g}, guidance {settings.guidance_scale:g}; a trajectory continues from "
        f"{'the best' if steps.continue_from == 'winner' else 'a random one'}; {settings.dtype}"
    )


def describe_settings(settings: InversionSettings) -> str:
    """Describe the inversion settings in one sentence."""
    if settings.source == "forward":
        noise = {"pair": "the same noise for both images", "image": "separate noise for each image"}
        source = f"forward noise ({noise[settings.forward_noise]}) at {settings.steps} {settings.timesteps} timesteps"
    elif settings.source == "tracked":
        source = f"each image's own initial noise at {settings.steps} {settings.timesteps} timesteps"
    elif settings.source == "sampled":
        source = f"up to {settings.steps} of the sampler's own states"
    elif settings.source == "truncated":
        source = (
            f"the model's own estimates of x0 after {settings.truncated_steps} of the sampler's {settings.steps} steps "
            f"from {'pure noise' if settings.truncated_from == 'noise' else 'the noised image'}, guidance "
            f"{settings.guidance_scale:g}, noised again"
        )
    else:
        start = {"clean": "x0", "level0": "x0 at the first noise level"}.get(
            str(settings.start), f"forward noise up to t = {settings.start}"
        )
        source = (
            f"{settings.steps} {settings.timesteps} steps from {start}, {_describe_solver(settings)}"
            + (f", eta {settings.eta:g}" if settings.eta else "")
            + (f", guidance {settings.guidance_scale:g}" if settings.guidance_scale != 1 else "")
        )
    states = "all states" if settings.states is None else f"{settings.states} states per trajectory"
    latents = "the sampler's last latents" if settings.source in GENERATED else f"VAE {settings.vae_latent}"
    count = f"{settings.trajectories} {'trajectories' if settings.trajectories > 1 else 'trajectory'}"
    return (
        f"{source}; {states} stored; {count} per pair; "
        f"{latents}; prompt dropped with probability {settings.prompt_dropout:g}; "
        f"{'half mirrored' if settings.hflip else 'not mirrored'}; {settings.dtype}"
    )


def _describe_solver(settings: InversionSettings) -> str:
    if settings.solver == "ddim":
        return "DDIM inversion without correction"
    if settings.solver == "renoise":
        average = "" if settings.renoise_average == "last2" else f", mean of estimates {settings.renoise_average}"
        return f"{settings.renoise_steps} ReNoise iterations each{average}"
    depth = f" of depth {settings.anderson_depth}" if settings.solver == "anderson" else ""
    return (
        f"each solved by {settings.solver} iteration{depth} to residual {settings.tolerance:g} "
        f"or {settings.max_evaluations} evaluations"
    )


def _print_bands(summary: ShardsSummary, timesteps: np.ndarray, console: Console) -> None:
    """Print quantiles of residual and reference error by timestep band."""
    for title, values, note in (
        ("residual", summary.residuals, "distance from the fixed point of exact inversion, relative to the state"),
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
        columns.append("not converged (all states)")
    table = make_table("quality of the states, on a sample of pairs (exact inversion has noise ratio 1)", columns)
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
