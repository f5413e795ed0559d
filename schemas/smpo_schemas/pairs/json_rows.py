"""Read rows of JSON Lines and of JSON lists, one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO

from smpo_common.errors import UserError
from smpo_common.files import file_size, sha256_file
from smpo_common.store_path import AnyPath
from smpo_schemas.pairs.raw_rows import MARK_EVERY, NotRowsError, RawRow, RowRange, Scan

MAX_LINE_BYTES = 64 << 20
"""A longer line of JSON Lines is not read, and its row is rejected; a list with a longer element is refused."""

_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_ELEMENT = re.compile(r"[^\s,]|\Z")
_DECODER = json.JSONDecoder()


def scan(path: AnyPath) -> Scan:
    """Count the rows of a file and collect the keys of all of them.

    Raises:
        UserError: it cannot be read, or is a damaged list.
        NotRowsError: it is neither a list nor JSON Lines.
    """
    try:
        names: dict[str, None] = {}
        offsets, count = [], 0
        with path.open("rb") as file:
            for count, (offset, text) in enumerate(_texts(file, path, 0), start=1):
                if count % MARK_EVERY == 1:
                    offsets.append(offset)
                names |= dict.fromkeys(_parse(text))
        return Scan(count, file_size(path), sha256_file(path), list(names), offsets)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def rows(part: RowRange, names: Sequence[str] = (), further: Sequence[str] = ()) -> Iterator[RawRow]:  # noqa: ARG001
    """Yield the rows of a range; what is not a JSON object yields an empty row, which is then rejected."""
    first, offset = part.seek_to
    with part.path.open("rb") as file:
        for _, text in islice(_texts(file, part.path, offset), part.start - first, part.stop - first):
            yield _parse(text)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: a hostile line, nested too deep
        return {}
    return row if isinstance(row, dict) else {}


def _texts(file: BinaryIO, path: AnyPath, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield the byte offset and the JSON of each row, from the row at byte ``start``."""
    if path.suffix != ".jsonl":
        head = file.read(_BLOCK_BYTES).removeprefix(_BOM).lstrip()
        if head.startswith(b"["):
            yield from json_elements(file, path, start)
            return
        if head and not _parse(head.partition(b"\n")[0]):
            raise NotRowsError(f"{path} is neither a JSON list of rows nor JSON Lines")
    file.seek(start)
    yield from ((start + offset, line) for offset, line in json_lines(file))


def json_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the byte offset, from the file's current position, and the content of each line that is not blank.

    A line over :data:`MAX_LINE_BYTES` is skipped; invalid JSON is yielded in its place, so that its row is rejected.
    """
    offset = 0
    while line := file.readline(MAX_LINE_BYTES):
        end = offset + len(line)
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = b"overlong"
            while rest := file.readline(MAX_LINE_BYTES):
                end += len(rest)
                if rest.endswith(b"\n"):
                    break
        if line.strip():
            yield offset, line
        offset = end


def json_elements(file: BinaryIO, path: AnyPath, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield the byte offset and the JSON of each element of a list, which is never held as a whole.

    Args:
        file: open for reading.
        path: its path, for errors.
        start: 0, or the offset of an element to start from.

    Raises:
        UserError: an element is not JSON, or longer than :data:`MAX_LINE_BYTES`; its end cannot be found.
    """
    file.seek(start or len(_BOM) * (_starts_with_bom(file)))
    # Latin-1 has a character for each byte, so that places in the text are places in the file.
    base, window, at, wanted, inside = file.tell(), "", 0, _BLOCK_BYTES, start > 0
    while True:
        at = next(_ELEMENT.finditer(window, at)).start()
        if at < len(window):
            if not inside:
                inside, at = True, at + 1
                continue
            if window[at] == "]":
                return
            end = _end_of_element(window, at)
            if end is not None:
                yield base + at, window[at:end].encode("latin-1")
                at, wanted = end, _BLOCK_BYTES
                continue
        block = file.read(wanted)
        if not block or len(window) - at > MAX_LINE_BYTES:
            raise UserError(f"{path} is damaged or cut off: byte {base + at} of this JSON list starts no element")
        base, window, at, wanted = base + at, window[at:] + block.decode("latin-1"), 0, 2 * wanted


def _starts_with_bom(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(len(_BOM)) == _BOM


def _end_of_element(window: str, at: int) -> int | None:
    """Return where the element ends; None where it does not end within the window."""
    try:
        return _DECODER.raw_decode(window, at)[1]
    except (ValueError, RecursionError):
        return None
