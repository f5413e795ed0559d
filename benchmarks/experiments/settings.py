"""Choose each way's settings on the validation prompts, with a training seed that is not among the final ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.experiments.experiment import gain, head
from benchmarks.experiments.objectives import SELECTION_SEED, Condition, judge, train
from smpo_pipeline.evaluation.results import Results

Setting = tuple[Condition, int]
"""How to train, and its beta."""

Ways = Mapping[str, Sequence[Setting]]
"""The settings of each way to train, by its name."""


def make_settings(
    name: str, betas: Iterable[int], variants: Sequence[tuple[str, ...]], source: str = "renoise"
) -> list[Setting]:
    """List the settings of one way to train: each variant of its flags at each beta."""
    return [
        (Condition(name + (f"-{number}" if number else ""), source, flags), beta)
        for number, flags in enumerate(variants)
        for beta in betas
    ]


def describe(setting: Setting) -> str:
    """Write a setting as flags, without the rewards."""
    condition, beta = setting
    rewards = ("--reward", "pickscore", "clipscore")
    return " ".join([*(flag for flag in condition.flags if flag not in rewards), "--beta", str(beta)])


def name_of(setting: Setting, seed: int) -> str:
    """Name of the model that :func:`benchmarks.experiments.objectives.train` makes."""
    return f"{setting[0].label}-b{setting[1]}-s{seed}"


def choose(
    work: Path,
    ways: Ways,
    training: Sequence[object],
    images: int,
    *,
    report: str,
    guidance: int = 1,
    negative: bool = False,
    prompts: str | Path = "validation",
) -> tuple[dict[str, Setting], Results]:
    """Choose for each way the setting with the largest gain on the validation prompts, by images of each prompt."""
    models = [train(work, *setting, SELECTION_SEED, training) for settings in ways.values() for setting in settings]
    results = judge(work, report, models, prompts, images, guidance, negative=negative)
    chosen = {way: max(settings, key=lambda each: setting_gain(results, each)) for way, settings in ways.items()}
    return chosen, results


def setting_gain(results: Results, setting: Setting) -> float:
    """Gain in mean true reward of a setting's model in :func:`choose`."""
    return gain(results, name_of(setting, SELECTION_SEED))


def tried_section(selection: Results, ways: Ways) -> str:
    """Make the section with the gain of every setting on validation prompts."""
    rows = [
        f"| {way} | {describe(setting)} | {setting_gain(selection, setting):+.3f} |"
        for way, settings in ways.items()
        for setting in settings
    ]
    return f"""## How settings were chosen

Gain in mean true reward on {selection.num_images} images of {selection.num_prompts} validation prompts, with one
training seed ({SELECTION_SEED}) that is not among those above. The setting with the largest gain was used.

{head("way", "settings", "gain")}
{chr(10).join(rows)}"""
