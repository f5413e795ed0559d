"""Pairs with images of two kinds, and their scores table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from smpo_schemas.pairs import image_id
from tests.calibration.helpers import write_scores
from tests.pictures import encode


def tinted(kind: int, seed: int) -> bytes:
    """A noisy picture that is reddish (0) or bluish (1)."""
    stream = np.random.default_rng([kind, seed])
    pixels = stream.integers(0, 120, (32, 32, 3))
    pixels[..., 2 * kind] += 100
    return encode(Image.fromarray(pixels.astype(np.uint8)), "PNG")


def make_pairs(folder: Path, kinds: list[tuple[int, int]], labels: list[float | None], prompts: list[str]) -> Path:
    """Write ``pairs.parquet``: pair N has images of these kinds, label and prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "pair_id": f"p{number}",
            "prompt": prompts[number],
            "image_0": tinted(first, 2 * number),
            "image_1": tinted(second, 2 * number + 1),
            "label": labels[number],
        }
        for number, (first, second) in enumerate(kinds)
    ]
    path = folder / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def make_scores(folder: Path, pairs: Path, columns: dict[str, list] | None = None, order=None) -> Path:
    """Write the pairs' scores table, with further columns, its rows in an ``order`` of their own."""
    rows = pq.read_table(pairs).to_pylist()
    order = list(range(len(rows))) if order is None else list(order)
    rows = [rows[number] for number in order]
    write_scores(
        folder,
        {"one": np.arange(2.0 * len(rows)).reshape(-1, 2)},
        [row["label"] for row in rows],
        [row["prompt"] for row in rows],
        images=[(image_id(row["image_0"]), image_id(row["image_1"])) for row in rows],
        pair_ids=[row["pair_id"] for row in rows],
    )
    (part,) = folder.glob("scores-*.parquet")
    table = pq.read_table(part)
    for name, values in (columns or {}).items():
        table = table.append_column(name, pa.array([values[number] for number in order]))
    pq.write_table(table, part)
    return folder
