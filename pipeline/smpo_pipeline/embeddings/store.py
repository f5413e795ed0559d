"""Embeddings on disk, and in memory.

Shape suffixes: R rows (pairs), 2 images, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.files import read_all, reading_parquet
from smpo_schemas.reject_kinds import RejectKind
from smpo_schemas.rejects import Reject
from smpo_schemas.scoring.scores import IMAGE_IDS

MARKER = "embeddings.json"
_VECTORS = ("image_0", "image_1", "text")
_SCORES = ("score_0", "score_1")


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of pairs by a frozen CLIP, in the order of the input.

    Attributes:
        pair_ids, prompts: of each row.
        image_ids_R2: hashes of the images' files.
        image_R2D: embeddings of both images, float32, not normalised.
        text_RD: embedding of the prompt, float32, not normalised.
        score_R2: raw scores by a reward, float64; None where none was asked for.
        rejects: the rows that could not be embedded.
    """

    pair_ids: Sequence[str]
    prompts: Sequence[str]
    image_ids_R2: np.ndarray
    image_R2D: np.ndarray
    text_RD: np.ndarray
    score_R2: np.ndarray | None
    rejects: Sequence[Reject]

    def rows(self) -> dict[str, int]:
        """Return the first row of each pair_id."""
        first: dict[str, int] = {}
        for row, pair_id in enumerate(self.pair_ids):
            first.setdefault(pair_id, row)
        return first


def join(
    pair_ids: Sequence[str],
    prompts: Sequence[str],
    image_ids_P2: np.ndarray | None,
    embeddings: Embeddings,
    scores: str,
    stage: str,
) -> tuple[np.ndarray, list[Reject]]:
    """Find the embeddings of a scores table's rows.

    Args:
        pair_ids: of the table's rows.
        prompts: of the table's rows.
        image_ids_P2: their images' hashes, or None where the table lacks any.
        embeddings: of the pairs.
        scores: the table, for the reasons.
        stage: the command, for rejects.

    Returns:
        For each row of the table its row in ``embeddings``, -1 without one, int64 [P]; and the latter as rejects.
    """
    found, rejects = np.full(len(pair_ids), -1, dtype=np.int64), []
    rows, reasons = embeddings.rows(), {reject.pair_id: reject for reject in embeddings.rejects}
    for number, (pair_id, prompt) in enumerate(zip(pair_ids, prompts, strict=True)):
        row, rejected = rows.get(pair_id), reasons.get(pair_id)
        source, reason = f"{scores}:{number}", f"{RejectKind.IMAGES_MISSING}: no row of --pairs has this pair_id"
        if row is None and rejected:
            source, reason = rejected.source, rejected.reason
        elif row is not None and embeddings.prompts[row] != prompt:
            reason = f"{RejectKind.OTHER_PAIR}: --pairs has another prompt for this pair_id"
        elif (
            row is not None
            and image_ids_P2 is not None
            and (embeddings.image_ids_R2[row] != image_ids_P2[number]).any()
        ):
            reason = f"{RejectKind.OTHER_IMAGES}: --pairs has other images, or their order exchanged"
        elif row is not None:
            found[number] = row
            continue
        rejects.append(Reject(pair_id=pair_id, source=source, stage=stage, reason=reason))
    return found, rejects


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], width: int, *, scored: bool) -> None:
    """Write a unit's rows, by the columns of a :class:`Embeddings`; ``width`` is D."""
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in ("pair_id", "prompt", *IMAGE_IDS)}
    for name in _VECTORS:
        flat = np.array([row[name] for row in rows], dtype=np.float32).reshape(-1)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    for name in _SCORES if scored else ():
        columns[name] = pa.array([row[name] for row in rows], pa.float64())
    pq.write_table(pa.table(columns), path, use_dictionary=False, write_statistics=False)


def read_rows(paths: Sequence[Path], rejects: Sequence[Reject]) -> Embeddings:
    """Read the files of all units that have rows, at least one.

    Raises:
        UserError: a file is missing or damaged.
    """
    table = pa.concat_tables(read_all(_read, paths))
    image_0, image_1, text = (_vectors(table[name]) for name in _VECTORS)
    scored = set(_SCORES) <= set(table.column_names)
    return Embeddings(
        pair_ids=table["pair_id"].to_pylist(),
        prompts=table["prompt"].to_pylist(),
        image_ids_R2=np.stack([np.array(table[name].to_pylist(), dtype=object) for name in IMAGE_IDS], axis=1),
        image_R2D=np.stack([image_0, image_1], axis=1),
        text_RD=text,
        score_R2=np.stack([table[name].to_numpy() for name in _SCORES], axis=1) if scored else None,
        rejects=rejects,
    )


def _read(path: Path) -> pa.Table:
    with reading_parquet(path):
        return pq.read_table(path)


def _vectors(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of lists as float32 [R, D]."""
    flat = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
    return flat.reshape(len(column), -1)
