"""``results.json`` and ``scores.parquet``: what an evaluation found, and everything it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.files import atomic_path, read_versioned, sha256_json, write_json
from smpo_pipeline.evaluation.comparison import Comparison
from smpo_schemas.frozen import FrozenModel

RESULTS_VERSION = 1
RESULTS_FILE = "results.json"
SCORES_FILE = "scores.parquet"
REPORT_FILE = "report.html"


class Settings(FrozenModel):
    """Everything that decides the numbers; two evaluations with equal settings are the same evaluation.

    Attributes:
        models: per name, the identity of the files that it was loaded from (a hub id: the id); the first is the
            baseline.
        rewards: per specification, as given, the identity of its model's files (a hub id, or no model: that text).
        prompts: the prompts.
        images_per_prompt: each from its own noise.
        steps: DDIM steps.
        guidance_scale: classifier-free guidance; 1 is none.
        seed: of all noise.
        dtype: of the models, a key of :data:`smpo_models.weights.DTYPES`.
        resolution: side of the images in pixels; None: what the models were made for.
        variant: of the files of weights; None: those without one, or the only one there.
    """

    models: dict[str, str]
    rewards: dict[str, str]
    prompts: list[str]
    images_per_prompt: int
    steps: int
    guidance_scale: float
    seed: int
    dtype: str
    resolution: int | None = None
    variant: str | None = None

    def digest(self) -> str:
        """Identity of these settings; the order of the models counts, since the first is the baseline."""
        return sha256_json(self.identity())

    def identity(self) -> dict[str, Any]:
        """What :meth:`digest` is of."""
        return {**self.model_dump(exclude_none=True), "models": [list(each) for each in self.models.items()]}


class ModelEntry(FrozenModel):
    """One model: where it came from, the model that completed it, and its denoiser's fingerprint."""

    name: str
    source: str
    base: str | None
    denoiser: str


class RewardEntry(FrozenModel):
    """One reward: its unit, the model behind it, and that model's fingerprint."""

    name: str
    unit: str
    model: str
    fingerprint: str


class Finding(FrozenModel):
    """One model under one reward, over all images, in the reward's unit; the baseline has no ``versus``."""

    model: str
    reward: str
    median: float
    mean: float
    std: float
    versus_baseline: Comparison | None


class Results(FrozenModel):
    """The whole of ``results.json``; written last, so that its absence marks an unfinished evaluation.

    Attributes:
        digest: of ``settings``.
        num_prompts, num_images: of each model.
        baseline: the model that the others are compared with.
    """

    schema_version: int
    digest: str
    settings: Settings
    num_prompts: int
    num_images: int
    baseline: str
    models: list[ModelEntry]
    rewards: list[RewardEntry]
    findings: list[Finding]
    versions: dict[str, str]

    def finding(self, model: str, reward: str) -> Finding:
        """What was found of ``model`` under ``reward``."""
        return next(each for each in self.findings if (each.model, each.reward) == (model, reward))


def read_results(directory: Path) -> Results | None:
    """Read ``results.json``; None where there is none.

    Raises:
        UserError: it is malformed or of another schema version.
    """
    path = directory / RESULTS_FILE
    if not path.is_file():
        return None
    return read_versioned(path, Results, RESULTS_VERSION, "use --overwrite")


def write_results(directory: Path, results: Results) -> None:
    """Write ``results.json``, which finishes the evaluation."""
    write_json(directory / RESULTS_FILE, results.model_dump())


def write_scores(
    directory: Path,
    scores: Mapping[str, Mapping[str, np.ndarray]],
    prompts: Sequence[str],
    files: Mapping[str, list[str]],
) -> None:
    """Write ``scores.parquet``: a row an image.

    Args:
        directory: of the evaluation.
        scores: per reward and model, float [P, I].
        prompts: P texts.
        files: per model, the images' paths below ``directory``, P * I of them in order.
    """
    first = next(iter(scores.values()))
    tables = []
    for model, scores_PI in first.items():
        prompt_index, image_index = np.indices(scores_PI.shape).reshape(2, -1)
        columns: dict[str, Any] = {
            "model": [model] * scores_PI.size,
            "prompt_index": prompt_index,
            "prompt": [prompts[number] for number in prompt_index],
            "image_index": image_index,
            "file": files[model],
        }
        columns |= {reward: by_model[model].ravel() for reward, by_model in scores.items()}
        tables.append(pa.table(columns))
    with atomic_path(directory / SCORES_FILE) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)
