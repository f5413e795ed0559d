"""Questions about images to a vision model behind OpenAI's chat interface (vLLM, SGLang, llama.cpp, hosted models)."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import Field, field_validator

from smpo_common.errors import UserError
from smpo_common.files import read_json, sha256_json, write_json
from smpo_pipeline.served.address import Address
from smpo_pipeline.served.client import BUSY, JsonClient, NoAnswerError

KEY_VARIABLE = "SMPO_JUDGE_API_KEY"
"""Environment variable with the key that is sent to the server, if it needs one."""

_JPEG_QUALITY = 95
"""As UnifiedReward's authors send images."""

_SAMPLING = {"temperature": 0, "max_tokens": 4096}
_RETRIED = BUSY | {HTTPStatus.INTERNAL_SERVER_ERROR}


class VisionAddress(Address):
    """A server of a vision model.

    Attributes:
        model: as the server lists it; None: the only one there.
        concurrency: requests at once, at most.
        budget: requests of this process, at most, retries included; None: any number.
        cache: folder of the answers so far, which are never asked for again; absolute, since workers have working
            directories of their own.
        axis: which of the three scores in an answer counts; ``mean`` is their mean.
    """

    model: str | None = None
    axis: Literal["mean", "alignment", "coherence", "style"] = "mean"
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    budget: Annotated[int, Field(ge=0)] | None = None
    cache: Path = Path("~/.cache/smpo-diffusion/answers")

    @field_validator("cache", mode="after")
    @classmethod
    def _check_cache(cls, cache: Path) -> Path:
        if not cache.expanduser().is_absolute():
            raise ValueError("give an absolute path, or one that begins with ~")
        return cache

    def score(self, scores: Mapping[str, float]) -> float:
        """Return the score of the axis, or the mean of all."""
        return sum(scores.values()) / len(scores) if self.axis == "mean" else scores[self.axis]


@dataclass(frozen=True)
class Question:
    """A question and the images that it is about, which come before it."""

    text: str
    images: Sequence[Image.Image]


class VisionModel:
    """Asks questions from several threads; answers are kept in a folder.

    Attributes:
        identity: the model's id, and its weights' name if the server tells.
        requests: number of requests so far, retries included.
    """

    def __init__(self, what: str, address: VisionAddress) -> None:
        """Find the model.

        Args:
            what: starts errors, for example ``--reward judge``.
            address: of the server.

        Raises:
            UserError: there is no server, or not this model.
        """
        self._what, self._address = what, address
        self._cache = address.cache.expanduser()
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else None
        self._client = JsonClient(what, address.timeout, headers)
        self.identity = self._find_model()
        self.requests, self._counting = 0, Lock()
        self._pool = ThreadPoolExecutor(address.concurrency, thread_name_prefix="ask")

    def ask_all(self, questions: Sequence[Question]) -> list[str | NoAnswerError]:
        """Ask questions at once, as far as ``concurrency`` allows; a question that has no answer gives the error.

        Raises:
            UserError: the server cannot be reached or refuses all requests, or the budget is used up.
        """
        futures = [self._pool.submit(self._ask_or_error, question) for question in questions]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def ask(self, question: Question) -> str:
        """Ask a question, in this thread, or return the answer that was kept.

        Raises:
            NoAnswerError: the server has no answer to this question.
            UserError: as :meth:`ask_all`.
        """
        asked = {**self.identity, **_SAMPLING, "jpeg": _JPEG_QUALITY, "text": question.text}
        asked["images"] = [_hash(image) for image in question.images]
        key = sha256_json(asked)
        file = self._cache / key[:2] / f"{key}.json"
        if file.is_file():
            return str(read_json(file)["answer"])
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_jpeg(image)}"}}
            for image in question.images
        ]
        content = [*parts, {"type": "text", "text": question.text}]
        body = {"model": self.identity["model"], "messages": [{"role": "user", "content": content}], **_SAMPLING}
        answer = _text(self._client.post(f"{self._address.url}/chat/completions", body, _RETRIED, self._count))
        write_json(file, {**asked, "answer": answer})
        return answer

    def _ask_or_error(self, question: Question) -> str | NoAnswerError:
        try:
            return self.ask(question)
        except NoAnswerError as error:
            return error

    def _count(self) -> None:
        """Count a request.

        Raises:
            UserError: the budget is used up.
        """
        budget = self._address.budget
        with self._counting:
            if budget is not None and self.requests >= budget:
                raise UserError(
                    f"{self._what}: the budget of {budget} requests is used up; the answers are kept in {self._cache}, "
                    "and the same command continues with them"
                )
            self.requests += 1

    def _find_model(self) -> dict[str, str]:
        wanted = self._address.model
        listed = self._client.get(f"{self._address.url}/models")
        models = listed.get("data") if isinstance(listed, dict) else None
        entries = {
            each["id"]: each for each in models or () if isinstance(each, dict) and isinstance(each.get("id"), str)
        }
        if not entries and wanted:
            return {"model": wanted}  # a server that lists none
        if wanted not in entries and (wanted or len(entries) != 1):
            there = ", ".join(sorted(entries)) or "none"
            fix = f"there is no model {wanted!r}" if wanted else "name a model by the option model=ID"
            raise UserError(f"{self._what}: {self._address.url}: {fix}; the server lists: {there}")
        entry = entries[wanted or next(iter(entries))]
        # vLLM serves weights under any id, and names the folder or hub id that they are from.
        root = {"root": entry["root"]} if isinstance(entry.get("root"), str) else {}
        return {"model": entry["id"], **root}


def _text(answer: Any) -> str:  # noqa: ANN401  (any JSON value)
    """Return the text of a chat completion.

    Raises:
        NoAnswerError: it has none.
    """
    try:
        text = answer["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise NoAnswerError("the answer has no text")
    return text


def _hash(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.width} x {image.height}".encode() + image.tobytes()).hexdigest()


def _jpeg(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return base64.b64encode(file.getvalue()).decode("ascii")
