"""The interface of a pairwise judge."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from smpo_common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class JudgedImage:
    """An image that a judge compares with another one of its prompt.

    Attributes:
        image_id: hash of its file's content.
        scores: raw scores by reward name.
        load: returns its file; None if the judge needs no images.
    """

    image_id: str
    scores: Mapping[str, float]
    load: Callable[[], bytes] | None = None

    def file(self) -> bytes:
        """Return the encoded image file.

        Raises:
            RuntimeError: the judge's class has ``needs_images = False``.
        """
        if self.load is None:
            raise RuntimeError("needs_images is False, so this judge gets no images")
        return self.load()

    def pixels(self) -> Image.Image:
        """Decode the image, upright and in RGB.

        Raises:
            ImageRejectedError: it cannot be decoded.
        """
        from PIL import Image  # noqa: PLC0415  (keeps --help quick)

        from smpo_pipeline.images.decoder import worker_decoder  # noqa: PLC0415

        return Image.fromarray(worker_decoder().decode(self.file()))


class PairwiseJudge(ABC):
    """Says which of two images of a prompt is better.

    Attributes:
        name: the value of ``--judge``.
        summary: for the help of ``--judge``; a judge of your own needs none.
        needs_images: whether it looks at the images; False if their scores are enough.
        concurrency: threads that may call ``compare`` at once.
        weights: the rewards' shares, by name, which sum to 1.
        scales: what a difference of each reward's raw scores is divided by.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    needs_images: ClassVar[bool] = True
    concurrency: int = 1

    def __init__(self, weights: Mapping[str, float], scales: Mapping[str, float], model: str | None = None) -> None:
        """Keep the rewards of the command line; a judge of your own may ignore them.

        Args:
            weights: the rewards' shares.
            scales: of the rewards.
            model: MODEL of ``--judge NAME=MODEL``.

        Raises:
            UserError: the judge takes no MODEL.
        """
        if model:
            raise UserError(f"--judge {self.name}={model}: this judge takes no model")
        self.weights, self.scales = weights, scales

    @classmethod
    def recorded(cls, model: str) -> str:
        """Return MODEL without what affects no answer, for the record of the selection."""
        return model

    @abstractmethod
    def compare(self, first: JudgedImage, second: JudgedImage, prompt: str) -> float:
        """Return P(first preferred), from 0 to 1.

        Raises:
            RuntimeError: these images cannot be compared; the prompt is rejected.
        """


class Verdict(NamedTuple):
    """A comparison in both orders.

    Attributes:
        first: P(first preferred), the mean of both orders, so that a judge's bias towards one position cancels.
        shown_first: the mean preference for the image that was shown first; 0.5 without a bias.
    """

    first: float
    shown_first: float


def in_both_orders(judge: PairwiseJudge, first: JudgedImage, second: JudgedImage, prompt: str) -> Verdict:
    """Ask a judge in both orders.

    Raises:
        UserError: compare failed, or an answer is not a probability.
    """
    try:
        forward, backward = (judge.compare(*images, prompt) for images in ((first, second), (second, first)))
    except (TypeError, ValueError) as error:
        raise UserError(f"--judge {judge.name}: compare failed: {error}") from error
    for answer in (forward, backward):
        if not (isinstance(answer, Real) and math.isfinite(answer) and 0 <= answer <= 1):
            raise UserError(f"--judge {judge.name}: compare returned {answer!r}; expected a number from 0 to 1")
    return Verdict((forward + 1 - backward) / 2, (forward + backward) / 2)
