"""What a user should know: where a run departs from what was published, and states of rare shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from smpo_schemas.inversion_settings import InversionSettings
from smpo_trainer.experiment import Experiment
from smpo_trainer.presets import PRESETS, Preset, as_flags


def remarks(experiment: Experiment, states_per_step: int) -> list[str]:
    """Lines about the preset, the shards and the rewards; none where nothing departs.

    Args:
        experiment: resolved.
        states_per_step: pairs of an optimizer step, over all devices.
    """
    name = experiment.settings.preset
    preset = PRESETS[name] if name else None
    lines = _of_preset(preset, experiment, states_per_step) if preset else []
    lines += _of_shards({**experiment.objective.published_shards, **(preset.shards if preset else {})}, experiment)
    who = f"--preset {name}" if name else f"--objective {experiment.objective.name}"
    warnings = experiment.objective.warnings(experiment.mix) if experiment.mix else []
    return [
        *(f"{who}: {line}" for line in lines),
        *(f"WARNING: --objective {experiment.objective.name}: {line}" for line in warnings),
    ]


def _of_preset(preset: Preset, experiment: Experiment, states_per_step: int) -> list[str]:
    kind, mix = experiment.shards.model.kind, experiment.mix
    lines = []
    if preset.kind != kind:
        lines.append(f"these are settings published for {preset.kind}, the shards are of {kind}")
    if preset.pairs and states_per_step != preset.pairs:
        scaled = ", and the learning rate is scaled by them" if experiment.settings.optimizer.scale_lr else ""
        lines.append(
            f"published are {preset.pairs} pairs a step, here are {states_per_step} "
            f"(--batch-size x --grad-accum x devices){scaled}"
        )
    if preset.starts_from_sft and experiment.settings.denoiser.unet is None:
        lines.append(
            "the published run and its reference start from a denoiser that was fine-tuned on the preferred images "
            "(--objective sft); give it as --unet, here and to `smpo-pipeline invert`"
        )
    if "reward_range" in preset.flags and mix and set(mix.preference.weights) != {"pickscore"}:
        lines.append(f"published is the reward pickscore alone, here are: {', '.join(mix.preference.weights)}")
    return lines


def _of_shards(published: Mapping[str, object], experiment: Experiment) -> list[str]:
    made = [_as_made(directory.manifest.inversion) for directory in experiment.shards.directories]
    other = [name for name, value in published.items() if any(each[name] != value for each in made)]
    if not other:
        return []
    here = sorted({as_flags({name: each[name] for name in other}) for each in made})
    return [f"published with shards of {as_flags({name: published[name] for name in other})}; here {', '.join(here)}"]


def _as_made(inversion: InversionSettings) -> dict[str, Any]:
    """The settings; ReNoise without an iteration is DDIM inversion, by either name."""
    made = inversion.model_dump()
    if made["solver"] == "renoise" and made["renoise_steps"] == 0:
        made["solver"] = "ddim"
    return made


def bucket_remark(bucket_S: np.ndarray, group: int) -> str | None:
    """What to tell the user of several buckets."""
    sizes = np.unique(bucket_S, return_counts=True)[1]
    if len(sizes) == 1:
        return None
    rare = sizes[sizes < group]
    waits = (
        f"; of {len(rare)} there are fewer states than that, {rare.sum()} in all, which wait for later epochs"
        if len(rare)
        else ""
    )
    return f"latents of {len(sizes)} shapes, {group} states of one at a time{waits}"
