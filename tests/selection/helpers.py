"""Candidates and their scores tables, in the layout of ``generate`` and ``score``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smpo_pipeline.selection.methods import Candidates
from smpo_schemas.generation.candidates import CANDIDATES_FILE, CANDIDATES_SCHEMA
from smpo_schemas.pairs import image_id
from smpo_schemas.rejects import write_rejects
from tests.calibration.helpers import write_scores

Image = Callable[[str, int], bytes]

PROMPTS = {
    "a cat": [(2.0, 1.0), (1.0, 2.0), (0.0, 0.0), (-1.0, 3.0)],
    "a dog": [(0.0, 0.0), (1.0, 0.5), (0.5, 2.0)],
    "alone": [(1.0, 1.0)],
    "equal": [(1.0, 1.0), (1.0, 1.0)],
    "two": [(1.0, 0.0), (3.0, 1.0)],
}


def image_of(prompt: str, index: int) -> bytes:
    """Bytes that stand for an image file; ``select`` decodes none."""
    return f"{prompt}/{index}".encode()


def sides(count: int) -> list[tuple[int, int]]:
    """Rows of a prompt's images: 2j and 2j + 1; an odd last one beside its neighbour, a single one beside itself."""
    rows = [(index, index + 1) for index in range(0, count - 1, 2)]
    return rows + [(max(0, count - 2), count - 1)] * (count % 2)


def make_candidates(
    folder: Path,
    prompts: Mapping[str, Sequence[Sequence[float]]],
    names: Sequence[str] = ("a", "b"),
    *,
    order: Sequence[int] | None = None,
    swap: bool = False,
    image: Image = image_of,
    row_group_size: int = 3,
) -> tuple[Path, Path]:
    """Write ``candidates`` and ``scores``.

    Args:
        folder: for both.
        prompts: scores of each image by each reward, by prompt.
        names: of the rewards.
        order: of the rows.
        swap: exchange image_0 and image_1 in every row.
        image: makes the files.
        row_group_size: of the Parquet file.
    """
    rows: list[dict[str, Any]] = []
    for prompt, scores in prompts.items():
        for row, pair in enumerate(sides(len(scores))):
            zero, one = reversed(pair) if swap else pair
            rows.append(
                {
                    "pair_id": hashlib.sha256(f"{prompt}{row}".encode()).hexdigest()[:32],
                    "prompt": prompt,
                    "image_0": image(prompt, zero),
                    "image_1": image(prompt, one),
                    "label": None,
                    "noise_0": {"seed": 7, "index": zero, "shape": [4, 8, 8]},
                    "noise_1": {"seed": 7, "index": one, "shape": [4, 8, 8]},
                    "model": "fingerprint",
                    "row": len(rows),
                    "scores": (scores[zero], scores[one]),
                }
            )
    rows = [rows[position] for position in order or range(len(rows))]
    values = {
        name: np.array([[side[k] for side in row["scores"]] for row in rows], dtype=float)
        for k, name in enumerate(names)
    }
    scored = write_scores(
        folder / "scores",
        values,
        [None] * len(rows),
        [row["prompt"] for row in rows],
        images=[(image_id(row["image_0"]), image_id(row["image_1"])) for row in rows],
        pair_ids=[row["pair_id"] for row in rows],
    )
    (folder / "candidates").mkdir()
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("pair_id", "prompt")),
            *((name, pa.binary()) for name in ("image_0", "image_1")),
            ("label", pa.float32()),
            *(CANDIDATES_SCHEMA.field(name) for name in ("noise_0", "noise_1")),
            ("model", pa.string()),
            ("row", pa.int64()),
        ]
    )
    table = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "scores"} for row in rows], schema=schema)
    pq.write_table(table, folder / "candidates" / "candidates-000000.parquet", row_group_size=row_group_size)
    write_rejects(folder / "candidates" / "rejected.parquet", [])
    (folder / "candidates" / CANDIDATES_FILE).touch()
    return folder / "candidates", scored


def rows_of(out: Path) -> dict[str, dict]:
    """The selected pairs by prompt, one of each."""
    rows = pq.read_table(out / "pairs.parquet").to_pylist()
    assert len({row["prompt"] for row in rows}) == len(rows)
    return {row["prompt"]: row for row in rows}


def win_rates(scores: Sequence[float], scale: float = 1.0) -> list[float]:
    """CaPO's calibrated reward, one image at a time."""
    if len(scores) == 1:
        return [0.5]
    return [
        float(np.mean([1 / (1 + np.exp(-(one - other) / scale)) for j, other in enumerate(scores) if j != i]))
        for i, one in enumerate(scores)
    ]


def candidates(scores_NK: Sequence[Sequence[float]], seed: int = 0, **changes: Any) -> Candidates:
    """The images of one prompt, with hashes "00", "01", ... and scores that are log-odds."""
    scores = np.array(scores_NK, dtype=float)
    count, rewards = scores.shape
    rates = np.stack([win_rates(column) for column in scores.T.tolist()], axis=1)
    values: dict[str, Any] = {
        "prompt": "a cat",
        "image_ids": [f"{index:02d}" for index in range(count)],
        "rewards": [f"r{k}" for k in range(rewards)],
        "weights": [1 / rewards] * rewards,
        "scores_NK": scores,
        "rates_NK": rates,
        "stream": np.random.default_rng(seed),
    }
    return Candidates(**{**values, **changes})
