"""``results.json`` and ``scores.parquet``: an evaluation's results and settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from smpo_common.files import atomic_path, read_versioned, sha256_json, write_json
from smpo_pipeline.evaluation.comparison import Comparison, compare
from smpo_schemas.frozen import FrozenModel

RESULTS_VERSION = 1
RESULTS_FILE = "results.json"
SCORES_FILE = "scores.parquet"
REPORT_FILE = "report.html"


class Settings(FrozenModel):
    """Everything that affects the results; two evaluations with equal settings are the same evaluation.

    Attributes:
        models: by name, a hash of the model's files, or its hub id; for images that were made elsewhere, a hash of
            them. The first is the baseline.
        rewards: by the value of ``--reward``, a hash of the model's files, or its hub id; the value itself if it names
            no model.
        prompts: the prompts.
        images_per_prompt: each from its own noise.
        steps: of the sampler. Without sampled images it is 0, and sampler and dtype are blank.
        guidance_scale: of classifier-free guidance, 1 is none; or the input of FLUX.1-dev; None for models without.
        seed: of all noise.
        dtype: of the models, a key of :data:`smpo_models.weights.DTYPES`.
        resolution: side of the images in pixels; None: the models' native resolution.
        variant: variant of the weight files; None: files without a variant, or the only variant.
        sampler: name of the models' sampler: the scheduler's class, or DDIM or Euler.
        categories: of each prompt, blank where it has none; None: the prompts have no categories.
        suite: name of a published suite of prompts, as ``--prompts`` names it.
        reward_dtype: of the rewards' matrix products.
    """

    models: dict[str, str]
    rewards: dict[str, str]
    prompts: list[str]
    images_per_prompt: int
    steps: int
    guidance_scale: float | None
    seed: int
    dtype: str
    resolution: int | None = None
    variant: str | None = None
    sampler: str = "DDIM"
    categories: list[str] | None = None
    suite: str | None = None
    reward_dtype: str = "fp32"

    def digest(self) -> str:
        """Hash :meth:`identity`."""
        return sha256_json(self.identity())

    def identity(self) -> dict[str, Any]:
        """Return the settings as JSON values; the models as a list, since their order matters."""
        # Settings that earlier versions did not have are left out at their defaults, so that digests stay the same.
        return {**self.model_dump(exclude_defaults=True), "models": [list(item) for item in self.models.items()]}


class ModelEntry(FrozenModel):
    """One model.

    Attributes:
        name: as ``--model`` names it.
        source: folder, file or hub id; of images that were made elsewhere, their folder.
        base: the whole model that completes it.
        denoiser: its fingerprint; empty for images that were made elsewhere.
        negative: source of the model that predicts for the unconditional prompt.
        training: settings and data of the run of smpo-train that made it, by name; empty if they are not known.
        trained_rewards: rewards that it was trained on, by name; the others are held out.
    """

    name: str
    source: str
    base: str | None
    denoiser: str
    negative: str | None = None
    training: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    trained_rewards: list[str] = Field(default_factory=list)

    def standing(self, reward: str) -> str:
        """Say whether the model was trained on a reward or has not seen it; empty where that is not known."""
        if reward in self.trained_rewards:
            return "trained on"
        return "held out" if self.training else ""


class RewardEntry(FrozenModel):
    """One reward: its unit, its model, the model's fingerprint, and the dtype of its matrix products."""

    name: str
    unit: str
    model: str
    fingerprint: str
    dtype: str = "fp32"


class Finding(FrozenModel):
    """One model under one reward, over all images, in the reward's unit; the baseline has no ``versus_baseline``."""

    model: str
    reward: str
    median: float
    mean: float
    std: float
    versus_baseline: Comparison | None


def find_all(scores: Mapping[str, Mapping[str, np.ndarray]], baseline: str) -> list[Finding]:
    """Describe every model under every reward, and compare it with the baseline.

    Args:
        scores: per reward and model, float [P, I].
        baseline: one of the models.
    """
    return [
        Finding(
            model=model,
            reward=reward,
            median=float(np.median(scores_PI)),
            mean=float(scores_PI.mean()),
            std=float(scores_PI.std()),
            versus_baseline=None if model == baseline else compare(scores_PI, by_model[baseline]),
        )
        for reward, by_model in scores.items()
        for model, scores_PI in by_model.items()
    ]


class Results(FrozenModel):
    """The whole of ``results.json``; written last, so that its absence marks an unfinished evaluation.

    Attributes:
        digest: hash of ``settings``.
        num_prompts, num_images: per model.
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
        """Return the finding of ``model`` under ``reward``."""
        return next(finding for finding in self.findings if (finding.model, finding.reward) == (model, reward))


def read_results(directory: Path) -> Results | None:
    """Read ``results.json``, or return None if it is missing.

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
    settings: Settings,
    files: Mapping[str, list[str]],
) -> None:
    """Write ``scores.parquet``: one row per image.

    Args:
        directory: the evaluation's folder.
        scores: per reward and model, float [P, I].
        settings: with P prompts and their categories.
        files: per model, the P * I image files, relative to ``directory``.
    """
    first = next(iter(scores.values()))
    categories = settings.categories or [""] * len(settings.prompts)
    tables = []
    for model, scores_PI in first.items():
        prompt_index, image_index = np.indices(scores_PI.shape).reshape(2, -1)
        columns: dict[str, Any] = {
            "model": [model] * scores_PI.size,
            "prompt_index": prompt_index,
            "prompt": [settings.prompts[number] for number in prompt_index],
            "category": pa.array([categories[number] or None for number in prompt_index], pa.string()),
            "image_index": image_index,
            "file": files[model],
        }
        columns |= {reward: by_model[model].ravel() for reward, by_model in scores.items()}
        tables.append(pa.table(columns))
    with atomic_path(directory / SCORES_FILE) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)
