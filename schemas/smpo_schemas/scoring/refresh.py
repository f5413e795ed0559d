"""``refresh.json``: a reward with a head that ``smpo-pipeline refresh`` fitted on top of it."""

from __future__ import annotations

from smpo_common.files import Count, read_versioned, write_json
from smpo_common.store_path import AnyPath
from smpo_schemas.frozen import FrozenModel, StoredFile

REFRESH_VERSION = 1
REFRESH_FILE = "refresh.json"
HEAD_FILE = "head.safetensors"


class RefreshMeasures(FrozenModel):
    """How well a reward does on prompts that the head has not seen.

    Attributes:
        agreement: share of decided human labels that it orders the same way.
        log_loss: mean cross-entropy of the human labels in nats, with p = sigmoid(margin / tau).
        golden_over_sample: share of comparisons that put the preferred image of a human pair above a sample, ties as a
            half; null without comparisons.
    """

    agreement: float
    log_loss: float
    golden_over_sample: float | None


class RefreshInfo(FrozenModel):
    """The whole of ``refresh.json``; written last.

    Attributes:
        schema_version: version of this file's format.
        reward: the base reward, as ``--reward`` named it, folders as absolute paths.
        fingerprint: fingerprint of the base reward.
        features: the CLIP of the head, as ``--features`` named it; null: the base reward's own.
        clip_fingerprint: fingerprint of this CLIP.
        unit: unit of the scores.
        head: the file with the head's weights ``v``, float64 [D].
        tau: temperature: P(a over b) is sigmoid((score of a - score of b) / tau).
        l2: L2 penalty of the head, chosen by the lowest held-out loss.
        adversarial: weight of the comparisons with samples.
        samples: largest number of samples of a prompt.
        folds: number of folds that the prompts are split into.
        seed: seed of this split, and of the draw of the samples.
        human_pairs: number of labelled pairs.
        human_prompts: number of their prompts.
        sampled_prompts: number of these that have samples.
        comparisons: number of comparisons of a preferred image with a sample.
        rejected: number of pairs that could not be embedded (``rejected.parquet``).
        before: measures of the base reward.
        after: measures with the head; each prompt is scored by a head that was fitted without it.
        change: mean absolute difference, over the human pairs, of p before and after.
    """

    schema_version: int
    reward: str
    fingerprint: str
    features: str | None
    clip_fingerprint: str
    unit: str
    head: StoredFile
    tau: float
    l2: float
    adversarial: float
    samples: int
    folds: int
    seed: int
    human_pairs: Count
    human_prompts: Count
    sampled_prompts: Count
    comparisons: Count
    rejected: Count
    before: RefreshMeasures
    after: RefreshMeasures
    change: float


def write_refresh(directory: AnyPath, info: RefreshInfo) -> None:
    """Write ``refresh.json``, which finishes the folder."""
    write_json(directory / REFRESH_FILE, info.model_dump())


def read_refresh(directory: AnyPath) -> RefreshInfo:
    """Read ``refresh.json``.

    Raises:
        UserError: it is missing, malformed or of another schema version.
    """
    return read_versioned(directory / REFRESH_FILE, RefreshInfo, REFRESH_VERSION, "refresh again")
