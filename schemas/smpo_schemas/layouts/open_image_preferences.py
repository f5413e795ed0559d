"""The individual answers behind open-image-preferences-v1, as Argilla exports them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from smpo_schemas.labels import TIE
from smpo_schemas.pairs.columns import PairColumns
from smpo_schemas.pairs.layout import Layout

_ANSWERS, _STATUS = "preference.responses", "preference.responses.status"
_POINTS = {"image_1": 1.0, "image_2": 0.0}
_ON_THE_HUB = re.compile(r"https?://[^/]+/datasets/[^/]+/[^/]+/(?:resolve|raw|blob)/[^/]+/")


class OpenImagePreferences(Layout):
    """A struct ``images`` of texts, and lists of answers: ``image_1``, ``image_2``, or else a tie.

    Images are URLs on the hub; files of the same names are looked for in ``--image-root``.
    """

    name: ClassVar[str] = "open-image-preferences"
    data_sets: ClassVar[str] = (
        "data-is-better-together/open-image-preferences-v1-results, with `--image-root` for the images of "
        "open-image-preferences-v1"
    )
    required: ClassVar[tuple[str, ...]] = ("images", _ANSWERS)
    optional: ClassVar[tuple[str, ...]] = (_STATUS, "id")
    columns: PairColumns = PairColumns("images.prompt", "image_1", "image_2", "label", pair_id="id", votes="votes")
    derived: Mapping[str, str] = {
        "image_0": "images.image_1",
        "image_1": "images.image_2",
        "label": f"the share of {_ANSWERS} for image_1, ties counting half",
        "votes": f"the number of {_ANSWERS}",
    }
    further: Sequence[str] = ("category", "model_0", "model_1")

    def convert(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """See the base class; answers that were not submitted do not count."""
        answers, status = (value if isinstance(value := row.get(name), list) else [] for name in (_ANSWERS, _STATUS))
        if len(status) == len(answers):
            answers = [answer for answer, each in zip(answers, status, strict=True) if each == "submitted"]
        points = [_POINTS.get(answer, TIE) for answer in answers if isinstance(answer, str)]
        images = row["images"] if isinstance(row.get("images"), Mapping) else {}
        return {
            **row,
            **{f"image_{side}": _local(images.get(f"image_{side}")) for side in (1, 2)},
            "label": sum(points) / len(points) if points else None,
            "votes": len(points) or None,
            "category": images.get("category"),
            "model_0": images.get("model_1"),
            "model_1": images.get("model_2"),
        }


def _local(value: object) -> object:
    return _ON_THE_HUB.sub("", value) if isinstance(value, str) else value
