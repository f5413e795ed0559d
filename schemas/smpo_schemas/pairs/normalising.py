"""Convert an input row to a pair, or reject it with a reason."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smpo_common.errors import UserError, one_line
from smpo_common.files import file_size
from smpo_common.retry import TRANSIENT_ERRNOS
from smpo_common.store_path import AnyPath
from smpo_schemas.pairs.columns import PairColumns
from smpo_schemas.reject_kinds import RejectKind

MAX_TEXT = 100_000
"""Maximum characters in a prompt, id or annotator name; rows with longer ones are rejected."""

MAX_IMAGE_BYTES = 256 << 20
"""Limit for image files; larger ones are rejected, and not read if the row has their path."""

MAX_VOTES = 2**31 - 1
"""The largest number of votes that a table holds."""


class PairRejectedError(Exception):
    """A row cannot become a pair; the message is the reason in the table of rejects.

    Attributes:
        pair_id: the value of the row's id column, or None if it is missing or not text.
    """

    def __init__(self, reason: str, pair_id: str | None = None) -> None:
        super().__init__(one_line(reason))
        self.pair_id = pair_id


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt, and an annotator's label.

    Attributes:
        pair_id: stable name; all of a pair's randomness depends only on it and on the run's seed.
        prompt: the text that both images were made for.
        image_0, image_1: encoded image files.
        label: P(image_0 preferred) as people gave it: 1, 0, 0.5 for a tie, or a share of votes; None without a label.
        annotator: who labelled it, or None.
        votes: how many people the label stands for; None where unknown.
        further: values of the columns that a reader asked for, by name.
    """

    pair_id: str
    prompt: str
    image_0: bytes
    image_1: bytes
    label: float | None
    annotator: str | None
    votes: int | None = None
    further: Mapping[str, Any] = field(default_factory=dict)


def normalise(row: Mapping[str, Any], columns: PairColumns, folder: AnyPath, further: Sequence[str] = ()) -> Pair:
    """Convert one input row to a :class:`Pair`.

    In a row with a chosen and a rejected image, hashes of the prompt and the images decide which one is ``image_0``,
    and the label, 1 unless the row has P(chosen preferred), follows. So positions are independent of the preference,
    and the same in every run and order of rows. Further columns whose names end in ``_0`` and ``_1`` follow, too.

    Args:
        row: values by column.
        columns: names of the row's columns.
        folder: the folder that image paths are relative to.
        further: columns for :attr:`Pair.further`.

    Raises:
        PairRejectedError: a field is missing or of the wrong type.
    """
    pair_id = _text(row, columns.pair_id, "pair_id")
    try:
        return _pair(row, columns, folder, further, pair_id)
    except PairRejectedError as error:
        raise PairRejectedError(str(error), pair_id) from error


def _pair(
    row: Mapping[str, Any], columns: PairColumns, folder: AnyPath, further: Sequence[str], pair_id: str | None
) -> Pair:
    prompt = prompt_of(row, columns)
    names = (columns.chosen or columns.image_0 or "", columns.rejected or columns.image_1 or "")
    image_0, image_1 = (_image_bytes(value_of(row, name), name, folder) for name in names)
    label = _label(value_of(row, columns.label)) if columns.label else 1.0 if columns.chosen else None
    values = {name: row.get(name) for name in further}
    if columns.chosen and _draw(prompt, image_1) < _draw(prompt, image_0):
        image_0, image_1 = image_1, image_0
        label = None if label is None else 1 - label
        values = {name: values.get(_of_other_image(name), value) for name, value in values.items()}
    return Pair(
        pair_id=_content_id(prompt, image_0, image_1) if pair_id is None else pair_id,
        prompt=prompt,
        image_0=image_0,
        image_1=image_1,
        label=label,
        annotator=_text(row, columns.annotator, "annotator"),
        votes=_votes(value_of(row, columns.votes)) if columns.votes else None,
        further=values,
    )


def prompt_of(row: Mapping[str, Any], columns: PairColumns) -> str:
    """Return the prompt of an input row; a blank one is "".

    Raises:
        PairRejectedError: it is missing or not text.
    """
    if not isinstance(value_of(row, columns.prompt), str):
        raise PairRejectedError(f"{RejectKind.NO_PROMPT}: column {columns.prompt!r} is empty or not text")
    return _text(row, columns.prompt, "prompt") or ""


def value_of(row: Mapping[str, Any], column: str) -> Any:  # noqa: ANN401  (any column's)
    """Return the value of a column; ``a.b`` is the field b of a struct a, unless a column has this very name."""
    if column in row:
        return row[column]
    first, _, rest = column.partition(".")
    inner = row.get(first)
    return value_of(inner, rest) if rest and isinstance(inner, Mapping) else None


def _of_other_image(name: str) -> str:
    stem, side = name[:-2], name[-2:]
    return stem + {"_0": "_1", "_1": "_0"}.get(side, side)


def _draw(prompt: str, image: bytes) -> bytes:
    """Hash an image with its prompt; the image with the smaller hash becomes ``image_0``."""
    return hashlib.sha256(hashlib.sha256(prompt.encode()).digest() + image).digest()


def _text(row: Mapping[str, Any], column: str | None, what: str) -> str | None:
    """Convert a value to text; a null, NaN or blank value gives None."""
    value = value_of(row, column) if column else None
    # pandas writes NaN for a missing number, and an empty CSV cell may become an empty string.
    if value is None or (isinstance(value, str) and not value.strip()) or _is_nan(value):
        return None
    if isinstance(value, (list, dict)):
        raise PairRejectedError(f"{RejectKind.NOT_TEXT}: {what} is a {type(value).__name__}")
    text = str(value)
    if len(text) > MAX_TEXT:
        raise PairRejectedError(f"{RejectKind.TEXT_TOO_LONG}: {what} has {len(text)} characters, above {MAX_TEXT}")
    if not is_unicode(text):
        raise PairRejectedError(f"{RejectKind.NOT_UNICODE}: {what}")
    return text


def is_unicode(text: str) -> bool:
    """Whether the text encodes as UTF-8; lone surrogates, which Python and JSON allow, do not."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _image_bytes(value: object, name: str, folder: AnyPath) -> bytes:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = _file_bytes(folder / value, name)
    if not isinstance(value, bytes) or not value:
        raise PairRejectedError(f"{RejectKind.NO_IMAGE}: {name} holds no bytes and no path")
    if len(value) > MAX_IMAGE_BYTES:
        raise PairRejectedError(f"{RejectKind.IMAGE_TOO_LARGE}: {name} has {len(value)} bytes, above {MAX_IMAGE_BYTES}")
    return value


def _file_bytes(path: AnyPath, name: str) -> bytes:
    """Read a regular file; devices and pipes are not opened, since reading them may never end."""
    shown = repr(str(path)[-200:])
    try:
        size = file_size(path)
        if not path.is_file() or not size:
            raise PairRejectedError(f"{RejectKind.IMAGE_NOT_READABLE}: {name} {shown}: no plain file, or empty")
        if size > MAX_IMAGE_BYTES:
            raise PairRejectedError(
                f"{RejectKind.IMAGE_TOO_LARGE}: {name} {shown} has {size} bytes, above {MAX_IMAGE_BYTES}"
            )
        return path.read_bytes()
    except OSError as error:
        if error.errno in TRANSIENT_ERRNOS:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        # An object store's error for a missing file has no strerror.
        reason = error.strerror or "no such file"
        raise PairRejectedError(f"{RejectKind.IMAGE_NOT_READABLE}: {name} {shown}: {reason}") from error
    except ValueError as error:  # a name that no file can have
        raise PairRejectedError(f"{RejectKind.IMAGE_NOT_READABLE}: {name} {shown}: {error}") from error


def image_id(data: bytes) -> str:
    """Hash an image's encoded file, to recognise it in other pairs."""
    return hashlib.sha256(data).hexdigest()[:32]


def _label(value: object) -> float | None:
    if value is None or _is_nan(value):
        return None
    if isinstance(value, (int, float)) and 0 <= value <= 1:
        return float(value)
    raise PairRejectedError(f"{RejectKind.BAD_LABEL}: {value!r} is not a number from 0 to 1")


def _votes(value: object) -> int | None:
    """Convert a number of votes; 0 or a missing number gives None, which means unknown."""
    if value is None or _is_nan(value) or value == 0:
        return None
    if isinstance(value, (int, float)) and 0 < value <= MAX_VOTES and value == int(value):
        return int(value)
    raise PairRejectedError(f"{RejectKind.BAD_LABEL}: {value!r} is not a number of votes")


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _content_id(prompt: str, image_0: bytes, image_1: bytes) -> str:
    """Hash a pair's content."""
    digest = hashlib.sha256()
    for part in (prompt.encode(), image_0, image_1):
        digest.update(len(part).to_bytes(8, "little"))  # keeps the three parts apart
        digest.update(part)
    return digest.hexdigest()[:32]
