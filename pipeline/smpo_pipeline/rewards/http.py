"""A reward that another program computes, in an environment of its own: images and prompts are sent, scores come back.

The request is a POST of ``{"prompts": [...], "images": [...]}`` with PNG files in base64, the answer
``{"scores": [...]}`` with one number per image, or null for an image that cannot be scored. A GET of the same address
may answer ``{"fingerprint": "..."}``; otherwise the address stands for the weights.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from smpo_common.errors import UserError
from smpo_pipeline.rewards.base import Scored
from smpo_pipeline.served.client import JsonClient, TimedOutError
from smpo_pipeline.served.reward import ServedReward
from smpo_schemas.reject_kinds import RejectKind


class Http(ServedReward):
    """The server's score."""

    name: ClassVar[str] = "http"
    unit: ClassVar[str] = "the server's"

    def __init__(self, model: str | None, device: str) -> None:  # noqa: ARG002
        address = self.parse(model)
        self._what = f"--reward {self.name}"
        self._client = JsonClient(self._what, address.timeout)
        self.model = address.url
        about = self._client.get(self.model)
        given = about.get("fingerprint") if isinstance(about, dict) else None
        self.fingerprint = given if isinstance(given, str) and given else self.model

    def score_with_reasons(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scored:
        """See the base class.

        Raises:
            UserError: the server cannot be reached or is too slow, or the answer is not one score per image.
            NoAnswerError: the server fails on these images.
        """
        body = {"prompts": list(prompts), "images": [_png(image) for image in images]}
        try:
            answer = self._client.post(self.model, body)
        except TimedOutError as error:
            help_ = "use a smaller --batch-size, or the option timeout=SECONDS"
            raise UserError(f"{self._what}: {error}; {help_}") from error
        return self._read(answer, len(images))

    def _read(self, answer: Any, count: int) -> Scored:  # noqa: ANN401  (any JSON value)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise UserError(f'{self._what}: {self.model} did not answer with {{"scores": [...]}}')
        if len(scores) != count:
            raise UserError(f"{self._what}: {self.model} answered {len(scores)} scores for {count} images")
        values, reasons = np.full(count, np.nan), {}
        for position, score in enumerate(scores):
            if score is None:
                reasons[position] = f"{RejectKind.NO_ANSWER}: {self.model} has no score for this image"
            elif isinstance(score, bool) or not isinstance(score, (int, float)):
                raise UserError(f"{self._what}: {self.model} answered {score!r:.50} as a score; expected a number")
            elif not math.isfinite(score):
                reasons[position] = f"{RejectKind.NOT_FINITE}: the score from {self.model} is {score}"
            else:
                values[position] = score
        return Scored(values, reasons)


def _png(image: Image.Image) -> str:
    """Encode an image without loss, in base64."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")
