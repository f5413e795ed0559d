"""Files on an object store, with the part of pathlib's interface that this project uses.

A folder is only a prefix of names: it exists while a file in it does. A PUT is atomic, so files are written under their
final names. A failed request is retried here, beyond the retries of the store's client; one that keeps failing raises
:class:`UserError`, and is never mistaken for a missing file.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
import tenacity

from smpo_common.errors import UserError

_ATTEMPTS = 4
_FINAL = (FileExistsError, FileNotFoundError, PermissionError)
"""Answers of the store that another attempt does not change."""

_RETRY = tenacity.Retrying(
    retry=tenacity.retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, _FINAL)),
    wait=tenacity.wait_exponential(exp_base=3),
    stop=tenacity.stop_after_attempt(_ATTEMPTS),
    reraise=True,
)
"""Retries after 1, 3 and 9 seconds, besides the client's own retries."""

_TIME_KEYS = ("LastModified", "mtime", "last_modified", "created")
"""Keys of the modification time in s3fs, gcsfs, adlfs and fsspec's memory store."""

_BUFFER = 1 << 20
Result = TypeVar("Result")


@dataclass(frozen=True)
class FileStatus:
    """A file's bytes and modification time (Unix, in seconds and in nanoseconds), with ``os.stat_result``'s names."""

    st_size: int
    st_mtime: float
    st_mtime_ns: int


@dataclass(frozen=True, order=True)
class StorePath:
    """A file or folder by its URL (``s3://``, ``gs://`` or another of fsspec's), without a trailing slash."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the name, from the last dot."""
        return Path(self.name).suffix

    @property
    def parent(self) -> StorePath:
        """The folder that holds this."""
        return StorePath(self.url.rpartition("/")[0])

    def with_suffix(self, suffix: str) -> StorePath:
        """Replace the suffix."""
        return self.parent / Path(self.name).with_suffix(suffix).name

    def absolute(self) -> StorePath:
        """Return itself: URLs are already absolute."""
        return self

    def is_file(self) -> bool:
        """Whether this is an existing file."""
        return self._type() == "file"

    def is_dir(self) -> bool:
        """Whether a file exists in this folder."""
        return self._type() == "directory"

    def exists(self) -> bool:
        """Whether this is an existing file or folder."""
        return self._type() is not None

    def stat(self) -> FileStatus:
        """Read the file's size and modification time."""
        return self._status(self._info())

    def size(self) -> int:
        """Read the file's size in bytes."""
        return int(self._info()["size"])

    def iterdir(self) -> Iterator[StorePath]:
        """List the files and folders in this folder, sorted."""
        return (self / name for name in sorted(self._list()))

    def statuses(self, pattern: str) -> dict[AnyPath, FileStatus]:
        """Read size and time of the files in this folder whose names match, in one listing."""
        return {
            self / name: self._status(info)
            for name, info in self._list().items()
            if info["type"] == "file" and fnmatch(name, pattern)
        }

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """List the files and folders in this folder whose names match."""
        return (path for path in self.iterdir() if fnmatch(path.name, pattern))

    def rglob(self, pattern: str) -> Iterator[StorePath]:
        """List the files in this folder and its subfolders whose names match."""
        for name in self._call("list", lambda fs, path: fs.find(path)):
            path = self / name[len(self._root) :].lstrip("/")
            if fnmatch(path.name, pattern):
                yield path

    def read_bytes(self) -> bytes:
        """Read the whole file."""
        return self.read_range(None, None)

    def read_text(self, encoding: str = "utf-8") -> str:
        """Read the whole file as text."""
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int | None, stop: int | None) -> bytes:
        """Read bytes ``start`` (included) to ``stop`` (excluded)."""
        return bytes(self._call("read", lambda fs, path: fs.cat_file(path, start=start, end=stop)))

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the file for reading, with seeks; each read requests a range."""
        if mode != "rb":
            raise ValueError(f"{self}: objects are read as bytes and written whole, not opened as {mode!r}")
        return io.BufferedReader(_Ranges(self), _BUFFER)

    def download(self, target: Path) -> None:
        """Copy the file to this machine."""
        self._call("read", lambda fs, path: fs.get_file(path, str(target)))

    def upload(self, source: Path) -> None:
        """Upload a local file, in one PUT or, if it is large, in several parts."""
        self._call("write", lambda fs, path: fs.put_file(str(source), path))

    def create(self, content: bytes) -> bool:
        """Write the file unless it exists; return whether it was written. Of several writers at once, one succeeds."""
        try:
            self._call("write", lambda fs, path: _create(fs, path, content))
        except FileExistsError:
            # If the store's answer was lost, the second attempt finds the file that the first one wrote.
            with suppress(FileNotFoundError):
                return self.read_bytes() == content
            return False
        return True

    def overwrite(self, content: bytes) -> None:
        """Write the file, replacing an existing one."""
        self._call("write", lambda fs, path: fs.pipe_file(path, content))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the file."""
        try:
            self._call("remove", lambda fs, path: fs.rm_file(path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Remove all files of this folder, with as few requests as the store allows."""
        if self.is_dir():
            # fsspec takes the path as a pattern: an unescaped *, ? or [ would match other folders too.
            self._call("remove", lambda fs, path: fs.rm(glob.escape(path), recursive=True))

    def rmdir(self) -> None:
        """Do nothing: object stores have no directories."""

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The fsspec file system and this path on it."""
        try:
            # A cached listing would hide files that other machines write.
            return fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise UserError(f"{self}: {error}") from error
        except ValueError as error:
            raise UserError(f"{self}: {error}; give a local path or a URL that fsspec knows (s3://, gs://)") from error

    @property
    def _root(self) -> str:
        return self._place[1]

    def __reduce__(self) -> tuple[type[StorePath], tuple[str]]:
        # Without the cached file system: each process opens its own connections.
        return StorePath, (self.url,)

    def _list(self) -> dict[str, dict[str, Any]]:
        """List the store's records of the files and folders in this folder, by name."""
        try:
            entries = self._call("list", lambda fs, path: fs.ls(path, detail=True))
        except FileNotFoundError:
            return {}
        prefix = f"{self._root}/"
        # Some tools mark a folder by an empty object of the folder's own name: skip it.
        return {
            entry["name"][len(prefix) :].rstrip("/"): entry
            for entry in entries
            if entry["name"].startswith(prefix) and entry["name"] != prefix
        }

    def _status(self, info: Mapping[str, Any]) -> FileStatus:
        modified = next((info[key] for key in _TIME_KEYS if info.get(key)), None)
        if modified is None:
            modified = self._call("read", lambda fs, _: fs.modified(info["name"]))
        seconds = modified.timestamp() if isinstance(modified, datetime) else float(modified)
        return FileStatus(int(info["size"]), seconds, int(seconds * 1e9))

    def _info(self) -> dict[str, Any]:
        return self._call("read", lambda fs, path: fs.info(path))

    def _type(self) -> str | None:
        try:
            return self._info()["type"]
        except FileNotFoundError:
            return None

    def _call(self, verb: str, operation: Callable[[Any, str], Result]) -> Result:
        """Call ``operation(filesystem, path)``, up to ``_ATTEMPTS`` times; ``verb`` names it in errors.

        Raises:
            FileNotFoundError: the file or its folder does not exist.
            FileExistsError: the operation creates a file that exists.
            UserError: no permission, no such bucket, or the store keeps failing or cannot be reached.
        """
        filesystem, path = self._place
        try:
            return _RETRY(operation, filesystem, path)
        except FileExistsError:
            raise
        except FileNotFoundError as error:
            # A missing bucket is a mistake in the URL, not a missing file that the caller expects.
            if verb == "write" or _response(error).get("Error", {}).get("Code") == "NoSuchBucket":
                raise UserError(f"cannot {verb} {self}: {error}") from None
            raise
        except PermissionError as error:
            raise UserError(f"cannot {verb} {self}: the store does not permit it: {error}") from error
        except Exception as error:  # noqa: BLE001  (each store raises its own errors)
            reason = f"{type(error).__name__}: {error}"
            # Without its cause, so that retry_transient does not retry it a second time.
            raise UserError(f"cannot {verb} {self}, tried {_ATTEMPTS} times: {reason}") from None


def _create(filesystem: Any, path: str, content: bytes) -> None:  # noqa: ANN401  (any store's)
    """Write a file unless it exists.

    Raises:
        FileExistsError: it exists.
    """
    try:
        filesystem.pipe_file(path, content, mode="create")
    except OSError as error:
        # s3fs recognises the error by Amazon's wording; other stores send only the same status.
        if _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode") == HTTPStatus.PRECONDITION_FAILED:
            raise FileExistsError(path) from error
        raise


def _response(error: BaseException) -> Mapping[str, Any]:
    """Return the S3 response behind an error of s3fs, or an empty one."""
    response = getattr(error.__cause__, "response", None)
    return response if isinstance(response, dict) else {}


class _Ranges(io.RawIOBase):
    """A seekable stream of a file on a store."""

    def __init__(self, path: StorePath) -> None:
        self._path, self._size, self._at = path, path.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readall(self) -> bytes:
        """Read the rest in one request; the base class requests a few kilobytes at a time."""
        data = self._path.read_range(self._at, self._size) if self._at < self._size else b""
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401  (any writable buffer)
        view = memoryview(buffer).cast("B")
        stop = min(self._at + len(view), self._size)
        if stop <= self._at:
            return 0
        data = self._path.read_range(self._at, stop)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


AnyPath = Path | StorePath
"""A file or folder on a mounted file system or on an object store."""


def parse_path(text: str) -> AnyPath:
    """Parse a user's URL or path."""
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return StorePath(text.rstrip("/")) if "://" in text else Path(text)
