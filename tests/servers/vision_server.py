"""A vision model on loopback, whose answers follow from the mean brightness of images; it can prefer a position."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from tests.servers.json_server import Answer, JsonServer, json_server

RATINGS = "Alignment Score (1-5): {:.4f}\nCoherence Score (1-5): {:.4f}\nStyle Score (1-5): {:.4f}"
SHARES = "{} Score:\n Image 1: {:.4f}\n Image 2: {:.4f}\n\n"


def grey(level: int) -> Image.Image:
    """A plain image, which JPEG keeps."""
    return Image.new("RGB", (16, 16), (level, level, level))


def content(body: Any) -> tuple[str, list[float]]:
    """The text of a question, which comes last, and the mean brightness of its images, from 0 to 1."""
    *images, text = body["messages"][0]["content"]
    files = [base64.b64decode(each["image_url"]["url"].removeprefix("data:image/jpeg;base64,")) for each in images]
    return text["text"], [float(np.asarray(Image.open(io.BytesIO(file))).mean() / 255) for file in files]


def completion(text: str | None) -> Answer:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def rate(body: Any) -> Answer:
    """Alignment 1 + 2 b, coherence 1 + 3 b, style 1 + 4 b of an image of brightness b."""
    (b,) = content(body)[1]
    return completion(RATINGS.format(1 + 2 * b, 1 + 3 * b, 1 + 4 * b))


def compare(bias: float = 0.0) -> Callable[[Any], Answer]:
    """The first image's share is 1/2 + half the difference of brightness + ``bias``, for all axes."""

    def answer(body: Any) -> Answer:
        first, second = content(body)[1]
        share = min(1.0, max(0.0, 0.5 + (first - second) / 2 + bias))
        return completion(
            "".join(SHARES.format(axis, share, 1 - share) for axis in ("Alignment", "Coherence", "Style"))
        )

    return answer


@contextmanager
def vision_server(on_post: Callable[[Any], Answer], *models: str) -> Iterator[JsonServer]:
    """Serve ``models``, by default one."""

    def listing(path: str) -> Answer:
        assert path == "/v1/models"
        return 200, {"data": [{"id": model, "root": f"owner/{model}"} for model in models or ("tiny",)]}

    with json_server(on_post, listing) as server:
        server.url += "/v1"
        yield server
