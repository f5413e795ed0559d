"""A vision model that rates images in words: UnifiedReward 2.0 (arXiv 2503.05236) or any other, on a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import numpy as np
from PIL import Image

from smpo_common.errors import one_line
from smpo_common.files import sha256_json
from smpo_pipeline.rewards.base import Needs, Scored
from smpo_pipeline.served.address import Address
from smpo_pipeline.served.client import NoAnswerError
from smpo_pipeline.served.reward import ServedReward
from smpo_pipeline.served.unified_reward import UnreadableAnswerError, rating_question, read_ratings
from smpo_pipeline.served.vision_model import Question, VisionAddress, VisionModel
from smpo_schemas.reject_kinds import RejectKind


class Judge(ServedReward):
    """The model's rating for alignment with the prompt, coherence or style, or the mean of the three.

    Each image is asked about once, at temperature 0; rewards for several axes share the answers.
    """

    name: ClassVar[str] = "judge"
    unit: ClassVar[str] = "rating from 1 to 5"
    # Several chunks at once, so that the last requests of one leave no gap; the model limits the requests.
    needs: ClassVar[Needs] = Needs(threads=4, remote=True)
    address: ClassVar[type[Address]] = VisionAddress

    def __init__(self, model: str | None, device: str) -> None:  # noqa: ARG002
        self._address = cast("VisionAddress", self.parse(model))
        self._model = VisionModel(f"--reward {self.name}", self._address)
        self.model = self._model.identity["model"]
        self.fingerprint = sha256_json([self._model.identity, self._address.axis, rating_question("")])

    def score_with_reasons(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scored:
        """See the base class.

        Raises:
            UserError: the server cannot be reached or refuses all requests, or the budget is used up.
        """
        pairs = zip(images, prompts, strict=True)
        answers = self._model.ask_all([Question(rating_question(prompt), [image]) for image, prompt in pairs])
        values, reasons = np.full(len(answers), np.nan), {}
        for position, answer in enumerate(answers):
            if isinstance(answer, NoAnswerError):
                reasons[position] = f"{RejectKind.NO_ANSWER}: {answer}"
                continue
            try:
                values[position] = self._address.score(read_ratings(answer))
            except UnreadableAnswerError as error:
                reasons[position] = f"{RejectKind.ANSWER_NOT_READABLE}: {one_line(str(error))}"
        return Scored(values, reasons)
