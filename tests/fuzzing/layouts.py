"""Hostile files in the layouts of known data sets."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.fuzzing.mutate import damage, distort, hostile_text
from tests.pictures import encode, picture

_TWO = ["picture.png", "picture.png"]
_ROWS: tuple[dict[str, Any], ...] = (
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
    {"id": "a", "instance_data_dir": ".", "conditioning_data": "a", "conditioning_type": "reference_strict"},
)  # fmt: skip


def write_layout(draw: random.Random, folder: Path) -> Path:
    """Write a JSON list, JSON Lines, a Parquet file, a tar or a folder with damage; return its path."""
    (folder / "picture.png").write_bytes(encode(picture(), "PNG"))
    return draw.choice((_json, _json, _parquet, _tar, _folder))(draw, folder)


def _rows(draw: random.Random) -> list[Any]:
    row = draw.choice(_ROWS)
    rows = [distort(row, draw) if draw.random() < 0.5 else dict(row) for _ in range(4)]
    return [
        dict(each, prompt=hostile_text(draw)) if isinstance(each, dict) and draw.random() < 0.3 else each
        for each in rows
    ]


def _json(draw: random.Random, folder: Path) -> Path:
    lines = [json.dumps(row).encode() for row in _rows(draw)]
    data = b"\n".join(lines) if draw.random() < 0.2 else b"[" + b",\n".join(lines) + b"]"
    path = folder / "pairs.json"
    path.write_bytes(damage(data, draw, [data]) if draw.random() < 0.4 else data)
    return path


def _parquet(draw: random.Random, folder: Path) -> Path:
    path = folder / "pairs.parquet"
    rows = [row for row in _rows(draw) if isinstance(row, dict)]
    names = {name: [row.get(name) for row in rows] for row in rows for name in row}
    columns = {}
    for name, values in names.items():
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            columns[name] = pa.array([repr(value)[:50] for value in values])
    pq.write_table(pa.table(columns), path)
    return path


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
    root = folder / "pairs"
    for side in ("w", "l"):
        (root / side).mkdir(parents=True)
        for name in ("a", "b", "c"):
            if draw.random() < 0.8:
                (root / side / f"{name}.png").write_bytes((folder / "picture.png").read_bytes())
            text = draw.choice((b"", b"\xff\xfe", b"\n\n", hostile_text(draw).encode(errors="replace")))
            (root / side / f"{name}.txt").write_bytes(text)
    return root
