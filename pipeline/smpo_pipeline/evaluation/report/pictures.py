"""Embed pictures as data URIs, at the largest size at which the page still opens quickly."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

_SIDES = (1024, 768, 512, 384, 256)
"""Longest sides in pixels that pictures are reduced to."""
_BUDGET = 64_000_000
"""Characters that all data URIs of a page may have together."""
_SAMPLE = 24  # pictures whose size at a side is measured
_SMALL_SIDE = 128
"""Pictures up to this side are embedded losslessly and enlarged without smoothing."""
_QUALITY = 85


@dataclass(frozen=True)
class Embedded:
    """A picture in the page: its data URI, the original's width and height, whether to enlarge without smoothing."""

    uri: str
    size: tuple[int, int]
    hard_pixels: bool


@dataclass(frozen=True)
class Pictures:
    """All pictures of a page, by file; ``side``: the longest side in pixels that they were reduced to."""

    side: int
    by_path: dict[Path, Embedded]

    @property
    def reduced(self) -> int:
        """Number of pictures that are smaller than their originals."""
        return sum(max(each.size) > self.side for each in self.by_path.values())


def embed_all(paths: Iterable[Path], budget: int = _BUDGET) -> Pictures:
    """Embed each picture once, all reduced to the largest side with which they fit the budget, as a sample says.

    Args:
        paths: the pictures.
        budget: characters of all data URIs together; the smallest side is taken where none fits.
    """
    distinct = sorted(set(paths))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        side = _choose_side(distinct, budget, threads)
        embedded = threads.map(lambda path: embed(path, side), distinct)
        return Pictures(side, dict(zip(distinct, embedded, strict=True)))


def _choose_side(paths: Sequence[Path], budget: int, threads: ThreadPoolExecutor) -> int:
    sample = paths[:: max(1, len(paths) // _SAMPLE)]
    for side in _SIDES[:-1]:
        length = sum(len(each.uri) for each in threads.map(lambda path, side=side: embed(path, side), sample))
        if length * len(paths) <= budget * len(sample):
            return side
    return _SIDES[-1]


def embed(path: Path, side: int) -> Embedded:
    """Encode a picture, reduced to at most ``side`` pixels: as WebP, or losslessly as PNG if it is small."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    size, buffer = image.size, io.BytesIO()
    small = max(size) <= _SMALL_SIDE
    if small:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.thumbnail((side, side))
        image.save(buffer, format="WEBP", quality=_QUALITY)
    content = base64.b64encode(buffer.getvalue()).decode()
    return Embedded(f"data:image/{'png' if small else 'webp'};base64,{content}", size, small)
