"""Read rows of WebDataset tars: a row is a sample, its columns are the extensions of the sample's members.

Text members (``.txt``) become text. The keys of a ``.json`` member are columns, too.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO

from smpo_common.errors import UserError
from smpo_common.files import file_size
from smpo_common.store_path import AnyPath
from smpo_schemas.pairs.normalising import MAX_IMAGE_BYTES, PairRejectedError
from smpo_schemas.pairs.raw_rows import MARK_EVERY, NotRowsError, RawRow, RowRange, Scan
from smpo_schemas.reject_kinds import RejectKind

_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
_FIRST_SAMPLES = 8
"""A tar is not read further if none of this many first samples has two images: a large tar takes long to read."""


def scan(path: AnyPath) -> Scan:
    """Read the headers of all members, and the first sample's JSON.

    The digest is a hash of the members' names, sizes and times, since a tar of images is large.

    Raises:
        UserError: it is damaged.
        NotRowsError: its samples do not have two images.
    """
    names: dict[str, None] = {}
    digest, offsets, count, pairs = hashlib.sha256(), [], 0, 0
    with path.open("rb") as file:
        for count, (offset, members, row) in enumerate(_samples(file, path, _is_json), start=1):
            if count % MARK_EVERY == 1:
                offsets.append(offset)
            for member in members:
                digest.update(f"{member.name}\n{member.size}\n{member.mtime}\n".encode("utf-8", "surrogateescape"))
            names |= dict.fromkeys(row if isinstance(row, dict) else ())
            pairs += sum(member.name.endswith(_IMAGES) for member in members) > 1
            if count == _FIRST_SAMPLES and not pairs:
                break
    if not pairs:
        raise NotRowsError(f"{path} holds no WebDataset samples with two images")
    return Scan(count, file_size(path), digest.hexdigest(), list(names), offsets)


def rows(part: RowRange, names: Sequence[str], further: Sequence[str] = ()) -> Iterator[RawRow]:
    """Yield the rows of a range; members that are not named are not read."""
    wanted = {*names, *further}
    first, offset = part.seek_to
    with part.path.open("rb") as file:
        file.seek(offset)
        samples = _samples(file, part.path, lambda name: name in wanted or _is_json(name))
        for _, _, row in islice(samples, part.start - first, part.stop - first):
            yield row


def _is_json(name: str) -> bool:
    return name.endswith("json")


def _samples(
    file: BinaryIO, path: AnyPath, wanted: Callable[[str], bool]
) -> Iterator[tuple[int, list[tarfile.TarInfo], RawRow]]:
    """Yield each sample's offset, members and row, from the file's current position.

    A sample is a run of members whose names are equal up to the first dot after the last slash. Data are read as soon
    as their header is, so that an object store is read from front to back.
    """
    members: list[tarfile.TarInfo] = []
    row: RawRow = {}
    current = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, name = _split(member.name)
                if not member.isfile() or key.rpartition("/")[2] == "":  # macOS adds hidden files
                    continue
                if key != current:
                    if members:
                        yield members[0].offset, members, row
                    members, row, current = [], {}, key
                members.append(member)
                row = _with_member(row, name, member, file if wanted(name) else None)
            if members:
                yield members[0].offset, members, row
    except (OSError, ValueError, OverflowError, tarfile.TarError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _split(name: str) -> tuple[str, str]:
    """Split a member's name into the sample's key and the extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _with_member(row: RawRow, name: str, member: tarfile.TarInfo, file: BinaryIO | None) -> RawRow:
    """Add a member to its row; without a ``file`` its value is None."""
    if isinstance(row, PairRejectedError):
        return row
    if name in row:
        return PairRejectedError(f"{RejectKind.VALUE_NOT_READABLE}: the sample has several members {name!r}")
    if file is None:
        return {**row, name: None}
    if member.size > MAX_IMAGE_BYTES:
        size = f"{name} has {member.size} bytes, above {MAX_IMAGE_BYTES}"
        return PairRejectedError(f"{RejectKind.IMAGE_TOO_LARGE}: {size}")
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    keys = _json_values(data) if _is_json(name) else {}
    return {**keys, **row, name: _value(name, data)}


def _json_values(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _value(name: str, data: bytes) -> object:
    if not name.endswith(("txt", "json")):
        return data
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data
