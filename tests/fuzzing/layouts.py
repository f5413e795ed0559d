"""Hostile files in the layouts of known data sets, recognised or named."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from smpo_schemas.layouts import layouts
from smpo_schemas.pairs import ReadingChoices
from tests.fuzzing.mutate import HOSTILE_JSON, damage, damaged_parquet, distort, hostile_text, odd_column
from tests.fuzzing.pairs import Run, read_pairs
from tests.pictures import encode, picture

_TWO = ["picture.png", "picture.png"]
_ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "p", "image_0": _TWO[0], "image_1": _TWO[1], "label": 1, "pair_id": "a", "annotator": "u", "votes": 3},
    {"caption": "p", "jpg_0": _TWO[0], "jpg_1": _TWO[1], "label_0": 1, "has_label": True, "ranking_id": 1},
    {"prompt": "p", "chosen": _TWO[0], "rejected": _TWO[1], "pair_id": "a", "annotator": "u"},
    {"prompt": "p", "img_better": _TWO[0], "img_worse": _TWO[1]},
    {"prompt": "p", "path1": _TWO[0], "path2": _TWO[1], "confidence": 0.9, "choice_dist": [3, 1], "model1": "m"},
    {"prompt": "p", "file_path": _TWO, "human_preference": [1, 0], "user_hash": "u"},
    {"prompt": "p", "image_path": _TWO, "rank": [1, 2], "raw_annotations": [{"rank": [2, 1], "user_hash": "u"}]},
    {"image_path": _TWO[0], "prompt_id": "1", "prompt": "p", "rank": 2, "classification": "People"},
    {"prompt": "p", "image1": _TWO[0], "image2": _TWO[1], "votes_image1": 3, "votes_image2": 1, "category": "c"},
    {
        "prompt": "p", "image1": _TWO[0], "image2": _TWO[1], "weighted_results_image1_preference": 0.7,
        "weighted_results_image2_preference": 0.3, "detailed_results_preference": '[{"votedFor": 1}]',
    },
    {"prompt": "p", "image1": _TWO[0], "image2": _TWO[1], "aggregated_results": '{"image1": 2, "image2": 1}'},
    {"images": {"image_1": _TWO[0], "image_2": _TWO[1], "prompt": "p"}, "preference.responses": ["image_1", "both"]},
    {"id": "a", "instance_data_dir": "w", "conditioning_data": "b", "conditioning_type": "reference_strict"},
    {"id": "b", "instance_data_dir": "l", "type": "local"},
)  # fmt: skip

_ENCODINGS = ("utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252", "utf-7")


def prepare(seed: int, folder: Path) -> Run:
    """Make the files of a seed in ``folder``; what is returned reads them and says what became of them."""
    return write_and_read(random.Random(seed), folder)


def write_and_read(draw: random.Random, folder: Path) -> Run:
    """Write a JSON list, JSON Lines, a Parquet file, a tar or folders with damage, to be read by draws of the flags."""
    image = encode(picture(), "PNG")
    (folder / "picture.png").write_bytes(image)
    path = draw.choice((_json, _json, _json, _parquet, _parquet, _tar, _folder, _two_backends))(draw, folder)
    choices = ReadingChoices(
        layout=draw.choice((*layouts(),)) if draw.random() < 0.3 else None,
        axis=draw.choice((None, None, None, "coherence", "", "\x00")),
        min_confidence=draw.choice((None, None, None, 0.5)),
    )
    return lambda: read_pairs(path, choices)


def _rows(draw: random.Random) -> list[Any]:
    row = draw.choice(_ROWS)
    if draw.random() < 0.2:
        return [row] * 4
    rows = [distort(row, draw) if draw.random() < 0.5 else dict(row) for _ in range(4)]
    return [
        dict(each, prompt=hostile_text(draw)) if isinstance(each, dict) and draw.random() < 0.3 else each
        for each in rows
    ]


def _json(draw: random.Random, folder: Path) -> Path:
    lines = [json.dumps(row).encode() for row in _rows(draw)]
    if draw.random() < 0.2:
        lines.insert(draw.randrange(5), draw.choice(HOSTILE_JSON)())
    data = b"\n".join(lines) if draw.random() < 0.3 else b"[" + b",\n".join(lines) + b"]"
    path = folder / draw.choice(("pairs.json", "pairs.json", "pairs.jsonl", "train.json", "metadata.json"))
    path.write_bytes(draw.choice((_as_it_is, _as_it_is, _damaged, _encoded, _packed))(data, draw))
    return path


def _as_it_is(data: bytes, _draw: random.Random) -> bytes:
    return data


def _damaged(data: bytes, draw: random.Random) -> bytes:
    return damage(data, draw, [data])


def _encoded(data: bytes, draw: random.Random) -> bytes:
    return data.decode(errors="replace").encode(draw.choice(_ENCODINGS), errors="replace")


def _packed(data: bytes, draw: random.Random) -> bytes:
    return gzip.compress(data[:100_000] * draw.choice((1, 1000)))


def _parquet(draw: random.Random, folder: Path) -> Path:
    path = folder / "pairs.parquet"
    image = (folder / "picture.png").read_bytes()
    rows = [row for row in _rows(draw) if isinstance(row, dict)]
    if draw.random() < 0.5:
        as_bytes: Callable[[Any], Any] = draw.choice((lambda _: image, lambda path: {"bytes": image, "path": path}))
        rows = [{name: as_bytes(value) if value == _TWO[0] else value for name, value in row.items()} for row in rows]
    names = {name: [row.get(name) for row in rows] for row in rows for name in row}
    columns = {name: _column(values) for name, values in names.items()}
    if columns and draw.random() < 0.4:
        columns[draw.choice(list(columns))] = odd_column(draw, len(rows))
    pq.write_table(pa.table(columns), path)
    if draw.random() < 0.2:
        path.write_bytes(damaged_parquet(path.read_bytes(), draw))
    return path


def _column(values: list[Any]) -> pa.Array:
    """The values, or as text what Parquet cannot hold."""
    try:
        column = pa.array(values)
        pq.write_table(pa.table({"column": column}), io.BytesIO())
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return pa.array([repr(value)[:50] for value in values])
    return column


def _tar(draw: random.Random, folder: Path) -> Path:
    image, content = (folder / "picture.png").read_bytes(), io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for key in range(4):
            label, prompt = draw.choice((b"1.0", b"nan", b"x" * 200, b"")), hostile_text(draw).encode(errors="replace")
            parts = {"jpg_0.jpg": image, "jpg_1.jpg": image, "label_0.txt": label, "original_prompt.txt": prompt}
            for name in draw.sample(list(parts), draw.choice((4, 4, 3))):
                header = tarfile.TarInfo(f"{key}.{name}")
                header.size = len(parts[name])
                tar.addfile(header, io.BytesIO(parts[name]))
    data, path = content.getvalue(), folder / "pairs.tar"
    path.write_bytes(damage(data, draw, [data]) if draw.random() < 0.5 else data)
    return path


def _folder(draw: random.Random, folder: Path) -> Path:
    """Two folders of images with captions, or one whose names end in _w and _l."""
    root = folder / "pairs"
    image, apart = (folder / "picture.png").read_bytes(), draw.random() < 0.6
    for side in draw.choice((("w", "l"), ("chosen", "rejected"), ("win", "lose"))) if apart else ("w", "l"):
        for name in ("a", "b", "c", "d" * 200):
            stem = root / side / name if apart else root / f"{name}_{side}"
            stem.parent.mkdir(parents=True, exist_ok=True)
            if draw.random() < 0.8:
                stem.with_name(f"{stem.name}.png").write_bytes(draw.choice((image, image, b"")))
            text = draw.choice((b"", b"\xff\xfe", b"\n\n", hostile_text(draw).encode(errors="replace")))
            if draw.random() < 0.8:
                stem.with_name(f"{stem.name}.{draw.choice(('txt', 'caption'))}").write_bytes(text)
    return root


def _two_backends(draw: random.Random, folder: Path) -> Path:
    """SimpleTuner's data backends: a JSON list that names folders of images."""
    root, image = folder / "pairs", (folder / "picture.png").read_bytes()
    for side in ("w", "l"):
        (root / side).mkdir(parents=True)
        for name in ("a", "b"):
            (root / side / f"{name}.png").write_bytes(image)
            (root / side / f"{name}.txt").write_bytes(hostile_text(draw).encode(errors="replace"))
    backends = [
        {"id": "good", "type": "local", "instance_data_dir": "w", "caption_strategy": "textfile",
         "conditioning_data": "bad"},
        {"id": "bad", "type": "local", "instance_data_dir": "l", "dataset_type": "conditioning",
         "conditioning_type": "reference_strict", "source_dataset_id": "good"},
    ]  # fmt: skip
    if draw.random() < 0.7:
        backends = distort(backends, draw)
    path = root / "multidatabackend.json"
    path.write_text(json.dumps(backends))
    return draw.choice((root, path))
