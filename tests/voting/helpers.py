"""What the tests of the server and of the page share."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from smpo_pipeline.voting.ballot import Ballot
from smpo_schemas.pairs import ReadingChoices

COUNT = 34
BROKEN = 3
"""Number of the pair with a file that is no image."""


def png(colour: tuple[int, int, int]) -> bytes:
    """An image of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), colour).save(buffer, "PNG")
    return buffer.getvalue()


def read(pairs: Path, limit: int = 1000, seed: int = 0) -> Ballot:
    """Read a ballot, without progress."""
    return Ballot.read([pairs], ReadingChoices(), limit=limit, seed=seed, advance=lambda _done, _total: None)


def is_red(picture: bytes) -> bool:
    """Whether a picture is an image_0."""
    red, _, blue = Image.open(io.BytesIO(picture)).convert("RGB").getpixel((0, 0))
    return red > blue


def rows(path: Path) -> list[dict]:
    """The rows of a file of votes."""
    return pq.read_table(path).to_pylist()
