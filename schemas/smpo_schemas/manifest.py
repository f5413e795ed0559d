"""``manifest.json``: what a directory of shards was made from, with what settings, and what is in it."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from smpo_common.errors import UserError
from smpo_common.files import Count, FileName, read_versioned, write_json
from smpo_common.store_path import AnyPath
from smpo_schemas.frozen import FrozenModel
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.scores import RewardStatistics

MANIFEST_VERSION = 2
MANIFEST_FILE = "manifest.json"
REJECTS_FILE = "rejected.parquet"


class _Part(FrozenModel):
    model_config = ConfigDict(allow_inf_nan=False)


class ModelInfo(_Part):
    """The diffusion model that made the shards.

    Attributes:
        id: hub id or folder, as it was given.
        kind: model family, for example ``sd15``.
        prediction_type: what its denoiser predicts: ``epsilon``, ``v_prediction`` or ``sample``.
        reference: fingerprint of the denoiser that ``ref_error`` was measured with.
        inverting_denoiser: fingerprint of the denoiser that carried the images along.
        text: fingerprint of the text encoders.
        vae: fingerprint of the VAE.
        scheduler: fingerprint of the noise levels and prediction type.
        num_train_timesteps: T; timesteps are integers in [0, T).
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


class ShardEntry(_Part):
    """One tar: how many pairs, trajectories (samples) and states it holds, and its exact bytes."""

    name: FileName
    pairs: Count
    samples: Count
    states: Count
    bytes: Count
    sha256: str


class IndexEntry(_Part):
    """The index of all trajectories (:mod:`smpo_schemas.shards.index`) and its exact bytes."""

    name: FileName
    bytes: Count
    sha256: str


class Bucket(_Part):
    """An image size, in pixels, and how many pairs have it."""

    height: int
    width: int
    pairs: int


class BandHealth(_Part):
    """How believable the states of one timestep band are: all but the last two on a sample of pairs.

    Attributes:
        start, stop: the band's timesteps, ``stop`` excluded.
        states: number of images' states in the sample.
        noise_ratio: rms of the reference's predicted noise at the stored states over its rms at forward-noised states
            of the same images; exact inversion gives 1.
        residual: mean distance from the fixed point; None where no inversion step was taken.
        neighbour_correlation: mean correlation of tau between neighbouring latent positions; 0 for white noise.
        solved: of all stored images' states of the band, those that a solver with a tolerance made.
        unconverged: of these, those whose solver did not reach it; their ``residual`` is above the tolerance.
    """

    start: Count
    stop: Count
    states: Count
    noise_ratio: float | None
    residual: float | None
    neighbour_correlation: float | None
    solved: Count = 0
    unconverged: Count = 0


class Totals(_Part):
    """Sums over the directory; ``pairs_in = pairs + rejected``.

    ``prompts_cut`` pairs have prompts longer than the text encoders take; they are cut, as the model's pipeline does.
    """

    pairs_in: Count
    pairs: Count
    samples: Count
    states: Count
    rejected: Count
    bytes: Count
    prompts_cut: Count = 0


class Manifest(_Part):
    """The whole of ``manifest.json``; ``index`` is None in directories that have none.

    ``buckets`` are the image sizes that occur, by rising aspect ratio; without ``--buckets`` the list is empty, and all
    images have the ``resolution``. ``ref_error_arithmetic`` says in what arithmetic ``ref_error`` was computed.
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
    index: IndexEntry | None = None
    buckets: list[Bucket] = Field(default_factory=list)
    ref_error_arithmetic: str


def autocast_arithmetic(dtype: str) -> str:
    """What a manifest calls the arithmetic of training: products in ``dtype`` by autocast, the rest in float32."""
    return dtype if dtype == "fp32" else f"{dtype} autocast"


def write_manifest(directory: AnyPath, manifest: Manifest) -> None:
    """Write ``manifest.json``, which finishes the directory."""
    write_json(directory / MANIFEST_FILE, manifest.model_dump())


def read_manifest(directory: AnyPath) -> Manifest:
    """Read and validate ``manifest.json``.

    Raises:
        UserError: there is none (no shards, or an unfinished run), or it is malformed or of another schema version.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise UserError(
            f"{directory} holds no {MANIFEST_FILE}: not the output of `smpo-pipeline invert`, "
            "or unfinished (run invert again)"
        )
    return read_versioned(path, Manifest, MANIFEST_VERSION, "invert again")
