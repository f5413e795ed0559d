"""Hostile pairs: Parquet, JSON Lines, and the layouts of known data sets."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from smpo_pipeline.inspection.pairs import draw_pairs, print_pairs, summarise_pairs
from smpo_pipeline.inspection.recognise import recognise
from smpo_schemas.pairs import (
    PairRejectedError,
    ReadingChoices,
    layouts_of,
    list_pair_files,
    read_rows,
    slice_files,
)
from smpo_schemas.rejects import Reject, write_rejects
from tests.fuzzing.mutate import HOSTILE_JSON, damage, damaged_parquet, distort, hostile_text, odd_column
from tests.pictures import encode, picture

Run = Callable[[], str]
_NONE = ReadingChoices()


def _pair_rows(draw: random.Random, images: bool) -> list[dict[str, Any]]:
    image = encode(picture(), "PNG") if images else "picture.png"
    rows = [
        {
            "prompt": f"prompt {row}",
            "image_0": image,
            "image_1": image,
            "label": 1.0,
            "pair_id": f"p{row}",
            "annotator": "me",
        }
        for row in range(4)
    ]
    for row in draw.sample(rows, 2):
        row["prompt"] = hostile_text(draw)
        row["annotator"] = hostile_text(draw)
    return rows


def _parquet_pairs(draw: random.Random, folder: Path) -> Run:
    path = folder / "pairs.parquet"
    table = pa.Table.from_pylist(_pair_rows(draw, images=True))
    what = draw.choice(("bytes", "bytes", "type", "text", "twice", "dictionary"))
    if what == "type":
        name = draw.choice(table.column_names)
        table = table.set_column(table.column_names.index(name), name, odd_column(draw, len(table)))
    elif what == "text":
        invalid = pa.array([b"\xff\xfe", b"ok", b"\xc3", b"x"], pa.binary()).view(pa.string())
        name = draw.choice(("prompt", "pair_id", "annotator"))
        table = table.set_column(table.column_names.index(name), name, invalid)
    elif what == "twice":
        table = table.append_column(draw.choice(table.column_names), table.column(0))
    elif what == "dictionary":
        name = draw.choice(("prompt", "pair_id", "image_0", "label"))
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    options = {"compression": draw.choice(("none", "snappy", "zstd", "gzip")), "row_group_size": draw.choice((1, 2, 9))}
    pq.write_table(table, path, data_page_version=draw.choice(("1.0", "2.0")), **options)
    if what == "bytes":
        data = path.read_bytes()
        path.write_bytes(damaged_parquet(data, draw))
    return lambda: read_pairs(path)


def _jsonl_pairs(draw: random.Random, folder: Path) -> Run:
    (folder / "picture.png").write_bytes(encode(picture(), "PNG"))
    path = folder / "pairs.jsonl"
    rows = [distort(row, draw) if draw.random() < 0.6 else row for row in _pair_rows(draw, images=False)]
    lines = [json.dumps(row).encode() for row in rows]
    lines.insert(draw.randrange(5), draw.choice(HOSTILE_JSON)())
    data = b"\n".join(lines)
    path.write_bytes(damage(data, draw, [data]) if draw.random() < 0.3 else data)
    return lambda: read_pairs(path)


def read_pairs(path: Path, choices: ReadingChoices = _NONE) -> str:
    """Read and show pairs as the commands do."""
    files = list_pair_files([path], choices)
    layouts = layouts_of(files)
    parts = [rows for unit in slice_files(files, 3) for rows in unit]
    found = [each for rows in parts for each in read_rows(rows, layouts[rows.path])]
    assert len(found) == sum(file.rows for file in files)
    for _, pair in found:
        if isinstance(pair, PairRejectedError):
            assert str(pair).isprintable()
            assert len(str(pair)) < 2000
    rejects = [Reject(pair_id=p.pair_id, source=s, stage="x", reason="x") for s, p in found]
    write_rejects(path.with_name("rejected.parquet"), rejects)
    summary = summarise_pairs(recognise(path)[1], choices, limit=None, samples=4, advance=lambda *_: None)
    print_pairs(summary, path, Console(markup=False))
    draw_pairs(summary, path, {})
    return "rejected" if summary.rejects else "read"


KINDS = (_parquet_pairs, _parquet_pairs, _jsonl_pairs)
