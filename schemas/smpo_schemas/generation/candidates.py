"""``generate``'s output: candidate images as pairs in ``candidates-*.parquet``, and ``candidates.json``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import pyarrow as pa

from smpo_common.errors import UserError
from smpo_common.files import Count, FileName, read_versioned, write_json
from smpo_common.store_path import AnyPath
from smpo_schemas.choices import Dtype
from smpo_schemas.frozen import FrozenModel, StoredFile
from smpo_schemas.rejects import REJECTS_FILE

CANDIDATES_VERSION = 1
CANDIDATES_FILE = "candidates.json"

ImageFormat = Literal["png", "webp", "jpeg"]

_NOISE = pa.struct([("seed", pa.int64()), ("index", pa.int32()), ("shape", pa.list_(pa.int32()))])
"""Enough to draw an image's initial noise again, with its prompt (:func:`smpo_models.draws.image_noise`)."""

CANDIDATES_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt", pa.string()),
        ("image_0", pa.binary()),
        ("image_1", pa.binary()),
        ("label", pa.float32()),
        ("noise_0", _NOISE),
        ("noise_1", _NOISE),
        ("latents_0", pa.string()),
        ("latents_1", pa.string()),
        ("model", pa.string()),
    ]
)
"""The columns of every part; further columns are those of the prompts."""

NOT_CARRIED = frozenset({*CANDIDATES_SCHEMA.names, "jpg_0", "jpg_1", "annotator", "votes"})
"""Columns of the prompts that are not copied, since they mean something else in pairs."""


class GenerationSettings(FrozenModel):
    """Everything that decides what ``generate`` stores, besides model and prompts.

    Attributes:
        sampler: name of the sampler: the scheduler's class, or DDIM or Euler.
        steps: number of the sampler's steps.
        guidance_scale: scale of classifier-free guidance (1 is none), or of embedded guidance; None for models with
            neither.
        seed: seed of all noise.
        dtype: dtype of the model.
        resolution: side of the images in pixels.
        images_per_prompt: K; a prompt has K / 2 rows, row j with the images 2j and 2j + 1.
        image_format: format of the image files.
        keep: what is kept besides the images: ``latents``, ``states:M``, or None.
    """

    sampler: str
    steps: int
    guidance_scale: float | None
    seed: int
    dtype: Dtype
    resolution: int
    images_per_prompt: int
    image_format: ImageFormat
    keep: str | None

    @property
    def num_states(self) -> int:
        """Number of the sampler's states to keep for each image."""
        return int((self.keep or "").partition(":")[2] or 0)

    def image_bytes(self, latent_shape: Sequence[int]) -> int:
        """Bytes of an image's pixels and what is kept of it, in memory."""
        kept = (1 + self.num_states) if self.keep else 0
        return 3 * self.resolution**2 + 4 * kept * math.prod(latent_shape)


class CandidatesModel(FrozenModel):
    """The model that made the images.

    Attributes:
        id: hub id or folder, as the user gave it.
        unet: folder of the denoiser in place of the model's own.
        lora: LoRA on top of the model's denoiser.
        negative: the model that makes the unconditional predictions in its place; None without one.
        kind: model family, for example ``sd15``.
        denoiser: fingerprint of the denoiser in float32, as in the manifests of shards; also the column ``model``.
        scheduler: fingerprint of the noise levels and prediction type, as in the manifests of shards.
        parts: fingerprint of each part of the pipeline in ``dtype``, by its folder; the denoiser's includes the
            negative model.
    """

    id: str
    unet: str | None
    lora: str | None
    negative: str | None
    kind: str
    denoiser: str
    scheduler: str
    parts: dict[str, str]


class CandidatesPart(FrozenModel):
    """One file of candidates.

    Attributes:
        name: file name.
        rows: number of pairs.
        prompts: number of prompts.
        bytes: size of the file.
        sha256: hash of the file.
        kept: the images' latents, in safetensors (``--keep``).
    """

    name: FileName
    rows: Count
    prompts: Count
    bytes: Count
    sha256: str
    kept: StoredFile | None = None


class Candidates(GenerationSettings):
    """The whole of ``candidates.json``; written last, so that its absence marks an unfinished run.

    Attributes:
        schema_version: version of this file's format.
        model: the model that made the images.
        columns: further columns, from the prompts.
        parts: the files, in the order of the prompts.
        prompts_in: distinct prompts, and rows without a usable one; ``prompts_in = prompts + rejected``.
        prompts: prompts with images.
        images: number of images.
        rejected: number of rejects.
        rejected_reasons: number of rejects by kind of reason.
        versions: versions of the libraries.
    """

    schema_version: int
    model: CandidatesModel
    columns: list[str]
    parts: list[CandidatesPart]
    prompts_in: Count
    prompts: Count
    images: Count
    rejected: Count
    rejected_reasons: dict[str, int]
    versions: dict[str, str]


def read_candidates(directory: AnyPath) -> Candidates:
    """Read ``candidates.json``.

    Raises:
        UserError: it is missing, malformed or of another schema version.
    """
    path = directory / CANDIDATES_FILE
    if not path.is_file():
        raise UserError(f"{directory} holds no {CANDIDATES_FILE}: not an output of `generate`, or an unfinished one")
    return read_versioned(path, Candidates, CANDIDATES_VERSION, "generate again")


def write_candidates(directory: AnyPath, candidates: Candidates) -> None:
    """Write ``candidates.json``, which finishes the run."""
    write_json(directory / CANDIDATES_FILE, candidates.model_dump())


def part_name(unit: int) -> str:
    """File name of a part."""
    return f"candidates-{unit:06d}.parquet"


def kept_name(unit: int) -> str:
    """File name of the latents of a part's images."""
    return f"latents-{unit:06d}.safetensors"


def candidate_pair_id(origin: str, prompt: str, row: int) -> str:
    """Make the id of row ``row`` of a prompt.

    Args:
        origin: fingerprint of everything else that decides the images, so that the candidates of several runs can be
            scored and selected from together.
        prompt: the prompt.
        row: number of the row among those of its prompt.
    """
    return hashlib.sha256(f"cand\n{origin}\n{row}\n{prompt}".encode()).hexdigest()[:32]


def without_rejects(paths: Iterable[AnyPath]) -> list[AnyPath]:
    """Leave out the ``rejected.parquet`` of folders with candidates, which holds no pairs.

    Raises:
        UserError: a folder's candidates are unfinished.
    """
    paths = list(paths)
    names: dict[AnyPath, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(path.name)
    made = {folder for folder, inside in names.items() if any(_is_part(name) for name in inside)}
    for folder in made:
        if CANDIDATES_FILE not in names[folder]:
            raise UserError(
                f"{folder} holds an unfinished run of `generate` (no {CANDIDATES_FILE}); finish it with its own command"
            )
    return [path for path in paths if path.name != REJECTS_FILE or path.parent not in made]


def _is_part(name: str) -> bool:
    return name.startswith("candidates-") and name.endswith(".parquet")
