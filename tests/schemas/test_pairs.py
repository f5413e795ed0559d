from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_common.errors import UserError
from smpo_schemas.generation.candidates import CANDIDATES_SCHEMA
from smpo_schemas.generation.selection import SELECTED_SCHEMA
from smpo_schemas.layouts import layout_of, layouts
from smpo_schemas.pairs import (
    PICK_A_PIC,
    Pair,
    PairFile,
    PairRejectedError,
    ReadingChoices,
    RowRange,
    column_names,
    json_rows,
    list_pair_files,
    read_rows,
    resolve_columns,
    slice_files,
)


def read(path):
    (file,) = list_pair_files([path])
    return [pair for _, pair in read_rows(RowRange(path, 0, file.rows), file.layout)]


def write_pick_a_pic(path, rows: int, row_group_size: int = 3):
    table = pa.table(
        {
            "caption": [f"prompt {row}" for row in range(rows)],
            "jpg_0": [b"first %d" % row for row in range(rows)],
            "jpg_1": [b"second %d" % row for row in range(rows)],
            "label_0": [(1.0, 0.0, 0.5)[row % 3] for row in range(rows)],
            "ranking_id": list(range(100, 100 + rows)),
            "user_id": [7] * rows,
            "unused": [b"x" * 1000] * rows,
        }
    )
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def test_pick_a_pic_columns_are_known(tmp_path):
    path = write_pick_a_pic(tmp_path / "a.parquet", 5)
    columns = resolve_columns(column_names(path), {}, path)
    assert columns == PICK_A_PIC
    rows = list(read_rows(RowRange(path, 2, 5), layout_of(path, column_names(path), ReadingChoices())))
    assert [source for source, _ in rows] == [f"{path}:{row}" for row in (2, 3, 4)]
    assert rows[0][1] == Pair("102", "prompt 2", b"first 2", b"second 2", 0.5, "7")


@pytest.mark.parametrize("schema", [CANDIDATES_SCHEMA, SELECTED_SCHEMA], ids=["generate", "select"])
@pytest.mark.parametrize("published", sorted(layouts()))
def test_own_tables_are_read_as_such_whatever_columns_their_prompts_had(tmp_path, schema, published):
    """The prompts of a data set with images of its own are often used for new images."""
    names = [*schema.names, *(name for name in layouts()[published].required if name not in schema.names)]
    columns = layout_of(tmp_path / "a.parquet", names, ReadingChoices()).columns
    assert (columns.prompt, columns.image_0, columns.image_1, columns.chosen) == ("prompt", "image_0", "image_1", None)


@pytest.mark.parametrize("start", range(5))
@pytest.mark.parametrize("stop", range(5, 8))
def test_any_row_range_of_a_file_with_row_groups(tmp_path, start, stop):
    path = write_pick_a_pic(tmp_path / "a.parquet", 7)
    layout = layout_of(path, column_names(path), ReadingChoices())
    rows = [pair.pair_id for _, pair in read_rows(RowRange(path, start, stop), layout)]
    assert rows == [str(100 + row) for row in range(start, min(stop, 7))]


def test_slices_cover_the_input_once_and_in_order(tmp_path):
    files = [PairFile(tmp_path / name, rows, 0, "") for name, rows in (("a", 5), ("b", 0), ("c", 9))]
    for size in range(1, 16):
        for limit in (None, 1, 6, 14, 99):
            slices = slice_files(files, size, limit)
            rows = [(part.path.name, row) for unit in slices for part in unit for row in range(part.start, part.stop)]
            everything = [(file.path.name, row) for file in files for row in range(file.rows)]
            assert rows == everything[:limit]
            assert all(sum(part.stop - part.start for part in unit) == size for unit in slices[:-1])


def test_jsonl_with_paths_named_columns_and_bad_rows(tmp_path):
    (tmp_path / "one.png").write_bytes(b"one")
    (tmp_path / "two.png").write_bytes(b"two")
    good = {"text": "größer", "a": "one.png", "b": "two.png", "who": 3, "won": None}
    lines = [
        json.dumps(good),
        "not json",
        "",
        json.dumps({**good, "a": "missing.png"}),
        json.dumps({**good, "won": 2}),
        json.dumps({**good, "text": 5}),
        json.dumps({**good, "text": "\ud800"}),
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    given = {"prompt": "text", "image_0": "a", "image_1": "b", "annotator": "who", "label": "won"}
    (file,) = list_pair_files([path], ReadingChoices(given))
    assert file.rows == 6
    rows = [pair for _, pair in read_rows(RowRange(path, 0, 6), file.layout)]
    assert rows[0].prompt == "größer"
    assert (rows[0].image_0, rows[0].label, rows[0].annotator) == (b"one", None, "3")
    reasons = [str(row).split(":")[0] for row in rows[1:]]
    assert all(isinstance(row, PairRejectedError) for row in rows[1:])
    assert reasons == ["no prompt", "image not readable", "bad label", "no prompt", "not Unicode"]


def test_without_an_id_the_content_names_the_pair(tmp_path):
    path = tmp_path / "p.parquet"
    rows = [("a", b"x", b"y"), ("a", b"x", b"y"), ("a", b"y", b"x"), ("ax", b"", b"y"), ("a", b"xy", b"z")]
    columns = dict(zip(("prompt", "image_0", "image_1"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    pairs = read(path)
    assert pairs[0].pair_id == pairs[1].pair_id
    assert isinstance(pairs[3], PairRejectedError)
    assert len({pairs[0].pair_id, pairs[2].pair_id, pairs[4].pair_id}) == 3


@pytest.mark.parametrize("ids", [[float("nan"), float("nan"), 7.0], ["", " \t", "7.0"], [None, None, "7.0"]])
def test_an_empty_id_counts_as_missing(tmp_path, ids):
    """pandas writes NaN for a missing number, and CSV an empty string."""
    path = tmp_path / "p.parquet"
    columns = {"prompt": ["a", "b", "c"], "image_0": [b"x"] * 3, "image_1": [b"y"] * 3}
    pq.write_table(pa.table(columns), path)
    expected = [pair.pair_id for pair in read(path)[:2]]
    pq.write_table(pa.table(columns | {"pair_id": ids, "annotator": ids}), path)
    pairs = read(path)
    assert [pair.pair_id for pair in pairs] == [*expected, "7.0"]
    assert [pair.annotator for pair in pairs] == [None, None, "7.0"]


def test_images_of_the_datasets_library(tmp_path):
    path = tmp_path / "p.parquet"
    image = {"bytes": b"abc", "path": None}
    pq.write_table(pa.table({"prompt": ["a"], "image_0": [image], "image_1": [image]}), path)
    (pair,) = read(path)
    assert pair.image_0 == b"abc"


def test_wrong_use_is_one_line(tmp_path):
    path = write_pick_a_pic(tmp_path / "a.parquet", 1)
    with pytest.raises(UserError, match=r"no column 'text'.*--prompt-column"):
        resolve_columns(column_names(path), {"prompt": "text"}, path)
    with pytest.raises(UserError, match="no column 'label'"):
        resolve_columns(["prompt", "image_0", "image_1"], {"label": "label"}, path)
    with pytest.raises(UserError, match="does not exist"):
        list_pair_files([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.parquet"):
        list_pair_files([tmp_path / "empty"])
    with pytest.raises(UserError, match="twice"):
        list_pair_files([path, tmp_path])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        list_pair_files([tmp_path / "bad.parquet"])


def test_a_jsonl_file_has_the_columns_of_all_its_rows(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "a", "image_0": "x", "image_1": "y"}, {"prompt": "a", "label": 1, "pair_id": "p"}]
    path.write_text("broken\n" + "\n".join(map(json.dumps, rows)))
    (tmp_path / "empty.jsonl").write_text("")
    assert column_names(path) == ["prompt", "image_0", "image_1", "label", "pair_id"]
    assert [file.path for file in list_pair_files([tmp_path])] == [path]
    with pytest.raises(UserError, match="no rows"):
        list_pair_files([tmp_path / "empty.jsonl"])


@pytest.mark.parametrize("rows_a_unit", [1, 100, 2000])
def test_a_slice_of_a_jsonl_file_reads_little_before_its_own_rows(tmp_path, monkeypatch, rows_a_unit):
    """Blank, broken and overlong lines shift bytes; a blank line does not count as a row."""
    monkeypatch.setattr(json_rows, "MAX_LINE_BYTES", 200)
    path, lines, number = tmp_path / "a.jsonl", [], 0
    for line in range(2500):
        if line % 7 == 3:
            lines.append("\n  \n")
        text = "ä" * (300 if number % 50 == 9 else number % 11)
        lines.append("broken\n" if number % 60 == 8 else json.dumps({"prompt": text, "row": number}) + "\n")
        number += 1
    path.write_text("".join(lines))
    scan = json_rows.scan(path)
    file = PairFile(path, scan.rows, scan.bytes, scan.digest, scan.offsets)
    assert file.rows == number == 2500
    assert len(file.offsets) == 3
    read = []
    for (part,) in slice_files([file], rows_a_unit):
        assert 0 <= part.start - part.seek_to[0] < 1024
        rows = list(json_rows.rows(part))
        assert len(rows) == part.stop - part.start
        read += rows
    expected = [{} if row % 60 == 8 or row % 50 == 9 else row for row in range(2500)]
    assert [row.get("row", {}) for row in read] == expected


def test_a_large_row_group_is_read_in_parts(tmp_path):
    """Arrow's memory while a row group with 64 MB of images, in pages of four rows, is read."""
    path, rows = tmp_path / "a.parquet", 64
    images = [np.random.default_rng(row).bytes(500_000) for row in range(rows)]
    table = pa.table({"prompt": ["a"] * rows, "image_0": images, "image_1": images})
    pq.write_table(table, path, row_group_size=rows, write_batch_size=4, use_dictionary=False)
    del table
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    layout = layout_of(path, column_names(path), ReadingChoices())
    held = [pool.bytes_allocated() - before for _ in read_rows(RowRange(path, 0, rows), layout)]
    assert len(held) == rows
    assert max(held) < 40e6  # 16 rows at a time are 16 MB


def test_lone_surrogates_are_rejected(tmp_path):
    path = tmp_path / "a.jsonl"
    good = {"prompt": "x", "image_0": "i", "image_1": "i", "pair_id": "p", "annotator": "a"}
    rows = [good, *(good | {name: "half \ud83d"} for name in ("prompt", "annotator", "pair_id", "image_0"))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "i").write_bytes(b"image")
    first, *others = read(path)
    assert isinstance(first, Pair)
    problems = ["not Unicode: prompt", "not Unicode: annotator", "not Unicode: pair_id"]
    assert [str(each) for each in others[:3]] == problems
    assert str(others[3]).startswith("image not readable: image_0")
    assert [each.pair_id for each in others] == ["p", "p", None, "p"]
    for each in others:
        str(each).encode()


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_file_edited_in_place_to_the_same_size_has_another_digest(tmp_path, suffix):
    path, digests = tmp_path / f"a.{suffix}", []
    for word in ("prompt", "pronto", "prompt"):
        rows = [{"prompt": f"{word} {row}", "image_0": "i", "image_1": "i"} for row in range(50)]
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        digests.append((path.stat().st_size, list_pair_files([path])[0].digest))
    assert digests[0] == digests[2] != digests[1]
    assert digests[0][0] == digests[1][0]


def test_paths_are_absolute(tmp_path, monkeypatch):
    write_pick_a_pic(tmp_path / "a.parquet", 2)
    monkeypatch.chdir(tmp_path)
    for given in (Path("a.parquet"), Path()):
        assert [file.path for file in list_pair_files([given])] == [tmp_path / "a.parquet"]


def test_linked_folders_are_read_once_and_hidden_ones_not(tmp_path):
    given, elsewhere = tmp_path / ".given", tmp_path / "elsewhere"
    for folder in (given / ".ipynb_checkpoints", given / "train.parquet", elsewhere / "deep"):
        folder.mkdir(parents=True)
    hidden = (".a.parquet", ".ipynb_checkpoints/a-checkpoint.parquet")
    files = {given / "a.parquet", given / "train.parquet" / "part-0.snappy.parquet", elsewhere / "deep" / "b.parquet"}
    for path in [*files, *(given / name for name in hidden)]:
        write_pick_a_pic(path, 1)
    (given / "train.parquet" / "_SUCCESS").touch()
    (given / "more").symlink_to(elsewhere)
    (given / "once-more").symlink_to(elsewhere)
    (elsewhere / "deep" / "back").symlink_to(given)
    found = [file.path for file in list_pair_files([given])]
    assert found == sorted(found)
    assert {path.resolve() for path in found} == files
    assert len(found) == len(files)
    assert all(path.is_relative_to(given) for path in found)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    write_pick_a_pic(tmp_path / "a.parquet", 1)
    closed = tmp_path / "closed"
    closed.mkdir()
    listed = os.scandir

    def scandir(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="closed.*Permission denied"):
        list_pair_files([tmp_path])


def test_two_names_of_one_file_are_refused(tmp_path):
    write_pick_a_pic(tmp_path / "a.parquet", 1)
    (tmp_path / "latest.parquet").symlink_to("a.parquet")
    with pytest.raises(UserError, match=r"--pairs .*a\.parquet.*latest\.parquet"):
        list_pair_files([tmp_path])
