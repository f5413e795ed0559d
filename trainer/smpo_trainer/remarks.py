"""Remarks for the user: departures from published settings, and states of rare shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from smpo_common.named_values import parse_ranges
from smpo_schemas.inversion_settings import InversionSettings
from smpo_trainer.experiment import Experiment
from smpo_trainer.presets import PRESETS, Preset, as_flags


def remarks(experiment: Experiment, states_per_step: int) -> list[str]:
    """Return one line for each departure of preset, shards or rewards from what was published.

    Args:
        experiment: the resolved settings.
        states_per_step: states of an optimizer step, over all devices.
    """
    name = experiment.settings.preset
    preset = PRESETS[name] if name else None
    lines = _preset_remarks(preset, experiment, states_per_step) if preset else []
    lines += _shard_remarks(preset.shards if preset else experiment.objective.published_shards, experiment)
    flag = f"--preset {name}" if name else f"--objective {experiment.objective.name}"
    warnings = experiment.objective.warnings(experiment.mix) if experiment.mix else []
    lines = [f"{flag}: {line}" for line in lines]
    drawn = any(directory.manifest.steps for directory in experiment.shards.directories)
    if drawn and experiment.weighting.kind != "transition":
        lines.append(f"--timestep-weighting {experiment.weighting.kind}: that of step pairs' likelihoods is transition")
    return [
        *lines,
        *(f"WARNING: --objective {experiment.objective.name}: {line}" for line in warnings),
    ]


def _preset_remarks(preset: Preset, experiment: Experiment, states_per_step: int) -> list[str]:
    kind, mix = experiment.shards.model.kind, experiment.mix
    lines = []
    if preset.kind != kind:
        lines.append(f"published for {preset.kind} models, but the shards are of {kind}")
    if preset.states_per_step and states_per_step != preset.states_per_step:
        scaled = "; --scale-lr scales the learning rate by it" if experiment.settings.optimizer.scale_lr else ""
        lines.append(
            f"published with {preset.states_per_step} states per step, this run has {states_per_step} "
            f"(--batch-size x --grad-accum x devices){scaled}"
        )
    if preset.starts_from_sft and experiment.settings.denoiser.unet is None:
        lines.append(
            "published with a policy and a reference that were fine-tuned on the preferred images (--objective sft); "
            "give such a denoiser with --unet to this command and to `smpo-pipeline invert`"
        )
    rewards = parse_ranges("--reward-range", cast("list[str]", preset.flags.get("reward_range", [])))
    if rewards and mix and set(mix.preference.weights) != set(rewards):
        lines.append(
            f"published with the reward {', '.join(rewards)} alone, this run has: {', '.join(mix.preference.weights)}"
        )
    decay, max_steps = experiment.settings.loss.beta_decay, experiment.settings.steps.max_steps
    if decay and "beta_decay" in preset.flags and decay.stop != max_steps:
        lines.append(f"--beta-decay {decay} is for a run of {decay.stop} steps, this one has {max_steps}")
    return lines


def _shard_remarks(published: Mapping[str, object], experiment: Experiment) -> list[str]:
    inversions = [_normalised(directory.manifest.inversion) for directory in experiment.shards.directories]
    names = [name for name, value in published.items() if any(settings[name] != value for settings in inversions)]
    if not names:
        return []
    flags = sorted({as_flags({name: settings[name] for name in names}) for settings in inversions})
    return [f"published with shards of {as_flags({name: published[name] for name in names})}; here {', '.join(flags)}"]


def _normalised(inversion: InversionSettings) -> dict[str, Any]:
    settings = inversion.model_dump()
    # ReNoise without iterations is DDIM inversion.
    if settings["solver"] == "renoise" and settings["renoise_steps"] == 0:
        settings["solver"] = "ddim"
    return settings


def bucket_remark(bucket_S: np.ndarray, group: int) -> str | None:
    """Describe the grouping of states by latent shape; None if all have the same shape."""
    sizes = np.unique(bucket_S, return_counts=True)[1]
    if len(sizes) == 1:
        return None
    rare = sizes[sizes < group]
    waits = f"; rarer shapes: {len(rare)} ({rare.sum()} states), which wait for later epochs" if len(rare) else ""
    return f"latents of {len(sizes)} shapes, in groups of {group} states of the same shape{waits}"
