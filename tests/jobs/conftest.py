from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pictures import all_kinds, encode, picture
from tests.tiny.stable_diffusion import make_tiny_clip, make_tiny_model

PROMPTS = ["a cat", "", "dog " * 500, "Größe 東京 🐈", "cat and dog"]


def pair_rows() -> list[dict]:
    """Pick-a-Pic v2 rows with real image bytes of all kinds, ties, and three rows that cannot be used."""
    kinds = all_kinds()
    rows = []
    for number, (name, data) in enumerate(kinds.items()):
        rows.append({"jpg_0": data, "jpg_1": encode(picture(64, 48, seed=number + 1)), "name": name})
    whole = encode(picture(200, 200))
    good = encode(picture())
    rows.insert(2, {"jpg_0": whole[: len(whole) // 2], "jpg_1": good, "name": "truncated"})
    rows.insert(7, {"jpg_0": good, "jpg_1": b"nonsense", "name": "nonsense"})
    rows.append({"jpg_0": good, "jpg_1": None, "name": "no image"})
    for number, row in enumerate(rows):
        row |= {
            "caption": PROMPTS[number % len(PROMPTS)],
            "label_0": (1.0, 0.0, 0.5)[number % 3],
            "label_1": (0.0, 1.0, 0.5)[number % 3],
            "ranking_id": 1000 + number,
            "user_id": number % 4,
        }
    return rows


REJECTED_IDS = {"1002", "1007"}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with ``pairs/*.parquet``, ``model`` and two reward models."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "pairs").mkdir()
    rows = pair_rows()
    for part, some in enumerate((rows[:9], rows[9:])):
        pq.write_table(pa.Table.from_pylist(some), folder / "pairs" / f"part-{part}.parquet", row_group_size=4)
    make_tiny_model(folder / "model")
    make_tiny_clip(folder / "pickscore", seed=0)
    make_tiny_clip(folder / "clipscore", seed=1)
    return folder
