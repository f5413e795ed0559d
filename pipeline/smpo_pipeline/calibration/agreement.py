"""Agreement of annotators with a predicted p, and with each other on pairs that were labelled more than once."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from smpo_pipeline.calibration.labels import LabelledPairs
from smpo_pipeline.calibration.measures import agreement
from smpo_schemas.labels import TIE


@dataclass(frozen=True)
class Repeats:
    """Counts of two labels of the same pair.

    Attributes:
        alike: both labels prefer the same image.
        decided: both labels prefer an image.
        with_tie: at least one label is a tie.
    """

    alike: int = 0
    decided: int = 0
    with_tie: int = 0


@dataclass(frozen=True)
class AnnotatorAgreement:
    """How people agree on pairs that were labelled more than once.

    Attributes:
        pairs: number of such pairs.
        others: labels by different people; an unnamed annotator counts as a different one.
        selves: labels by the same person.
    """

    pairs: int
    others: Repeats
    selves: Repeats


def by_annotator(data: LabelledPairs, p_P: np.ndarray, most: int) -> dict[str, tuple[int, int]]:
    """Count the decided labels that p agrees with, and all decided labels, of the ``most`` busiest annotators."""
    decided = data.decided
    counts = Counter(name for name, is_decided in zip(data.annotators, decided, strict=True) if is_decided and name)
    names = np.array([name or "" for name in data.annotators], dtype=object)
    return {
        name: agreement(p_P[decided & (names == name)], data.labels_P[decided & (names == name)])
        for name, _ in counts.most_common(most)
    }


def pair_keys(data: LabelledPairs, rows: np.ndarray) -> tuple[list[str], list[bool]]:
    """Return a key of each row's pair, and whether the row has its images in the other order than the key.

    Rows are the same pair if they have the same prompt and the same two images, in either order; if the table has no
    image hashes, if they have the same pair_id.
    """
    images_P2 = data.pairs.images_P2
    if images_P2 is None:
        return [data.pair_ids[row] for row in rows.tolist()], [False] * len(rows)
    images = [(str(first), str(second)) for first, second in images_P2[rows]]
    keys = ["/".join((*sorted(pair), data.prompts[row])) for row, pair in zip(rows.tolist(), images, strict=True)]
    return keys, [first > second for first, second in images]


def between_annotators(data: LabelledPairs) -> AnnotatorAgreement:
    """Compare all labels of the same pair (:func:`pair_keys`)."""
    groups: dict[str, list[tuple[float, str | None]]] = defaultdict(list)
    rows = np.flatnonzero(data.labelled)
    for row, key, turned in zip(rows.tolist(), *pair_keys(data, rows), strict=True):
        label = float(data.labels_P[row])
        groups[key].append((1 - label if turned else label, data.annotators[row]))
    repeated = [labels for labels in groups.values() if len(labels) > 1]
    others: list[tuple[float, float]] = []
    selves: list[tuple[float, float]] = []
    for labels in repeated:
        for (first_label, annotator), (second_label, other) in itertools.combinations(labels, 2):
            same = annotator is not None and annotator == other
            (selves if same else others).append((first_label, second_label))
    return AnnotatorAgreement(len(repeated), _count(others), _count(selves))


def _count(label_pairs: list[tuple[float, float]]) -> Repeats:
    decided = [labels for labels in label_pairs if TIE not in labels]
    alike = sum((first > TIE) == (second > TIE) for first, second in decided)
    return Repeats(alike=alike, decided=len(decided), with_tie=len(label_pairs) - len(decided))
