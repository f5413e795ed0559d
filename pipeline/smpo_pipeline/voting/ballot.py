"""The pairs to vote on, as an annotator sees them: image files of unknown origin become pictures for a browser."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Literal, Self

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_pipeline.generation.encoding import encode_image
from smpo_pipeline.images.decode import ImageRejectedError
from smpo_pipeline.images.decoder import Decoder
from smpo_pipeline.images.image_store import ImageStore
from smpo_schemas.pairs import PairRejectedError, ReadingChoices, layouts_of, list_pair_files, read_rows, slice_files

Side = Literal["left", "right"]

_MEMORY = 256 << 20
_PICTURES = 16
"""Encoded pictures that are kept: those of this pair and the next, of a few annotators."""


@dataclass(frozen=True)
class BallotPair:
    """A pair's id, prompt, and the numbers of its image files."""

    pair_id: str
    prompt: str
    images: tuple[int, int]


class Ballot:
    """Pairs in the order of the data, with their images; safe to use from several threads.

    Attributes:
        pairs: those that can be voted on, by id.
        left_out: why other rows or pairs cannot, by their place in the data.
    """

    def __init__(self, seed: int) -> None:
        """Make an empty ballot; ``seed`` decides the sides on which images are shown."""
        self.pairs: dict[str, BallotPair] = {}
        self.left_out: dict[str, str] = {}
        self._seed = seed
        self._store = ImageStore(_MEMORY)
        self._decoder, self._lock = Decoder(), Lock()
        self._picture = lru_cache(_PICTURES)(self._encode)

    @classmethod
    def read(
        cls,
        paths: Sequence[AnyPath],
        choices: ReadingChoices,
        *,
        limit: int,
        seed: int,
        advance: Callable[[int, int], None],
    ) -> Self:
        """Read the first ``limit`` rows; a repeated pair counts once.

        Args:
            paths: files or folders of pairs.
            choices: what flags say about reading them.
            limit: number of rows.
            seed: of the sides on which images are shown.
            advance: called with the number of rows read so far and of rows to read.

        Raises:
            UserError: a path cannot be read, or holds no usable pair.
        """
        ballot = cls(seed)
        files = list_pair_files(paths, choices)
        layouts = layouts_of(files)
        total = min(limit, sum(file.rows for file in files))
        done = 0
        for rows in (rows for unit in slice_files(files, total, limit) for rows in unit):
            for source, pair in read_rows(rows, layouts[rows.path]):
                if isinstance(pair, PairRejectedError):
                    ballot.left_out[source] = str(pair)
                elif pair.pair_id not in ballot.pairs:
                    ballot._add(pair.pair_id, pair.prompt, (pair.image_0, pair.image_1))
                done += 1
                advance(done, total)
        if not ballot.pairs:
            raise UserError(
                f"--pairs {paths[0]}: no usable pair among {total} rows: {next(iter(ballot.left_out.values()))}"
            )
        return ballot

    def _add(self, pair_id: str, prompt: str, images: tuple[bytes, bytes]) -> None:
        first = 2 * len(self.pairs)
        self.pairs[pair_id] = BallotPair(pair_id, prompt, (first, first + 1))
        for number, data in enumerate(images, start=first):
            self._store.put(number, data)

    def image_on(self, side: Side, pair_id: str, annotator: str) -> Literal[0, 1]:
        """Return which image of a pair an annotator sees on a side, drawn by seed, pair and annotator."""
        digest = hashlib.sha256(f"side {self._seed} {pair_id} {annotator}".encode()).digest()
        return 1 if (digest[0] % 2 == 1) == (side == "left") else 0

    def picture(self, pair_id: str, image: Literal[0, 1]) -> bytes:
        """Return an image of a pair as PNG.

        Raises:
            KeyError: the pair is not on the ballot.
            ImageRejectedError: the file is not a usable image.
        """
        with self._lock:
            return self._picture(self.pairs[pair_id].images[image])

    def is_usable(self, pair_id: str) -> bool:
        """Whether both images can be shown; if not, remember why."""
        if pair_id in self.left_out:
            return False
        try:
            self.picture(pair_id, 0)
            self.picture(pair_id, 1)
        except ImageRejectedError as reason:
            self.left_out[pair_id] = str(reason)
            return False
        return True

    def _encode(self, number: int) -> bytes:
        return encode_image(self._decoder.decode(self._store.get(number)), "png")
