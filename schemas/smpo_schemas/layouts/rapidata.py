"""Rapidata's preference data sets: counts of votes, or shares weighted by the annotators' reliability."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_schemas.pairs.columns import PairColumns
from smpo_schemas.pairs.layout import Layout, ReadingChoices

_SHARE = "weighted_results_image"
_DETAILS = "detailed_results"
_MOST = 2**31
"""A result from this number on is invalid: numbers of votes are stored as int32."""


class Rapidata(Layout):
    """Shares by axis (``weighted_results_image1_preference``), or counts of votes of one question.

    The number of votes behind a share is that of its ``detailed_results``. Without votes on the axis a pair has no
    label.
    """

    name: ClassVar[str] = "rapidata"
    data_sets: ClassVar[str] = (
        "Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3, Rapidata/*_t2i_human_preference, "
        "Rapidata/open-image-preferences-v1-more-results"
    )
    uses: ClassVar[frozenset[str]] = frozenset({"axis"})
    required: ClassVar[tuple[str, ...]] = ("prompt", "image1", "image2")
    optional: ClassVar[tuple[str, ...]] = ("model1", "model2", "category")
    columns: PairColumns = PairColumns("prompt", "image1", "image2", "label", votes="votes")
    derived: dict[str, str]
    further: Sequence[str] = ("category", "model_0", "model_1")

    def __init__(self, path: AnyPath, names: Sequence[str], choices: ReadingChoices) -> None:
        """See the base class.

        Raises:
            UserError: the file has no results of the chosen axis.
        """
        super().__init__(path, names, choices)
        axes = _axes(names)
        axis = choices.axis or ("preference" if "preference" in axes else next(iter(axes), None))
        if choices.axis and axis not in axes:
            has = f"results for {', '.join(axes)}" if axes else "votes of one question, without a name"
            raise UserError(f"{path}: --axis {choices.axis}: this file has {has}")
        end = f"_{axis}" if axis else ""
        self._of_images = next(columns for columns in _results(end) if columns[0] in names)
        self.needs += [name for name in self._of_images if name in names]
        self.derived = {"label": " and ".join(self._of_images), "votes": "their sum"}
        self._details: str | None = None
        if self._of_images[0].startswith(_SHARE):
            self._details = f"{_DETAILS}{end}"
            known = self._details in names
            self.needs += [self._details] if known else []
            self.columns = replace(self.columns, votes="votes" if known else None)
            self.derived |= {"votes": f"the number of {self._details}"}

    @classmethod
    def recognises(cls, names: Collection[str]) -> bool:
        """See the base class."""
        ends = ["", *(f"_{axis}" for axis in _axes(names))]
        return super().recognises(names) and any(first[0] in names for end in ends for first in _results(end))

    def convert(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """See the base class."""
        first, second = _two_numbers([row.get(name) for name in self._of_images])
        total = first + second
        votes = int(total) if self._details is None else _count(row.get(self._details))
        return {
            **row,
            "label": first / total if total > 0 else None,
            "votes": votes if total > 0 else None,
            "model_0": row.get("model1"),
            "model_1": row.get("model2"),
        }


def _axes(names: Collection[str]) -> list[str]:
    start = f"{_SHARE}1_"
    return [name.removeprefix(start) for name in names if name.startswith(start)]


def _results(end: str) -> list[tuple[str, ...]]:
    """List the columns that may hold a question's results: one for each image, or a single one for both."""
    return [(f"{_SHARE}1{end}", f"{_SHARE}2{end}"), ("votes_image1", "votes_image2"), ("aggregated_results",)]


def _two_numbers(values: Sequence[object]) -> tuple[float, float]:
    """Return the results of both images, 0 where there are none; a single value is a mapping of two, or its JSON."""
    if len(values) == 1:
        found = _parse(values[0])
        values = list(found.values()) if isinstance(found, Mapping) else []
    good = [value for value in values if isinstance(value, (int, float)) and 0 <= value < _MOST]
    return (float(good[0]), float(good[1])) if len(good) == len(values) == 2 else (0.0, 0.0)  # noqa: PLR2004  (images)


def _count(details: object) -> int | None:
    """Count the votes in detailed results, a list or its JSON."""
    found = _parse(details)
    return len(found) if isinstance(found, list) and found else None


def _parse(value: object) -> object:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value
