"""People against each other: each annotator's agreement with a p, and labels of one pair by several."""

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
    """Two labels of one pair, over all such twos.

    Attributes:
        alike: both prefer the same image.
        decided: both prefer an image.
        with_tie: at least one is a tie.
    """

    alike: int = 0
    decided: int = 0
    with_tie: int = 0


@dataclass(frozen=True)
class AnnotatorAgreement:
    """How people agree where a pair was labelled more than once.

    Attributes:
        pairs: such pairs.
        others: labels by different people; one who is not named counts as another.
        selves: labels by the same person.
    """

    pairs: int
    others: Repeats
    selves: Repeats


def by_annotator(data: LabelledPairs, p_P: np.ndarray, most: int) -> dict[str, tuple[int, int]]:
    """Per annotator, of the ``most`` with the most decided labels: labels ordered as p does, and decided labels."""
    decided = data.decided
    counts = Counter(name for name, counted in zip(data.annotators, decided, strict=True) if counted and name)
    names = np.array([name or "" for name in data.annotators], dtype=object)
    return {
        name: agreement(p_P[decided & (names == name)], data.labels_P[decided & (names == name)])
        for name, _ in counts.most_common(most)
    }


def between_annotators(data: LabelledPairs) -> AnnotatorAgreement:
    """Compare all labels of the same pair.

    The same pair has the same prompt and the same two images, whichever comes first; where the table does not name
    its images, the same pair_id.
    """
    groups: dict[object, list[tuple[float, str | None]]] = defaultdict(list)
    images_P2 = data.pairs.images_P2
    for row in np.flatnonzero(data.labelled).tolist():
        label = float(data.labels_P[row])
        key: object = data.pair_ids[row]
        if images_P2 is not None:
            first, second = (str(name) for name in images_P2[row])
            key = (data.prompts[row], *sorted((first, second)))
            label = label if first <= second else 1 - label
        groups[key].append((label, data.annotators[row]))
    repeated = [labels for labels in groups.values() if len(labels) > 1]
    others: list[tuple[float, float]] = []
    selves: list[tuple[float, float]] = []
    for labels in repeated:
        for (one, who), (other, whom) in itertools.combinations(labels, 2):
            (selves if who is not None and who == whom else others).append((one, other))
    return AnnotatorAgreement(len(repeated), _count(others), _count(selves))


def _count(twos: list[tuple[float, float]]) -> Repeats:
    decided = [(one, other) for one, other in twos if TIE not in (one, other)]
    alike = sum((one > TIE) == (other > TIE) for one, other in decided)
    return Repeats(alike=alike, decided=len(decided), with_tie=len(twos) - len(decided))
