"""The interface of a method of selection.

Shape suffixes: N distinct images of a prompt, K rewards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from smpo_pipeline.selection.judges.base import JudgedImage, PairwiseJudge
from smpo_schemas.reject_kinds import RejectKind


@dataclass(frozen=True)
class Candidates:
    """The distinct images of one prompt, in the order of their hashes.

    Attributes:
        prompt: the prompt.
        image_ids: [N] content hashes, increasing.
        rewards: names of the K rewards.
        weights: the rewards' shares, which sum to 1.
        scores_NK: float64, raw scores.
        rates_NK: float64 from 0 to 1, win rates against the prompt's other images, by each reward.
        stream: random numbers that depend on the run's seed and the prompt alone.
        load: returns the file of image i; only for a method that needs images.
    """

    prompt: str
    image_ids: Sequence[str]
    rewards: Sequence[str]
    weights: Sequence[float]
    scores_NK: np.ndarray
    rates_NK: np.ndarray
    stream: np.random.Generator
    load: Callable[[int], bytes] | None = None

    def mean_rates(self) -> np.ndarray:
        """Return the weighted mean of the rewards' win rates, float64 [N]."""
        # Not a matrix product, which may round equal rows differently.
        total_N = np.zeros(len(self.image_ids))
        for weight, rates_N in zip(self.weights, self.rates_NK.T, strict=True):
            total_N += weight * rates_N
        return total_N

    def judged(self, index: int) -> JudgedImage:
        """Return image ``index`` as a judge sees it."""
        scores = dict(zip(self.rewards, self.scores_NK[index].tolist(), strict=True))
        load = self.load
        return JudgedImage(self.image_ids[index], scores, None if load is None else lambda: load(index))


class Proposal(NamedTuple):
    """A pair of images by their numbers, and by how much the chosen one is better, from -1 to 1."""

    chosen: int
    rejected: int
    gap: float


class NoPairError(Exception):
    """A prompt gives no pair.

    Attributes:
        kind: kind of the reason.
        details: for the reason, or "".
    """

    def __init__(self, kind: RejectKind, details: str = "") -> None:
        super().__init__(kind)
        self.kind, self.details = kind, details


@dataclass(frozen=True)
class Rules:
    """The settings of a selection.

    Attributes:
        pairs_per_prompt: most pairs of a prompt.
        min_gap: smallest gap of a pair; None: the method's own.
        dominated_only: pareto only: the chosen image must be at least as good by every reward.
        loser: ranking only: which image is rejected.
        judge: ranking only.
    """

    pairs_per_prompt: int = 1
    min_gap: float | None = None
    dominated_only: bool = False
    loser: Literal["last", "random"] = "last"
    judge: PairwiseJudge | None = None


class Selection(ABC):
    """Chooses pairs among the images of a prompt; what it returns must not depend on the order of the input's rows.

    Attributes:
        name: the value of ``--by``.
        summary: one line for the help of ``--by``.
        flags: fields of :class:`Rules` that only some methods use, and this one does.
        any_gap: whether a pair may have a gap of 0 or less.
        rules: the settings.
        concurrency: threads that may call ``select`` at once, if it looks at images.
        shown_first: of each comparison by a judge, the preference for the image that was shown first.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    flags: ClassVar[frozenset[str]] = frozenset()
    any_gap: ClassVar[bool] = False

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.concurrency = 1
        self.shown_first: list[float] = []

    @property
    def needs_images(self) -> bool:
        """Whether it looks at the images themselves, not only at their scores."""
        return False

    @abstractmethod
    def propose(self, candidates: Candidates) -> Iterator[Proposal]:
        """Yield pairs, best first; there are at least two images.

        Raises:
            NoPairError: there is none.
        """

    def accepts(self, gap: float) -> bool:
        """Whether a pair with this gap may be used."""
        return (self.any_gap or gap > 0) and (self.rules.min_gap is None or gap >= self.rules.min_gap)

    def select(self, candidates: Candidates) -> list[Proposal]:
        """Return 1 to ``pairs_per_prompt`` pairs.

        Raises:
            NoPairError: there is none.
        """
        if len(candidates.image_ids) < 2:  # noqa: PLR2004  (a pair)
            raise NoPairError(RejectKind.ONE_IMAGE)
        proposals = list(islice(self.propose(candidates), self.rules.pairs_per_prompt))
        accepted = [proposal for proposal in proposals if self.accepts(proposal.gap)]
        if not accepted:
            raise self.too_small(max((proposal.gap for proposal in proposals), default=0.0))
        return accepted

    def too_small(self, gap: float) -> NoPairError:
        """Make the error for a prompt whose largest gap is this."""
        return NoPairError(RejectKind.GAP_TOO_SMALL, f"at most {gap:.4g}, --min-gap {self.rules.min_gap or 0:g}")
