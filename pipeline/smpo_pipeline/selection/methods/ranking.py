"""Pairs by pairwise comparisons: the winner of a tournament against its last.

The winner so far meets the next image, so that N - 1 comparisons find it. Iterative pairwise ranking (arXiv 2411.05875)
compares instead of scoring, too; only its abstract was available, so this form is our own.

With one reward and its own scores as the judge this is the best image against the worst, as ``extremes`` finds it with
less work: the method is meant for judges that compare images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import ClassVar

from smpo_common.errors import UserError
from smpo_pipeline.selection.judges.base import in_both_orders
from smpo_pipeline.selection.methods.base import Candidates, NoPairError, Proposal, Rules, Selection
from smpo_schemas.reject_kinds import RejectKind

_UNDECIDED = 0.5


class Ranking(Selection):
    """Asks ``--judge`` for the best image and the worst of the others; further pairs come from the images left.

    The order of the images is drawn by (seed, prompt). The gap is 2 P(chosen over rejected) - 1.
    """

    name: ClassVar[str] = "ranking"
    summary: ClassVar[str] = "winner against last of a tournament of pairwise comparisons by --judge"
    flags: ClassVar[frozenset[str]] = frozenset({"loser", "judge"})

    def __init__(self, rules: Rules) -> None:
        super().__init__(rules)
        self.concurrency = rules.judge.concurrency if rules.judge else 1

    @property
    def needs_images(self) -> bool:
        """See the base class."""
        return self.rules.judge is not None and self.rules.judge.needs_images

    def propose(self, candidates: Candidates) -> Iterator[Proposal]:
        """See the base class."""
        judge = self.rules.judge
        if judge is None:
            raise UserError("--by ranking needs a --judge")

        @cache  # the winner and the last may have met
        def asked(first: int, second: int) -> float:
            """Return P(first preferred)."""
            images = candidates.judged(first), candidates.judged(second)
            verdict = in_both_orders(judge, *images, candidates.prompt)
            self.shown_first.append(verdict.shown_first)
            return verdict.first

        def better(first: int, second: int) -> float:
            """Return P(first preferred); asking in both orders makes the order of the two irrelevant."""
            return asked(first, second) if first < second else 1 - asked(second, first)

        left = candidates.stream.permutation(len(candidates.image_ids)).tolist()
        while len(left) > 1:
            chosen = _last_one_standing(left, better)
            left.remove(chosen)
            if self.rules.loser == "random":
                rejected = left[int(candidates.stream.integers(len(left)))]
            else:
                rejected = _last_one_standing(left, lambda first, second: better(second, first))
            left.remove(rejected)
            yield Proposal(chosen, rejected, 2 * better(chosen, rejected) - 1)

    def too_small(self, gap: float) -> NoPairError:
        """See the base class; a judge that contradicts itself may prefer the last to the winner."""
        return NoPairError(RejectKind.NO_CLEAR_ORDER) if gap <= 0 else super().too_small(gap)


def _last_one_standing(images: list[int], better: Callable[[int, int], float]) -> int:
    """Let the winner so far meet the next image; at 1/2 it stays."""
    winner = images[0]
    for image in images[1:]:
        if better(image, winner) > _UNDECIDED:
            winner = image
    return winner
