"""Files that are either whole or absent: written beside the target, fsynced, renamed; or put on an object store."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn, TypeVar

import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError

from smpo_common.errors import UserError, describe_problem
from smpo_common.store_path import AnyPath, FileStatus, StorePath

_READ_BYTES = 1 << 20
_REQUESTS = 16
"""To an object store, at once."""

MAX_JSON_BYTES = 256 << 20
"""Larger JSON files are refused: the manifest of a million shards has 200 MB."""

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200)]
"""A plain file name, as records name the files beside them: no folder, so that nothing outside is read or written."""

Count = Annotated[int, Field(ge=0, le=2**53)]
"""How many there are of something, or bytes."""

Statuses = dict[AnyPath, FileStatus | os.stat_result]
"""Size and time of files."""

Model = TypeVar("Model", bound=BaseModel)
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def atomic_path(target: AnyPath) -> Iterator[Path]:
    """Yield a local path to write to, which becomes ``target`` on success, and is removed on failure.

    Raises:
        UserError: the folder or the store cannot be written, or the disk is full.
    """
    with _put(target) if isinstance(target, StorePath) else _renamed(target) as temporary:
        yield temporary


@contextmanager
def _put(target: StorePath) -> Iterator[Path]:
    """Written in a folder of its own, then put on the store at once."""
    try:
        with tempfile.TemporaryDirectory(prefix="smpo-") as folder:
            temporary = Path(folder) / target.name
            yield temporary
            target.upload(temporary)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


@contextmanager
def _renamed(target: Path) -> Iterator[Path]:
    """Written beside ``target``, fsynced, renamed."""
    # Not the process's number: in containers on different nodes, two writers of one file may well share it.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        _set_mode(temporary, mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        _fsync_directory(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def follow_umask(directory: Path) -> None:
    """Give every file in a folder the mode that a file opened there gets.

    safetensors, and so diffusers, writes files that their owner alone may read, whatever the umask.
    """
    probe = directory / f".{uuid.uuid4().hex}.tmp"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file():
            _set_mode(path, mode)


def _set_mode(path: Path, mode: int) -> None:
    if path.stat().st_mode != mode:  # some file systems refuse to be asked
        path.chmod(mode)


def _fsync_directory(directory: Path) -> None:
    """Make a rename in ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(target: AnyPath, content: bytes) -> None:
    """Write ``content`` atomically."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def write_json(target: AnyPath, value: Any) -> None:  # noqa: ANN401  (any JSON value)
    """Write ``value`` atomically as indented JSON; NaN and infinity are refused, since JSON has neither."""
    write_bytes(target, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: AnyPath) -> Any:  # noqa: ANN401  (any JSON value)
    """Read a JSON file.

    Raises:
        UserError: the file is missing, above :data:`MAX_JSON_BYTES`, or not JSON.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(f"{path} has {size} bytes; no JSON file above {MAX_JSON_BYTES} is read")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested deeper than any of our files
        raise UserError(f"{path} is not a readable JSON file: {error}") from error


def read_versioned(path: AnyPath, kind: type[Model], version: int, mend: str) -> Model:
    """Read a JSON file that a pydantic model describes and that carries a ``schema_version``.

    Args:
        path: the file.
        kind: the model.
        version: the schema version that this program reads.
        mend: what to do about another one, in two or three words.

    Raises:
        UserError: it is missing, malformed or of another schema version.
    """
    value = read_json(path)
    found = value.get("schema_version") if isinstance(value, dict) else None
    if found != version:
        raise UserError(f"{path} has schema version {found}, this program reads {version}; {mend}")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{path} is malformed: {describe_problem(error)}") from error


@contextmanager
def reading_parquet(path: AnyPath) -> Iterator[None]:
    """Turn whatever a damaged or hostile Parquet file makes pyarrow (or a check of its values) raise into one line.

    Raises:
        UserError: anything of that happened.
    """
    try:
        yield
    except ValidationError as error:
        raise UserError(f"{path} is malformed: {describe_problem(error)}") from error
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def sha256_file(path: AnyPath) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def arrow_source(path: AnyPath) -> Path | BinaryIO:
    """What pyarrow reads a file from: itself, or a stream of it where pyarrow has no path for it."""
    return path if isinstance(path, Path) else path.open()


def list_files(directory: AnyPath, pattern: str) -> list[AnyPath]:
    """Files of a folder whose names match, in order; none where there is no folder."""
    found: Iterable[AnyPath] = directory.glob(pattern)
    return sorted(found, key=str)


def files_below(folder: AnyPath) -> list[AnyPath]:
    """Files in a folder and below it, in order, without what is hidden (a name that begins with a dot).

    Links to folders are followed. A folder that several names lead to is read once, under the first of them, so that
    links may form circles.

    Raises:
        UserError: a folder cannot be listed.
    """
    if isinstance(folder, StorePath):
        names = (path.url.removeprefix(f"{folder.url}/") for path in folder.rglob("*"))
        return sorted(folder / name for name in names if not _is_hidden(*name.split("/")))
    found: list[AnyPath] = []
    seen = {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        found += [Path(place, name) for name in files if not _is_hidden(name)]
        inside = {name: os.path.realpath(Path(place, name)) for name in sorted(folders) if not _is_hidden(name)}
        # Changed in place, which tells os.walk where to go.
        folders[:] = []
        for name, real in inside.items():
            if real not in seen:
                seen.add(real)
                folders.append(name)
    return sorted(found)


def _is_hidden(*names: str) -> bool:
    return any(name.startswith(".") for name in names)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}") from error


def statuses(directory: AnyPath, pattern: str) -> Statuses:
    """Size and time of the files of a folder whose names match; on an object store the listing says them."""
    if isinstance(directory, StorePath):
        return {**directory.statuses(pattern)}
    paths = list(directory.glob(pattern))
    return {path: status for path, status in zip(paths, read_all(_status, paths), strict=True) if status}


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # gone since it was listed
        return None


def read_all(read: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``read`` of each item, in order, several at a time: an object store takes its time for each answer."""
    with ThreadPoolExecutor(_REQUESTS, thread_name_prefix="read") as pool:
        return list(pool.map(read, items))


def remove_tree(directory: AnyPath) -> None:
    """Remove a folder and all that is in it, if it is there."""
    if isinstance(directory, StorePath):
        directory.remove_tree()
    elif directory.is_dir():
        shutil.rmtree(directory)


def sha256_json(value: Any) -> str:  # noqa: ANN401  (any JSON value)
    """Hex SHA-256 of a value's canonical JSON (sorted keys, no blanks): the identity of a group of settings."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
