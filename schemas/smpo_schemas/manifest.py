"""``manifest.json``: the model, the settings and the content of a directory of shards."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from smpo_common.errors import UserError
from smpo_common.files import Count, FileName, read_versioned, write_json
from smpo_common.store_path import AnyPath
from smpo_schemas.choices import Dtype
from smpo_schemas.frozen import FrozenModel, StoredFile
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.scoring.scores import RewardStatistics

MANIFEST_VERSION = 2
MANIFEST_FILE = "manifest.json"
FLOW = "flow"
"""Prediction type of flow-matching models."""
TEXT_FOLDER = "text"


class ModelInfo(FrozenModel):
    """The diffusion model that made the shards.

    Attributes:
        id: hub id or folder, as the user gave it.
        kind: model family, for example ``sd15``.
        prediction_type: what the denoiser predicts: ``epsilon``, ``v_prediction``, ``sample`` or ``flow``.
        reference: fingerprint of the denoiser that ``ref_error`` was measured with.
        inverting_denoiser: fingerprint of the denoiser that made the trajectories.
        text: fingerprint of the text encoders.
        vae: fingerprint of the VAE.
        scheduler: fingerprint of the noise levels and prediction type.
        num_train_timesteps: T; timesteps are in [0, T), whole numbers except for ``flow``.
        embedded_guidance: guidance scale that the denoiser got as an input in all forward passes; None for models
            without this input.
        sampler_steps: number of steps of the sampler whose timesteps the states are at; None where the timesteps do not
            depend on a sampler.
    """

    id: str
    kind: str
    prediction_type: str
    reference: str
    inverting_denoiser: str
    text: str
    vae: str
    scheduler: str
    num_train_timesteps: int = Field(ge=1, le=2**31)
    embedded_guidance: float | None = None
    sampler_steps: int | None = None


class ImageSampling(FrozenModel):
    """How ``generate`` sampled images whose latents it kept.

    Attributes:
        candidates_sha256: hash of their ``candidates.json``.
        denoiser: fingerprint of the denoiser that made them.
        negative: the model that made the unconditional predictions in its place; None without one.
        sampler: name of the sampler.
        steps: number of the sampler's steps.
        guidance_scale: scale of classifier-free guidance (1 is none), or of embedded guidance; None for models with
            neither.
        seed: seed of the initial noise.
        dtype: dtype of the model; the initial noise was rounded to it.
    """

    candidates_sha256: str
    denoiser: str
    negative: str | None
    sampler: str
    steps: int
    guidance_scale: float | None
    seed: int
    dtype: Dtype


class StepSettings(FrozenModel):
    """How the pairs of the source ``steps`` were drawn; steps, eta and guidance are in ``inversion``.

    A pair is two draws x_s of the sampler's step from one x_t. Image i is stored as a state of x_t, with the x0 and the
    noise for which draw i is the mean of the step. Both images rebuild the same x_t.

    Attributes:
        grid: timesteps of the sampler, increasing; a step leads to the next lower one.
        trained: the steps that gave pairs, numbered by the place in ``grid`` (from 1) of the timestep that they start
            from.
        candidates: number of draws of a step; the best and the worst of them are the pair.
        continue_from: the draw that the trajectory continues from: the ``winner``, or a ``random`` one.
        gap: largest difference of the two rewards that counts as a tie.
        gradient_delta: the rise of the reward that gradient guidance (TailorPO-G) moves the best draw towards, in the
            reward's unit; None without gradient guidance.
    """

    grid: list[float]
    trained: list[int]
    candidates: int
    continue_from: Literal["winner", "random"]
    gap: float
    gradient_delta: float | None = None


class ShardEntry(FrozenModel):
    """One tar.

    Attributes:
        name: file name.
        pairs: number of pairs.
        samples: number of trajectories.
        states: number of states.
        bytes: size of the file.
        sha256: hash of the file.
    """

    name: FileName
    pairs: Count
    samples: Count
    states: Count
    bytes: Count
    sha256: str


class TextFile(FrozenModel):
    """A file of prompts' embeddings in ``text/`` (:mod:`smpo_schemas.shards.text`).

    Attributes:
        name: file name.
        prompts: number of prompts.
        bytes: size of the file.
        sha256: hash of the file.
    """

    name: FileName
    prompts: Count
    bytes: Count
    sha256: str


class StoredTextEntry(FrozenModel):
    """The folder ``text/``: the embeddings of every distinct prompt and of the empty one.

    Attributes:
        dtype: dtype of the embeddings: ``float32``, ``float16`` or ``bfloat16``.
        prompts: number of prompts.
        bytes: size of all files, index included.
        index: the file that gives each prompt's file and row.
        files: the embeddings, in the order of the prompts' first pairs.
    """

    dtype: Literal["float32", "float16", "bfloat16"]
    prompts: Count
    bytes: Count
    index: StoredFile
    files: list[TextFile]


class Bucket(FrozenModel):
    """An image size.

    Attributes:
        height, width: size in pixels.
        pairs: number of pairs of this size.
    """

    height: int
    width: int
    pairs: int


class BandHealth(FrozenModel):
    """Quality of the states of one timestep band; all but the last two fields are measured on a sample of pairs.

    Attributes:
        start, stop: the band's timesteps, ``stop`` excluded.
        states: number of measured states, counted per image.
        noise_ratio: rms of the reference's predicted noise at the stored states over its rms at forward-noised states
            of the same images; exact inversion gives 1.
        residual: mean relative distance from the inversion's fixed point; None without inversion steps.
        neighbour_correlation: mean correlation of the stored noise between neighbouring latent positions; 0 for white
            noise.
        solved: number of all stored states of the band, counted per image, that were made by a solver with a tolerance.
        unconverged: number of these whose ``residual`` stayed above the tolerance.
    """

    start: Count
    stop: Count
    states: Count
    noise_ratio: float | None
    residual: float | None
    neighbour_correlation: float | None
    solved: Count = 0
    unconverged: Count = 0


class Totals(FrozenModel):
    """Sums over the directory.

    Attributes:
        pairs_in: number of input pairs, pairs + rejected.
        pairs: number of pairs in the shards.
        samples: number of trajectories.
        states: number of states.
        rejected: number of rows of ``rejected.parquet``.
        bytes: size of all tars.
        prompts_cut: number of pairs whose prompt the text encoders truncate, as the model's pipeline does.
    """

    pairs_in: Count
    pairs: Count
    samples: Count
    states: Count
    rejected: Count
    bytes: Count
    prompts_cut: Count = 0


class Manifest(FrozenModel):
    """The whole of ``manifest.json``.

    Attributes:
        schema_version: version of the format of this file and of the shards.
        model: the reference, and the denoiser that made the trajectories.
        resolution: side of the images, or with ``buckets`` the side of the square of their area, in pixels.
        inversion: the settings of ``invert`` that decide what is stored.
        seed: the run's seed; every random draw depends on it and on the pair's id.
        rewards: statistics of each reward over the data set, by name.
        shards: the tars, in order.
        totals: sums over the directory.
        rejected_reasons: number of rejected pairs by kind of reason.
        health: quality of the states by timestep band.
        versions: versions of the libraries.
        index: the index of all trajectories (:mod:`smpo_schemas.shards.index`); None in older directories.
        text: the stored embeddings of the prompts; None with ``--text live``, where the trainer encodes them.
        buckets: image sizes by rising aspect ratio; empty without ``--buckets``.
        samplings: how the images were sampled; only with the sources ``tracked`` and ``sampled``.
        steps: how the pairs were drawn; only with the source ``steps``.
        ref_error_arithmetic: arithmetic of ``ref_error``, for example ``fp32`` or ``bf16 autocast``.
        has_ref_norm: whether each sample has ``ref_norm``; those of older directories have none.
    """

    schema_version: int
    model: ModelInfo
    resolution: int = Field(ge=1, le=2**31)
    inversion: InversionSettings
    seed: int
    rewards: dict[str, RewardStatistics]
    shards: list[ShardEntry]
    totals: Totals
    rejected_reasons: dict[str, Count]
    health: list[BandHealth]
    versions: dict[str, str]
    index: StoredFile | None = None
    text: StoredTextEntry | None = None
    buckets: list[Bucket] = Field(default_factory=list)
    samplings: list[ImageSampling] = Field(default_factory=list)
    steps: StepSettings | None = None
    ref_error_arithmetic: str
    has_ref_norm: bool = False


def autocast_arithmetic(dtype: str) -> str:
    """Name the arithmetic of training: matrix products in ``dtype`` by autocast, the rest in float32."""
    return dtype if dtype == "fp32" else f"{dtype} autocast"


def write_manifest(directory: AnyPath, manifest: Manifest) -> None:
    """Write ``manifest.json``, which finishes the directory."""
    write_json(directory / MANIFEST_FILE, manifest.model_dump())


def read_manifest(directory: AnyPath) -> Manifest:
    """Read and validate ``manifest.json``.

    Raises:
        UserError: it is missing (no shards, or an unfinished run), malformed or of another schema version.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise UserError(
            f"{directory} has no {MANIFEST_FILE}: it is not the output of `smpo-pipeline invert` or `steps`, or "
            "unfinished; run that command again"
        )
    return read_versioned(path, Manifest, MANIFEST_VERSION, "invert again")
