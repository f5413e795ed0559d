"""A vision model on a server that compares two images: UnifiedReward 2.0 (arXiv 2503.05236) or any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from smpo_common.errors import UserError
from smpo_pipeline.selection.judges.base import JudgedImage, PairwiseJudge
from smpo_pipeline.served.unified_reward import comparison_question, read_comparison
from smpo_pipeline.served.vision_model import Question, VisionAddress, VisionModel


class VlmJudge(PairwiseJudge):
    """P(first preferred) is the first image's share for alignment, coherence or style, or the mean of the three."""

    name: ClassVar[str] = "vlm"
    summary: ClassVar[str] = "a vision model on a server, as vlm=http://HOST:PORT/v1"

    def __init__(self, weights: Mapping[str, float], scales: Mapping[str, float], model: str | None = None) -> None:
        super().__init__(weights, scales)
        if not model:
            raise UserError("--judge vlm: give the server's address: vlm=http://HOST:PORT/v1")
        self._address = VisionAddress.parse(f"--judge vlm={model}", model)
        self._model = VisionModel("--judge vlm", self._address)
        self.concurrency = self._address.concurrency

    @classmethod
    def recorded(cls, model: str) -> str:
        """See the base class."""
        address = VisionAddress.parse(f"--judge vlm={model}", model)
        named = f",model={address.model}" if address.model else ""
        return f"{address.url}{named},axis={address.axis}"

    def compare(self, first: JudgedImage, second: JudgedImage, prompt: str) -> float:
        """See the base class."""
        question = Question(comparison_question(prompt), [first.pixels(), second.pixels()])
        return self._address.score(read_comparison(self._model.ask(question)))
