"""``selection.json``: what ``smpo-pipeline select`` chose, and from what."""

from __future__ import annotations

import pyarrow as pa
from pydantic import Field

from smpo_common.errors import UserError
from smpo_common.files import Count, read_versioned, write_json
from smpo_common.store_path import AnyPath
from smpo_schemas.frozen import FrozenModel

SELECTION_VERSION = 1
SELECTION_FILE = "selection.json"
PAIRS_FILE = "pairs.parquet"
SCORES_FOLDER = "scores"

SELECTED_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt", pa.string()),
        ("image_0", pa.binary()),
        ("image_1", pa.binary()),
        ("label", pa.float32()),
        ("annotator", pa.string()),
        ("chosen_image", pa.int8()),
        ("gap", pa.float64()),
    ]
)
"""``chosen_image``: 0 or 1, which image was chosen. ``gap``: by how much it is better, from -1 to 1."""


class SelectionReward(FrozenModel):
    """A reward that the images were compared by.

    Attributes:
        weight: its share; the shares sum to 1.
        scale: what a difference of raw scores is divided by.
    """

    weight: float
    scale: float


class SelectionSettings(FrozenModel):
    """What decides which pairs are selected.

    Attributes:
        by: name of the method, or its ``MODULE:CLASS``.
        by_sha256: hash of the source file of a method of your own, else null.
        judge: name of the pairwise judge, or its ``MODULE:CLASS``, with its model; null for methods that ask none.
        judge_sha256: hash of the source file of a judge of your own, else null.
        rewards: the rewards, by name.
        pairs_per_prompt: largest number of pairs of a prompt.
        min_gap: smallest gap of a pair; null: the method's own.
        dominated_only: whether the chosen image must be at least as good by every reward.
        loser: which image the method ``ranking`` rejects.
        seed: seed of all random draws.
        label: whether the pairs are labelled by the selection.
    """

    by: str
    by_sha256: str | None = None
    judge: str | None = None
    judge_sha256: str | None = None
    rewards: dict[str, SelectionReward]
    pairs_per_prompt: int
    min_gap: float | None
    dominated_only: bool
    loser: str
    seed: int
    label: bool


class SelectionInput(FrozenModel):
    """A file of candidates.

    Attributes:
        path: the file.
        rows: number of its rows.
        bytes: its size.
        sha256: hash of the file, or of a Parquet file's footer.
    """

    path: str
    rows: Count
    bytes: Count
    sha256: str


class Gaps(FrozenModel):
    """The gaps of the selected pairs: by how much the chosen image is better, from -1 to 1.

    Attributes:
        min, mean, max: statistics over all pairs.
    """

    min: float
    mean: float
    max: float


class SelectionInfo(FrozenModel):
    """``selection.json``; written last, so that its absence marks an unfinished run.

    Attributes:
        schema_version: version of this file's format.
        version: version of the program.
        settings: what decides the selection.
        candidates: the input files.
        scores_sha256: hash of the candidates' ``scores.json``.
        rows: number of rows of the candidates.
        images: number of distinct images with a score, counted per prompt.
        prompts: number of distinct prompts with a score.
        prompts_with_pairs: number of prompts that gave a pair; the others are rows of ``rejected.parquet``.
        pairs: number of selected pairs.
        gaps: gaps of the selected pairs.
        rejected: number of rows of ``rejected.parquet``.
        reasons: number of rows of ``rejected.parquet`` by kind of reason.
        pairs_sha256: hash of ``pairs.parquet``.
        comparisons: number of comparisons by the judge, each in both orders.
        shown_first: the judge's mean preference for the image that it was shown first, from 0 to 1; 0.5 if it is not
            biased towards a position. A bias cancels, since both orders are compared. Null without a judge.
    """

    schema_version: int
    version: str
    settings: SelectionSettings
    candidates: list[SelectionInput]
    scores_sha256: str
    rows: Count
    images: Count
    prompts: Count
    prompts_with_pairs: Count
    pairs: Count = Field(ge=1)
    gaps: Gaps
    rejected: Count
    reasons: dict[str, int]
    pairs_sha256: str
    comparisons: Count = 0
    shown_first: float | None = None


def write_selection(directory: AnyPath, info: SelectionInfo) -> None:
    """Write ``selection.json``, which finishes the directory."""
    write_json(directory / SELECTION_FILE, info.model_dump())


def read_selection(directory: AnyPath) -> SelectionInfo:
    """Read ``selection.json``.

    Raises:
        UserError: the directory is not a finished output of ``select``, or has another schema version.
    """
    path = directory / SELECTION_FILE
    if not path.is_file():
        raise UserError(f"{directory} has no {SELECTION_FILE}: it is not the output of `smpo-pipeline select`")
    return read_versioned(path, SelectionInfo, SELECTION_VERSION, "select again")
