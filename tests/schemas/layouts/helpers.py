"""Small files in the layouts of known data sets, and what is read from them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smpo_schemas.pairs import (
    Pair,
    PairFile,
    PairRejectedError,
    ReadingChoices,
    layouts_of,
    list_pair_files,
    read_rows,
    slice_files,
)


def listed(path: Path, **choices: Any) -> list[PairFile]:
    return list_pair_files([path], ReadingChoices(**choices))


def read(path: Path, rows_a_unit: int = 2, **choices: Any) -> list[Pair | PairRejectedError]:
    """Read a file or folder unit by unit, as workers do; every row is a pair or rejected."""
    files = listed(path, **choices)
    layouts = layouts_of(files)
    units = slice_files(files, rows_a_unit)
    found = [pair for unit in units for rows in unit for _, pair in read_rows(rows, layouts[rows.path])]
    assert len(found) == sum(file.rows for file in files)
    return found


def layout_names(path: Path, **choices: Any) -> list[str]:
    return [file.layout.name for file in listed(path, **choices) if file.layout]


def preferred(pair: Pair) -> bytes:
    """The image with the larger share."""
    assert pair.label not in (None, 0.5)
    return pair.image_0 if pair.label > 0.5 else pair.image_1  # type: ignore[operator]


def share_of(pair: Pair, image: bytes) -> float:
    assert pair.label is not None
    return pair.label if pair.image_0 == image else 1 - pair.label


def write_images(folder: Path, names: Sequence[str]) -> None:
    """Write files whose content is their name; readers do not decode them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def write_json(path: Path, rows: Sequence[Mapping[str, Any]], *, head: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + json.dumps(rows, indent=1, ensure_ascii=False).encode())
    return path


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path
