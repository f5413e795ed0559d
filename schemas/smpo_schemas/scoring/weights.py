"""``weights.json``: how ``smpo-pipeline weigh`` made a column of weights, and whether they say anything."""

from __future__ import annotations

from smpo_common.files import Count, read_versioned, write_json
from smpo_common.store_path import AnyPath
from smpo_schemas.frozen import FrozenModel

WEIGHTS_VERSION = 1
WEIGHTS_FILE = "weights.json"
WEIGHTS_REJECTS_FILE = "weights-rejected.parquet"


class WeighedSource(FrozenModel):
    """A source of pairs that are not golden, and its classifier against the golden ones.

    Attributes:
        pairs: number of its pairs.
        share: share of its pairs in all weighed pairs.
        auc: area under the classifier's ROC curve on prompts that it has not seen; 0.5 is chance.
        calibration_error: expected calibration error of P(golden) on these prompts, both classes counting the same.
        l2: L2 penalty of the logistic regression, chosen by the lowest held-out loss.
        noise: whether the AUC may be chance: the weights then say nothing.
    """

    pairs: Count
    share: float
    auc: float
    calibration_error: float
    l2: float
    noise: bool


class WeightsInfo(FrozenModel):
    """The whole of ``weights.json``; written last.

    Attributes:
        schema_version: version of this file's format.
        column: name of the column of weights in the scores table.
        clip: hub id or folder of the CLIP whose embeddings the classifiers see.
        fingerprint: hash of its weights.
        golden: number of golden pairs.
        alpha: their share of all weighed pairs.
        sources: the other sources of pairs, by name.
        folds: number of folds that the prompts are split into.
        seed: seed of this split.
        normalised: whether the weights were divided by their mean.
        pairs: number of pairs with a weight.
        rejected: number of pairs without one (``weights-rejected.parquet``).
        mean, max: mean and largest of the weights, as they were written.
        unnormalised_mean: mean of the weights before any division by it; about 1 if the classifiers are right.
        effective_size: (sum w)^2 / sum w^2: how many equally weighted pairs say as much.
    """

    schema_version: int
    column: str
    clip: str
    fingerprint: str
    golden: Count
    alpha: float
    sources: dict[str, WeighedSource]
    folds: int
    seed: int
    normalised: bool
    pairs: Count
    rejected: Count
    mean: float
    max: float
    unnormalised_mean: float
    effective_size: float


def write_weights(directory: AnyPath, info: WeightsInfo) -> None:
    """Write ``weights.json``."""
    write_json(directory / WEIGHTS_FILE, info.model_dump())


def read_weights(directory: AnyPath) -> WeightsInfo:
    """Read ``weights.json``.

    Raises:
        UserError: it is missing, malformed or of another schema version.
    """
    return read_versioned(directory / WEIGHTS_FILE, WeightsInfo, WEIGHTS_VERSION, "weigh again")
