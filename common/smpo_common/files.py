"""Read and write files, local or on an object store. Writes are atomic: a killed program leaves no partial file."""

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
_THREADS = 16

MAX_JSON_BYTES = 256 << 20
"""Limit for JSON files; the manifest of a million shards has 200 MB."""

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200)]
"""A file name without a folder, so that a record from an untrusted file cannot name a file elsewhere."""

Count = Annotated[int, Field(ge=0, le=2**53)]
"""A number of items or bytes, exact as a float64."""

Statuses = dict[AnyPath, FileStatus | os.stat_result]

Model = TypeVar("Model", bound=BaseModel)
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def atomic_path(target: AnyPath) -> Iterator[Path]:
    """Yield a local path to write to; it becomes ``target`` on success and is removed on failure.

    Raises:
        UserError: the folder or the store cannot be written, or the disk is full.
    """
    with _uploaded(target) if isinstance(target, StorePath) else _renamed(target) as temporary:
        yield temporary


@contextmanager
def _uploaded(target: StorePath) -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="smpo-") as folder:
            temporary = Path(folder) / target.name
            yield temporary
            target.upload(temporary)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


@contextmanager
def _renamed(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target``, then fsync and rename it."""
    # A random name, not the process id: containers on different nodes may use the same ids.
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
    """Give every file in a folder the mode that a new file gets there.

    safetensors, and so diffusers, writes files with mode 0600 whatever the umask.
    """
    probe = directory / f".{uuid.uuid4().hex}.tmp"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in directory.rglob("*"):
        if path.is_file():
            _set_mode(path, mode)


def _set_mode(path: Path, mode: int) -> None:
    if path.stat().st_mode != mode:  # some file systems refuse chmod even where it changes nothing
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
    """Write ``value`` atomically as indented JSON; NaN and infinity raise ValueError, since JSON has neither."""
    write_bytes(target, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: AnyPath) -> Any:  # noqa: ANN401  (any JSON value)
    """Read a JSON file.

    Raises:
        UserError: the file is missing, above :data:`MAX_JSON_BYTES`, or not JSON.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(f"{path} has {size} bytes; the limit for a JSON file is {MAX_JSON_BYTES}")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: a hostile file, nested too deep
        raise UserError(f"{path} is not a readable JSON file: {error}") from error


def read_versioned(path: AnyPath, model: type[Model], version: int, remedy: str) -> Model:
    """Read a JSON file with a ``schema_version`` into a pydantic model.

    Args:
        path: the file.
        model: describes its content.
        version: the schema version that this program reads.
        remedy: ends the error message about another version, for example ``invert again``.

    Raises:
        UserError: the file is missing, malformed or of another schema version.
    """
    value = read_json(path)
    file_version = value.get("schema_version") if isinstance(value, dict) else None
    if file_version != version:
        raise UserError(f"{path} has schema version {file_version}, this program reads {version}; {remedy}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{path} is malformed: {describe_problem(error)}") from error


@contextmanager
def reading_parquet(path: AnyPath) -> Iterator[None]:
    """Turn errors of a damaged or hostile Parquet file (from pyarrow or checks of values) into :class:`UserError`."""
    try:
        yield
    except ValidationError as error:
        raise UserError(f"{path} is malformed: {describe_problem(error)}") from error
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def file_size(path: AnyPath) -> int:
    """Read a file's size in bytes, without its time, which takes a second request on some stores."""
    return path.size() if isinstance(path, StorePath) else path.stat().st_size


def sha256_file(path: AnyPath) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def arrow_source(path: AnyPath) -> Path | BinaryIO:
    """Return what pyarrow can read: a local path as it is, a file on an object store as a stream."""
    return path if isinstance(path, Path) else path.open()


def list_files(directory: AnyPath, pattern: str) -> list[AnyPath]:
    """List a folder's files whose names match, sorted; empty if the folder does not exist."""
    files: Iterable[AnyPath] = directory.glob(pattern)
    return sorted(files, key=str)


def files_below(folder: AnyPath) -> list[AnyPath]:
    """List the files in a folder and its subfolders, sorted, without hidden ones (a name that begins with a dot).

    Links to folders are followed. A folder with several names is listed once, under the first, so that circular links
    end.

    Raises:
        UserError: a folder cannot be listed.
    """
    if isinstance(folder, StorePath):
        names = (path.url.removeprefix(f"{folder.url}/") for path in folder.rglob("*"))
        return sorted(folder / name for name in names if not _is_hidden(*name.split("/")))
    paths: list[AnyPath] = []
    seen = {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, onerror=_raise_unlistable, followlinks=True):
        paths += [Path(parent, name) for name in files if not _is_hidden(name)]
        targets = {name: os.path.realpath(Path(parent, name)) for name in sorted(folders) if not _is_hidden(name)}
        # os.walk descends into what is left in this list.
        folders[:] = []
        for name, target in targets.items():
            if target not in seen:
                seen.add(target)
                folders.append(name)
    return sorted(paths)


def _is_hidden(*names: str) -> bool:
    return any(name.startswith(".") for name in names)


def _raise_unlistable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}") from error


def statuses(directory: AnyPath, pattern: str) -> Statuses:
    """Read size and modification time of a folder's files whose names match; on an object store in one listing."""
    if isinstance(directory, StorePath):
        return {**directory.statuses(pattern)}
    paths = list(directory.glob(pattern))
    return {path: status for path, status in zip(paths, read_all(_status, paths), strict=True) if status}


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:  # removed since it was listed
        return None


def read_all(read: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Map ``read`` over items in threads, which hides an object store's latency; results are in order."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="read") as pool:
        return list(pool.map(read, items))


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Make a hard link, for files that are never changed in place, or a copy if the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def remove_tree(directory: AnyPath) -> None:
    """Remove a folder with its content, if it exists."""
    if isinstance(directory, StorePath):
        directory.remove_tree()
    elif directory.is_dir():
        shutil.rmtree(directory)


def sha256_json(value: Any) -> str:  # noqa: ANN401  (any JSON value)
    """Hex SHA-256 of a value's canonical JSON (sorted keys, no blanks)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
