"""Pairs to vote on."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_pipeline.voting.ballot import Ballot
from tests.voting.helpers import BROKEN, COUNT, png, read

SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt", pa.string()),
        ("image_0", pa.binary()),
        ("image_1", pa.binary()),
        ("label", pa.float32()),
    ]
)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose image_0 is red and whose image_1 is blue; one has a file that is no image, one has no prompt."""
    rows = [
        {
            "pair_id": f"pair {number}/a",
            "prompt": f"prompt {number}",
            "image_0": png((200, 0, 0)),
            "image_1": png((0, 0, 200)),
            "label": 1.0,
        }
        for number in range(COUNT)
    ]
    rows[BROKEN]["image_1"] = b"no image"
    rows.append({**rows[0], "pair_id": "without images", "image_0": None})
    path = tmp_path_factory.mktemp("vote") / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path)
    return path


@pytest.fixture
def ballot(pairs: Path) -> Ballot:
    """All pairs."""
    return read(pairs)
