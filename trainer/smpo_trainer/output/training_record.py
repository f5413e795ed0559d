"""``training.json``: how a model was trained, and the result."""

from __future__ import annotations

from typing import Any, TypedDict

from smpo_trainer.monitoring.metrics import Record


class RewardInMix(TypedDict):
    """One reward of the preference that a run learned from.

    Attributes:
        weight: its weight in the mix.
        scale: what its score differences were divided by.
        model: hub id or folder of the reward model.
        unit: unit of the raw score.
        min, max: smallest and largest score over the data set, as in the shards' manifest.
    """

    weight: float
    scale: float
    model: str
    unit: str
    min: float
    max: float


class TrainedShards(TypedDict):
    """One directory of shards.

    Attributes:
        path: the folder or URL, as given to ``--shards``.
        manifest_sha256: hash of its ``manifest.json``.
    """

    path: str
    manifest_sha256: str


class BestStep(TypedDict):
    """The best checkpoint.

    Attributes:
        step: number of its optimizer steps.
        reward: mean reward of its validation images.
    """

    step: int
    reward: float


class TrainingRecord(TypedDict):
    """The whole of ``training.json``.

    Attributes:
        schema_version: version of this file's format.
        settings: all settings that decide the result; an unfinished run is continued only with the same settings.
        model: ``--model``; for a folder, its absolute path.
        kind: model family, for example ``sd15``.
        objective: ``--objective``.
        rewards: the rewards, by name; empty for objectives that learn from labels.
        shards: the directories of shards, in the order of ``--shards``.
        starts_from_reference: whether training started from the weights that the reference errors belong to.
        states: number of states that the run draws from.
        states_per_step: states of an optimizer step, over all processes and accumulated batches.
        steps: number of optimizer steps.
        epochs: how often each state was used, on average.
        best: with ``--validation-reward``: ``step`` and mean ``reward`` of the best checkpoint, which is the result;
            otherwise None, and the result is the last one.
        warnings: health warnings of the run, then its spikes, each in order.
        metrics: the last line of ``metrics.jsonl``.
        versions: versions of this package and its libraries.
    """

    schema_version: int
    settings: dict[str, Any]
    model: str
    kind: str
    objective: str
    rewards: dict[str, RewardInMix]
    shards: list[TrainedShards]
    starts_from_reference: bool
    states: int
    states_per_step: int
    steps: int
    epochs: float
    best: BestStep | None
    warnings: list[str]
    metrics: Record
    versions: dict[str, str]
