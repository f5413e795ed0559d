"""Data sets with chosen and rejected images: positions are drawn, and the label says which image was chosen."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_common.errors import UserError
from smpo_schemas.layouts import layout_of
from smpo_schemas.pairs import (
    Pair,
    PairRejectedError,
    ReadingChoices,
    RowRange,
    column_names,
    read_rows,
    resolve_columns,
)

GIVEN = {"chosen": "chosen", "rejected": "rejected"}
ROWS = 2000


def rows_of(count: int) -> list[dict]:
    return [
        {"prompt": f"prompt {row // 2}", "chosen": b"good %d" % row, "rejected": b"bad %d" % row}
        for row in range(count)
    ]


def write(path: Path, rows: list[dict], **more: list) -> Path:
    table = pa.Table.from_pylist(rows)
    for name, values in more.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, path, row_group_size=300)
    return path


def read(path: Path, start: int = 0, stop: int = ROWS, given: dict = GIVEN) -> list[Pair]:
    layout = layout_of(path, column_names(path), ReadingChoices(given))
    found = [pair for _, pair in read_rows(RowRange(path, start, stop), layout)]
    assert all(isinstance(pair, Pair) for pair in found), found
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("chosen") / "pairs.parquet", rows_of(ROWS))


def test_the_label_says_which_image_was_chosen(many: Path) -> None:
    for row, pair in zip(rows_of(ROWS), read(many), strict=True):
        images = (pair.image_0, pair.image_1)
        assert pair.label in (0.0, 1.0)
        assert images == ((row["chosen"], row["rejected"]) if pair.label else (row["rejected"], row["chosen"]))


def test_about_half_of_the_chosen_images_come_first(many: Path) -> None:
    first = sum(pair.label or 0 for pair in read(many))
    assert abs(first - ROWS / 2) < 4 * math.sqrt(ROWS) / 2  # four standard deviations of a fair coin
    changes = sum(one.label != other.label for one, other in pairwise(read(many)))
    assert abs(changes - ROWS / 2) < 4 * math.sqrt(ROWS) / 2  # and no position follows from the one before


def test_runs_slices_and_orders_agree(many: Path, tmp_path: Path) -> None:
    whole = read(many)
    assert read(many) == whole
    assert [pair for start in range(0, ROWS, 170) for pair in read(many, start, min(start + 170, ROWS))] == whole
    backwards = write(tmp_path / "backwards.parquet", rows_of(ROWS)[::-1])
    assert read(backwards) == whole[::-1]


def test_positions_do_not_depend_on_who_won(many: Path, tmp_path: Path) -> None:
    """The same images with the opposite preference: the same pair, labelled the other way."""
    exchanged = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows_of(ROWS)]
    for pair, other in zip(read(many), read(write(tmp_path / "p.parquet", exchanged)), strict=True):
        assert (pair.pair_id, pair.image_0, pair.image_1) == (other.pair_id, other.image_0, other.image_1)
        assert (pair.label or 0) + (other.label or 0) == 1


def test_images_as_the_datasets_library_stores_them(tmp_path: Path) -> None:
    """open-image-preferences-v1-binarized: structs of bytes and path."""
    rows = rows_of(20)
    structs = [
        {**row, **{name: {"bytes": row[name], "path": f"{name}.jpg"} for name in ("chosen", "rejected")}}
        for row in rows
    ]
    assert read(write(tmp_path / "structs.parquet", structs), 0, 20) == read(
        write(tmp_path / "bytes.parquet", rows), 0, 20
    )


def test_other_columns_mean_what_they_mean(tmp_path: Path) -> None:
    """Ids and annotators are read; a label column is not, since chosen and rejected say it."""
    ids = [f"id {row}" for row in range(6)]
    path = write(tmp_path / "p.parquet", rows_of(6), pair_id=ids, label=[0.5] * 6, annotator=["a"] * 6)
    pairs = read(path, 0, 6)
    assert [pair.pair_id for pair in pairs] == ids
    assert {pair.annotator for pair in pairs} == {"a"}
    assert {pair.label for pair in pairs} <= {0.0, 1.0}


def test_a_missing_image_is_named_by_its_column(tmp_path: Path) -> None:
    path = write(tmp_path / "p.parquet", [{"prompt": "a", "chosen": b"x", "rejected": None}])
    layout = layout_of(path, column_names(path), ReadingChoices(GIVEN))
    ((_, found),) = read_rows(RowRange(path, 0, 1), layout)
    assert isinstance(found, PairRejectedError)
    assert "rejected" in str(found)


def test_columns_that_are_not_there(many: Path) -> None:
    with pytest.raises(UserError, match=r"no column 'won'.*--chosen-column"):
        resolve_columns(column_names(many), {"chosen": "won", "rejected": "rejected"}, many)
    with pytest.raises(UserError, match=r"no column 'image_0'.*--image-0-column.*--chosen-column.*--rejected-column"):
        resolve_columns(column_names(many), {}, many)
