"""Read what ``weigh`` needs from a scores table, and write its column.

Shape suffix: P rows of the table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smpo_common.errors import UserError
from smpo_common.files import atomic_path, reading_parquet, sha256_file, sha256_json
from smpo_common.store_path import AnyPath
from smpo_pipeline.weighing.formula import GOLDEN
from smpo_schemas.generation.selection import SCORES_FOLDER, SELECTION_FILE, read_selection
from smpo_schemas.pairs import Pair, ReadingChoices, RowRange, column_names, layouts_of, list_pair_files, read_rows
from smpo_schemas.pairs.layout import ListedLayout
from smpo_schemas.scoring.scores import (
    ScoresInfo,
    image_ids,
    read_scores,
    remove_leftovers,
    require_column,
    score_schema,
    write_scores_info,
)

OTHERS = "the others"
"""Name of the source of pairs that no column names a source for."""

_MADE = {b"made_by": b"weigh"}
"""Metadata of the column of weights. A kill may come before ``weights.json``, which names the column too."""


@dataclass(frozen=True)
class WeighedTable:
    """The rows of a scores table, from the first; of a selection's table, those of selected pairs.

    Attributes:
        pair_ids, prompts: of each row.
        image_ids_P2: hashes of both images' files, or None where the table lacks any.
        source_P: number of each pair's source, :data:`smpo_pipeline.weighing.formula.GOLDEN` for golden pairs.
        sources: names of the sources.
    """

    pair_ids: list[str]
    prompts: list[str]
    image_ids_P2: np.ndarray | None
    source_P: np.ndarray
    sources: list[str]


def read_table(
    scores: Path,
    info: ScoresInfo,
    pairs: Sequence[AnyPath],
    reading: ReadingChoices,
    golden: Path | None,
    golden_column: str | None,
    source_column: str | None,
) -> WeighedTable:
    """Read the table and decide which pairs are golden.

    Args:
        scores: output of ``score``.
        info: its ``scores.json``.
        pairs: files of pairs; a column that the table lacks is read from them.
        reading: how they are read.
        golden: a file of pair_ids, one per line or in a Parquet file's column ``pair_id``; or None.
        golden_column: in place of ``golden``, a column of true and false, or of 1 and 0; null is false.
        source_column: a column that names each pair's source; None: all pairs that are not golden are one source.

    Raises:
        UserError: a column is missing or has other values, or a pair is in two of these classes.
    """
    table = read_scores(scores, info)
    if scores.name == SCORES_FOLDER and (scores.parent / SELECTION_FILE).is_file():
        table = table.slice(0, read_selection(scores.parent).pairs)  # then come all candidates
    for flag, column in (("--golden-column", golden_column), ("--source-column", source_column)):
        if column is not None and column not in table.column_names:
            values = _of_pairs(pairs, reading, flag, column)
            if not values:
                require_column(scores, info, column, flag)
            table = table.append_column(column, [[values.get(each) for each in table["pair_id"].to_pylist()]])
    pair_ids, ids_P2 = table["pair_id"].to_pylist(), image_ids(table)
    inside = _listed(golden, pair_ids) if golden else _flagged(str(golden_column), table[golden_column].to_pylist())
    names = table[source_column].to_pylist() if source_column else [None] * len(pair_ids)
    named = [
        None if is_golden else OTHERS if name is None else str(name)
        for is_golden, name in zip(inside, names, strict=True)
    ]
    _require_one_class(pair_ids, named)
    sources = sorted({name for name in named if name is not None})
    if not any(inside) or not sources:
        which = "every pair" if any(inside) else "no pair"
        raise UserError(f"{which} of {scores} is golden ({len(pair_ids)} pairs): weights need golden pairs and others")
    numbers = {name: number for number, name in enumerate(sources)}
    return WeighedTable(
        pair_ids=pair_ids,
        prompts=table["prompt"].to_pylist(),
        image_ids_P2=ids_P2,
        source_P=np.array([GOLDEN if name is None else numbers[name] for name in named]),
        sources=sources,
    )


def _of_pairs(pairs: Sequence[AnyPath], reading: ReadingChoices, flag: str, column: str) -> dict[str, object]:
    """Read a column of pairs by their pair_ids; none if no file has it.

    Raises:
        UserError: some files have it and others do not, whose pairs would count as not golden or without a source.
    """
    files = list_pair_files(pairs, reading)
    layouts, rows = layouts_of(files), {file.path: file.rows for file in files}
    has = {path: not isinstance(kind, ListedLayout) and column in column_names(path) for path, kind in layouts.items()}
    if not any(has.values()):
        return {}
    if lacking := [path for path, found in has.items() if not found]:
        raise UserError(f"{flag} {column}: {lacking[0]} has no such column, but other files of --pairs do")
    return {
        pair.pair_id: pair.further[column]
        for path, layout in layouts.items()
        for _, pair in read_rows(RowRange(path, 0, rows[path]), layout, [column])
        if isinstance(pair, Pair)
    }


def _listed(path: Path, pair_ids: Sequence[str]) -> list[bool]:
    """Whether each pair is in the file of ``--golden``."""
    if path.suffix == ".parquet":
        with reading_parquet(path):
            listed = set(pq.read_table(path, columns=["pair_id"])["pair_id"].to_pylist())
    else:
        try:
            listed = set(path.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--golden {path} cannot be read: {error}") from error
    if listed.isdisjoint(pair_ids):
        raise UserError(f"--golden {path}: none of its {len(listed)} lines is the pair_id of a pair in --scores")
    return [pair_id in listed for pair_id in pair_ids]


def _flagged(column: str, values: Sequence[object]) -> list[bool]:
    for value in values:
        if value not in (None, 0, 1):
            raise UserError(f"--golden-column {column} has the value {value!r}; expected true or false, or 1 or 0")
    return [bool(value) for value in values]


def _require_one_class(pair_ids: Sequence[str], named: Sequence[str | None]) -> None:
    """Refuse a pair whose rows would get different weights: training takes one weight per pair."""
    first: dict[str, str | None] = {}
    for pair_id, name in zip(pair_ids, named, strict=True):
        if first.setdefault(pair_id, name) != name:
            classes = " and ".join(
                "golden" if each is None else f"of source {each!r}" for each in (first[pair_id], name)
            )
            raise UserError(f"pair {pair_id} is {classes} in different rows of --scores")


def require_free(scores: Path, info: ScoresInfo, column: str, *, overwrite: bool) -> None:
    """Refuse to replace a column that ``weigh`` has not made.

    Args:
        scores: the table's folder.
        info: its ``scores.json``.
        column: to be written.
        overwrite: replace any column but the table's own.

    Raises:
        UserError: the table has another column of this name.
    """
    if column in score_schema(list(info.rewards)).names:
        raise UserError(f"--column {column} is a column of every scores table; choose another name")
    with reading_parquet(scores / info.parts[0].name):
        schema = pq.read_schema(scores / info.parts[0].name)
    made = column not in schema.names or _MADE.items() <= (schema.field(column).metadata or {}).items()
    if not made and not overwrite:
        raise UserError(f"--column {column} exists, and weigh did not make it; choose another name, or --overwrite")


def write_column(scores: Path, info: ScoresInfo, column: str, weight_P: np.ndarray) -> None:
    """Write the table with a float32 column of weights, null where NaN or missing; it replaces the old table at once.

    New parts are written beside the old ones, which go when ``scores.json`` lists the new ones. A table that has these
    weights already is left as it is.
    """
    weight_P = np.pad(weight_P, (0, info.scored - len(weight_P)), constant_values=np.nan)
    parts, start, changed = [], 0, False
    for part in info.parts:
        path = scores / part.name
        with reading_parquet(path):
            table = pq.read_table(path)
        values_R = weight_P[start : start + part.pairs].astype(np.float32)
        start += part.pairs
        values = pa.array(values_R, pa.float32(), from_pandas=True)
        if column in table.column_names and table[column].combine_chunks().equals(values):
            parts.append(part)
            continue
        changed = True
        place = table.column_names.index(column) if column in table.column_names else table.num_columns
        table = table.drop_columns([column]) if place < table.num_columns else table
        digest = sha256_json([part.sha256, column, hashlib.sha256(values_R.tobytes()).hexdigest()])
        name = f"scores-{len(info.rewards)}-{len(parts):06d}-{digest[:12]}.parquet"
        with atomic_path(scores / name) as temporary:
            pq.write_table(table.add_column(place, pa.field(column, pa.float32(), metadata=_MADE), values), temporary)
            hashes = {"sha256": sha256_file(temporary), "scored_sha256": part.content}
            parts.append(part.model_copy(update={"name": name, **hashes}))
    if changed:
        info = info.model_copy(update={"parts": parts})
        write_scores_info(scores, info)
        remove_leftovers(scores, info)
