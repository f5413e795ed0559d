"""Hostile or badly damaged pair files: findings of ``python -m tests.fuzz``."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_common.errors import UserError
from smpo_common.store_path import StorePath
from smpo_schemas.pairs import (
    MAX_TEXT,
    Pair,
    PairColumns,
    PairRejectedError,
    RowRange,
    json_rows,
    list_pair_files,
    normalise,
    normalising,
    read_rows,
)

GOOD = {"prompt": "x", "image_0": b"one", "image_1": b"two", "pair_id": "p", "label": 1.0, "annotator": "me"}


def read(path):
    """Read every row of a file: a pair, or the error that rejects it."""
    (file,) = list_pair_files([path])
    return [pair for _, pair in read_rows(RowRange(path, 0, file.rows), file.layout)]


def write_lines(path, *rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.fixture
def line(tmp_path):
    """Make a valid JSONL row."""
    (tmp_path / "i.png").write_bytes(b"image")
    return {"prompt": "x", "image_0": "i.png", "image_1": "i.png", "pair_id": "p"}


def test_unusable_json_rejects_its_row_only(tmp_path, line):
    deep = b'{"pair_id": ' + b"[" * 900 + b"]" * 900 + b"}"
    path = write_lines(
        tmp_path / "p.jsonl",
        line,
        b"[" * 100_000,
        deep,
        b'{"label": ' + b"9" * 5000 + b"}",
        line | {"label": 10**400},
        line | {"pair_id": {"a": 1}},
        line | {"annotator": ["me"]},
        line | {"prompt": "w" * (MAX_TEXT + 1)},
        line | {"image_0": "\0"},
        line | {"image_0": "y" * 100_000},
        line,
    )
    first, *bad, last = read(path)
    assert first == last == Pair("p", "x", b"image", b"image", None, None)
    assert all(isinstance(each, PairRejectedError) for each in bad)
    assert [str(each).split(":")[0] for each in bad] == [
        "no prompt",
        "not text",
        "no prompt",
        "bad label",
        "not text",
        "not text",
        "text too long",
        "image not readable",
        "image not readable",
    ]
    assert all(str(each).isprintable() and len(str(each)) < 2000 for each in bad)


def test_a_prompt_of_control_characters_is_kept_as_it_is(tmp_path, line):
    prompt = "a\x00b\x1b[2J\r\x07 [red] \u202e \ufeff"
    (pair,) = read(write_lines(tmp_path / "p.jsonl", line | {"prompt": prompt}))
    assert pair.prompt == prompt


def test_an_overlong_line_is_one_reject_and_the_next_is_read(tmp_path, line, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_LINE_BYTES", 1000)
    long = line | {"prompt": "w" * 5000}
    exact = json.dumps(line | {"prompt": ""}).encode()
    exact = exact.replace(b'"prompt": ""', b'"prompt": "' + b"w" * (999 - len(exact)) + b'"')
    path = write_lines(tmp_path / "p.jsonl", line, long, line, exact, b" " * 5000, line)
    assert len(exact) == 999
    found = read(path)
    assert [isinstance(each, Pair) for each in found] == [True, False, True, True, False, True]


@pytest.mark.parametrize(
    ("name", "passes"),
    [(name, True) for name in ("EIO", "ENOTCONN", "EREMOTEIO", "EHOSTDOWN", "EMFILE", "ENFILE", "ENOMEM")]
    + [("EACCES", False), ("ENAMETOOLONG", False)],
)
def test_no_pair_is_rejected_for_a_transient_error(tmp_path, line, monkeypatch, name, passes):
    number = getattr(errno, name)

    def fails(_path):
        raise OSError(number, os.strerror(number))

    (tmp_path / "image").write_bytes(b"x")
    path = write_lines(tmp_path / "p.jsonl", {**line, "image_1": "image"})
    monkeypatch.setattr(Path, "read_bytes", fails)
    if passes:
        with pytest.raises(UserError, match=os.strerror(number)):
            read(path)
    else:
        assert os.strerror(number) in str(read(path)[0])


def test_an_image_that_an_object_store_lacks_is_said_to_be_missing():
    row = GOOD | {"image_1": "none.png"}
    with pytest.raises(
        PairRejectedError, match=r"^image not readable: image_1 'memory://folder/none.png': no such file$"
    ):
        normalise(row, PairColumns(), StorePath("memory://folder"))


@pytest.mark.timeout(20)
def test_only_plain_files_are_opened_as_images(tmp_path, line, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "large").write_bytes(b"x" * 101)
    monkeypatch.setattr(normalising, "MAX_IMAGE_BYTES", 100)
    names = ["/dev/zero", "pipe", "empty", ".", "/proc/self/mem", "large"]
    found = read(write_lines(tmp_path / "p.jsonl", *({**line, "image_1": name} for name in names)))
    assert all(isinstance(each, PairRejectedError) for each in found)
    assert [str(each).split(":")[0] for each in found] == ["image not readable"] * 5 + ["image too large"]


@pytest.mark.parametrize(
    ("name", "column", "reason"),
    [
        ("prompt", pa.array([b"ok", b"\xff\xfe"], pa.binary()).view(pa.string()), "value not readable: prompt"),
        ("annotator", pa.array([0, 2**60], pa.timestamp("ms")), "value not readable: annotator"),
        ("prompt", pa.array(["x", None]), "no prompt"),
        ("image_0", pa.array([b"x", b""]), "no image"),
        ("label", pa.array([1.0, 7.0]), "bad label"),
        ("pair_id", pa.array(["p", "x" * (MAX_TEXT + 1)]), "text too long: pair_id"),
    ],
)
def test_a_value_that_python_cannot_hold_rejects_its_row_only(tmp_path, name, column, reason):
    table = pa.Table.from_pylist([GOOD, GOOD])
    table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, tmp_path / "p.parquet")
    first, second = read(tmp_path / "p.parquet")
    assert isinstance(first, Pair)
    assert str(second).startswith(reason)


@pytest.mark.parametrize("name", ["prompt", "image_0"])
@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2]),
        pa.array([["deep"], []]),
        pa.array([{"a": {"b": 1}}, None]),
        pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
        pa.nulls(2),
    ],
)
def test_columns_of_other_types_reject_every_row(tmp_path, name, column):
    table = pa.Table.from_pylist([GOOD, GOOD])
    pq.write_table(table.set_column(table.column_names.index(name), name, column), tmp_path / "p.parquet")
    assert all(isinstance(each, PairRejectedError) for each in read(tmp_path / "p.parquet"))


def test_dictionary_encoded_columns_are_decoded(tmp_path):
    table = pa.Table.from_pylist([GOOD, GOOD])
    encoded = pa.table({name: table[name].dictionary_encode() for name in table.column_names})
    pq.write_table(encoded, tmp_path / "p.parquet")
    assert read(tmp_path / "p.parquet") == [Pair("p", "x", b"one", b"two", 1.0, "me")] * 2


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_pylist([GOOD])
    pq.write_table(table.append_column("prompt", pa.array(["other"])), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="several columns 'prompt'"):
        read(tmp_path / "p.parquet")


def test_damage_anywhere_in_a_parquet_file_is_one_line(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD | {"prompt": f"number {row}"} for row in range(50)]), path)
    whole = path.read_bytes()
    outcomes = set()
    for place in range(4, len(whole), 37):
        path.write_bytes(whole[:place] + b"\xff\xff\xff\x7f" + whole[place + 4 :])
        try:
            outcomes.add(len(read(path)))
        except UserError:
            outcomes.add("refused")
    assert outcomes <= {50, "refused"}
    assert "refused" in outcomes


def test_a_footer_with_too_many_rows_is_refused(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD] * 21), path)
    data = path.read_bytes()
    (length,) = struct.unpack("<I", data[-8:-4])
    footer = data[-8 - length : -8]
    many = b"\x80\x80\x80\x80\x80\x80\x01"  # zigzag varint of 2 ** 41
    for claimed in (b"\x2a".replace(b"\x2a", b"\x2c"), many):  # 22 rows; 2 ** 41 rows
        changed = footer.replace(b"\x16\x2a", b"\x16" + claimed)  # each i64 field that says 21
        assert changed != footer
        path.write_bytes(data[: -8 - length] + changed + struct.pack("<I", len(changed)) + b"PAR1")
        with pytest.raises(UserError, match="row group 0 ends after 21 rows|cannot hold|cannot be read"):
            read(path)


def test_a_file_name_that_no_table_can_hold_is_refused(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_text("{}")
    with pytest.raises(UserError, match="rename the file") as caught:
        list_pair_files([tmp_path])
    str(caught.value).encode()
