"""Files that are either whole or absent: written beside the target, fsynced, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from smpo_schemas.errors import UserError, describe_problem

_READ_BYTES = 1 << 20

Model = TypeVar("Model", bound=BaseModel)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to; on success it is fsynced and renamed, on failure removed.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        _fsync_directory(target.parent)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _fsync_directory(directory: Path) -> None:
    """Make a rename in ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(target: Path, content: bytes) -> None:
    """Write ``content`` atomically."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def write_json(target: Path, value: Any) -> None:  # noqa: ANN401  (any JSON value)
    """Write ``value`` atomically as indented JSON; NaN and infinity are refused, since JSON has neither."""
    write_bytes(target, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:  # noqa: ANN401  (any JSON value)
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable JSON file: {error}") from error


def read_versioned(path: Path, kind: type[Model], version: int, mend: str) -> Model:
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


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:  # noqa: ANN401  (any JSON value)
    """Hex SHA-256 of a value's canonical JSON (sorted keys, no blanks): the identity of a group of settings."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
