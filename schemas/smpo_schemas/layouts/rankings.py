"""Rankings of several images of a prompt: every two of the images are a pair.

Equal ranks are a tie. A hash of the pair decides which image is image_0, as for chosen and rejected images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar

import pyarrow as pa

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath, StorePath
from smpo_schemas.labels import TIE
from smpo_schemas.pairs.columns import PairColumns
from smpo_schemas.pairs.layout import FURTHER, ListedLayout
from smpo_schemas.pairs.normalising import PairRejectedError, is_unicode
from smpo_schemas.pairs.raw_rows import RawRow

_PAIRS = pa.schema(
    [
        ("prompt", pa.string()),
        ("one", pa.string()),
        ("other", pa.string()),
        ("label", pa.float32()),
        ("votes", pa.int32()),
        ("category", FURTHER["category"]),
    ]
)

_PARENTS = 3
"""Number of folders from the JSON of a part up to the root of ImageRewardDB, which its paths start from."""

_MOST_IMAGES = 256
"""Largest number of images of a prompt: their pairs are listed in memory. The published rankings have up to 9."""


class _Rankings(ListedLayout):
    columns: PairColumns = PairColumns("prompt", None, None, "label", chosen="one", rejected="other", votes="votes")


class ImageRewardDB(_Rankings):
    """ImageRewardDB (arXiv 2304.05977): one row per image, with its rank among those of its prompt; 1 is best."""

    name: ClassVar[str] = "image-reward-db"
    data_sets: ClassVar[str] = "zai-org/ImageRewardDB, `images/*/*/*.json` or `metadata-*.parquet`"
    in_two_formats: ClassVar[bool] = True
    required: ClassVar[tuple[str, ...]] = ("image_path", "prompt_id", "prompt", "rank")
    optional: ClassVar[tuple[str, ...]] = ("classification",)
    further: Sequence[str] = ("category",)
    derived: Mapping[str, str] = {
        "chosen": "image_path of one image",
        "rejected": "image_path of another of its prompt_id",
        "label": "both ranks",
    }

    def list_pairs(self, rows: Iterator[RawRow]) -> pa.Table:
        """See the base class."""
        prompts: dict[Any, list[Mapping[str, Any]]] = {}
        for number, row in enumerate(rows):
            if isinstance(row, PairRejectedError) or not isinstance(row.get("prompt_id"), (str, int)):
                raise UserError(f"{self.path}: row {number} has no prompt_id, so it is in no ranking")
            prompts.setdefault(row["prompt_id"], []).append(row)
        pairs = [
            {
                "prompt": _text(one.get("prompt")),
                "one": _text(one.get("image_path")),
                "other": _text(other.get("image_path")),
                "label": _share([(one.get("rank"), other.get("rank"))])[0],
                "category": _text(one.get("classification")),
            }
            for images in prompts.values()
            for one, other in _pairs_of(images, self.path)
        ]
        return pa.Table.from_pylist(pairs, schema=_PAIRS)

    def image_folders(self) -> list[AnyPath]:
        """See the base class."""
        folders = [self.folder]
        while len(folders) <= _PARENTS and not isinstance(folders[-1], StorePath):
            folders.append(folders[-1].parent)
        return folders


class HPDv2Rankings(_Rankings):
    """HPDv2's ``test.json``: a row has the images of a prompt, their ranks, and each annotator's ranks; 1 is best."""

    name: ClassVar[str] = "hpdv2-rankings"
    data_sets: ClassVar[str] = "ymhao/HPDv2, `test.json`"
    required: ClassVar[tuple[str, ...]] = ("prompt", "image_path", "rank")
    optional: ClassVar[tuple[str, ...]] = ("raw_annotations",)
    derived: Mapping[str, str] = {
        "chosen": "image_path[i]",
        "rejected": "image_path[j]",
        "label": "the share of raw_annotations that rank i before j, else rank",
        "votes": "the number of raw_annotations",
    }

    def list_pairs(self, rows: Iterator[RawRow]) -> pa.Table:
        """See the base class."""
        pairs: list[dict[str, Any]] = []
        for number, row in enumerate(rows):
            known = {} if isinstance(row, PairRejectedError) else row
            paths, ranks = known.get("image_path"), known.get("rank")
            if not (isinstance(paths, list) and isinstance(ranks, list) and _are_ranks(ranks, len(paths))):
                raise UserError(f"{self.path}: row {number} has no list of image paths with a rank for each")
            annotations = known.get("raw_annotations")
            annotations = annotations if isinstance(annotations, list) else []
            people = [each.get("rank") for each in annotations if isinstance(each, Mapping)]
            given = [each for each in people if isinstance(each, list) and _are_ranks(each, len(paths))]
            for i, j in _pairs_of(range(len(paths)), self.path):
                label, votes = _share([(ranks_N[i], ranks_N[j]) for ranks_N in given or [ranks]])
                pairs.append(
                    {
                        "prompt": _text(known.get("prompt")),
                        "one": _text(paths[i]),
                        "other": _text(paths[j]),
                        "label": label,
                        "votes": votes if given else None,
                    }
                )
        return pa.Table.from_pylist(pairs, schema=_PAIRS)

    def image_folders(self) -> list[AnyPath]:
        """See the base class."""
        return [self.folder, self.folder / "test"]


def _pairs_of(images: Sequence[Any], path: AnyPath) -> Iterator[tuple[Any, Any]]:
    """Pair each of a prompt's images with each other.

    Raises:
        UserError: there are more images than a ranking has.
    """
    if len(images) > _MOST_IMAGES:
        raise UserError(f"{path} has {len(images)} images of one prompt; a ranking has at most {_MOST_IMAGES}")
    return combinations(images, 2)


def _are_ranks(values: list[Any], count: int) -> bool:
    return len(values) == count and all(isinstance(rank, (int, float)) for rank in values)


def _share(ranks: Sequence[tuple[Any, Any]]) -> tuple[float | None, int]:
    """Return the share of rankings in which the first of two images has the smaller rank, and their number."""
    known = [(one, other) for one, other in ranks if isinstance(one, (int, float)) and isinstance(other, (int, float))]
    points = [TIE if one == other else float(one < other) for one, other in known]
    return (sum(points) / len(points) if points else None), len(points)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and is_unicode(value) else None
