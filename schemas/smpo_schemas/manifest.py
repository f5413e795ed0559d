"""``manifest.json``: what a directory of shards was made from, with what settings, and what is in it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from smpo_common.errors import UserError
from smpo_common.files import Count, FileName, read_versioned, write_json
from smpo_common.store_path import AnyPath
from smpo_schemas.scores import RewardStatistics

MANIFEST_VERSION = 2
MANIFEST_FILE = "manifest.json"
REJECTS_FILE = "rejected.parquet"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelInfo(_Frozen):
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


class InversionSettings(_Frozen):
    """Everything that decides what is stored, besides the model, the pairs and the seed.

    Attributes:
        source: ``renoise``: trajectories of ReNoise inversion (arXiv 2403.14602); ``forward``: independent Gaussian
            noise.
        forward_noise: ``forward``: whether both images of a ``pair`` get the same noise (Diffusion-DPO), or each
            ``image`` its own (CaPO).
        start: where a trajectory begins: ``clean`` (x0 itself), ``level0`` (x0 noised to the scheduler's first level),
            or a timestep up to which nodes are reached by forward noising.
        timesteps: ``jittered`` (one uniform draw in each of ``steps`` equal strata), ``grid`` (the scheduler's own
            inference grid) or ``published`` (state of the grid's first node at or above a uniform t, or of its last
            one, used as if at t; each step asks the model at the timestep that it starts from).
        steps: number of steps of a trajectory.
        solver: how a trajectory's step is solved: ``ddim`` (not at all), ``renoise`` (a fixed number of iterations),
            ``adaptive`` (iterated until it has converged) or ``anderson`` (the same, accelerated).
        renoise_steps: ``renoise``: iterations a step, one evaluation each after the first; 0 is DDIM inversion.
        renoise_average: ``renoise``: which of the step's ``renoise_steps`` + 1 estimates are averaged; see
            :func:`averaged_estimates`.
        tolerance: ``adaptive``, ``anderson``: residual at which an image's step is done.
        max_evaluations: ``adaptive``, ``anderson``: evaluations after which an image's step ends as it is.
        anderson_depth: ``anderson``: differences that the acceleration looks back on.
        eta: scale of the Gaussian noise added after each step, in DDIM posterior standard deviations
            (DDIM-InPO, arXiv 2503.18454).
        guidance_scale: classifier-free guidance of the inverting denoiser; 1 is none.
        states: how many of a trajectory's states are stored, drawn anew for each trajectory; None is all.
        trajectories: how many times each pair is inverted, each with its own draws.
        vae_latent: ``sample`` the VAE's posterior or take its ``mode``.
        prompt_dropout: probability that a trajectory is made, and trained, under the empty prompt.
        empty_prompt: ``model``: the embedding that the model's own pipeline guides with (zeros for SDXL);
            ``encoded``: what the text encoders make of "", as SmPO's published SDXL code.
        hflip: whether half of the trajectories mirror both images.
        size_conditioning: of models that are conditioned on sizes (SDXL): ``image``: each image's own original size and
            crop; ``constant``: the resolution and no crop for all, as the published code.
        storage: what latents and noise are rounded to, before ``ref_error`` is measured; directories that do not say
            it have ``float16``.
        buckets: whether images are brought to one of several sizes of about the resolution's area, by their aspect
            ratio, rather than to the square.
        dtype: of the inverting denoiser's forward passes, and of the products in the reference's.
    """

    source: Literal["renoise", "forward"] = "renoise"
    forward_noise: Literal["pair", "image"] = "pair"
    start: Literal["clean", "level0"] | int = "clean"
    timesteps: Literal["jittered", "grid", "published"] = "jittered"
    steps: int = Field(default=9, ge=1)
    solver: Literal["ddim", "renoise", "adaptive", "anderson"] = "renoise"
    renoise_steps: int = Field(default=1, ge=0)
    renoise_average: str = "last2"
    tolerance: float = Field(default=1e-4, gt=0)
    max_evaluations: int = Field(default=30, ge=1)
    anderson_depth: int = Field(default=3, ge=1)
    eta: float = Field(default=0.0, ge=0)
    guidance_scale: float = Field(default=1.0, ge=0)
    states: int | None = Field(default=None, ge=1)
    trajectories: int = Field(default=1, ge=1)
    vae_latent: Literal["sample", "mode"] = "sample"
    prompt_dropout: float = Field(default=0.2, ge=0, le=1)
    empty_prompt: Literal["model", "encoded"] = "model"
    hflip: bool = True
    size_conditioning: Literal["image", "constant"] = "image"
    storage: Literal["float16", "bfloat16"] = "float16"
    buckets: bool = False
    dtype: Literal["bf16", "fp16", "fp32"] = "fp32"


def averaged_estimates(text: str, renoise_steps: int) -> frozenset[int]:
    """Which of ReNoise's estimates e_0 .. e_renoise_steps are averaged.

    Args:
        text: ``all``, ``lastN`` (of fewer than N estimates all) or their numbers, as in ``0,1``.
        renoise_steps: iterations.

    Raises:
        UserError: none of these, or a number that is not there.
    """
    if text == "all":
        return frozenset(range(renoise_steps + 1))
    if text.startswith("last") and text[4:].isdecimal() and int(text[4:]) > 0:
        return frozenset(range(max(0, renoise_steps + 1 - int(text[4:])), renoise_steps + 1))
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) <= renoise_steps for part in parts):
        raise UserError(
            f"--renoise-average {text}: all, lastN (last2), or numbers from 0 to {renoise_steps} (0,1); "
            f"--renoise-steps {renoise_steps} makes {renoise_steps + 1} estimates"
        )
    return frozenset(int(part) for part in parts)


class ShardEntry(_Frozen):
    """One tar: how many pairs, trajectories (samples) and states it holds, and its exact bytes."""

    name: FileName
    pairs: Count
    samples: Count
    states: Count
    bytes: Count
    sha256: str


class IndexEntry(_Frozen):
    """The index of all trajectories (:mod:`smpo_schemas.shards.index`) and its exact bytes."""

    name: FileName
    bytes: Count
    sha256: str


class Bucket(_Frozen):
    """An image size, in pixels, and how many pairs have it."""

    height: int
    width: int
    pairs: int


class BandHealth(_Frozen):
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


class Totals(_Frozen):
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


class Manifest(_Frozen):
    """The whole of ``manifest.json``; ``index`` is None in directories that have none.

    ``buckets`` are the image sizes that occur, by rising aspect ratio; without ``--buckets`` the list is empty, and all
    images have the ``resolution``. ``ref_error_arithmetic`` is None in directories from before it was recorded.
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
    buckets: list[Bucket] = []
    ref_error_arithmetic: str | None = None

    @property
    def reference_arithmetic(self) -> str:
        """In what ``ref_error`` was computed; without a record, with all weights in the settings' dtype."""
        narrow = "fp32" if self.inversion.dtype == "fp32" else f"{self.inversion.dtype} weights"
        return self.ref_error_arithmetic or narrow


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
