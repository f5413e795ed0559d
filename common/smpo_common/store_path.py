"""Files on an object store, with the part of pathlib's interface that this project uses.

A folder is nothing but the beginning of names: it exists while a file in it does. A PUT makes a file whole or not at
all, so that nothing is renamed. A failure that passes is tried again here, after the client of the store has tried
itself; one that does not pass ends the run in one line, and is never taken for a file that is not there.
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
_LASTING = (FileExistsError, FileNotFoundError, PermissionError)
_RETRY = tenacity.Retrying(
    retry=tenacity.retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, _LASTING)),
    wait=tenacity.wait_exponential(exp_base=3),
    stop=tenacity.stop_after_attempt(_ATTEMPTS),
    reraise=True,
)
"""Pauses of 1, 3 and 9 seconds, besides what the store's client waits between its own attempts."""

_TIMES = ("LastModified", "mtime", "last_modified", "created")
"""When a file was written, by the names that s3fs, gcsfs, adlfs and fsspec's memory give it."""

_BUFFER = 1 << 20
Result = TypeVar("Result")


@dataclass(frozen=True)
class FileStatus:
    """Bytes of a file and when it was written (since 1970, in seconds and in nanoseconds), by pathlib's names."""

    st_size: int
    st_mtime: float
    st_mtime_ns: int


@dataclass(frozen=True, order=True)
class StorePath:
    """A file or folder by its URL (``s3://``, ``gs://`` and what else fsspec knows), without a slash at its end."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the name, from its last dot."""
        return Path(self.name).suffix

    @property
    def parent(self) -> StorePath:
        """The folder."""
        return StorePath(self.url.rpartition("/")[0])

    def with_suffix(self, suffix: str) -> StorePath:
        """The same with another suffix."""
        return self.parent / Path(self.name).with_suffix(suffix).name

    def absolute(self) -> StorePath:
        """Itself: a URL means the same everywhere."""
        return self

    def is_file(self) -> bool:
        """Whether there is such a file."""
        return self._type() == "file"

    def is_dir(self) -> bool:
        """Whether the name of any file begins with this folder."""
        return self._type() == "directory"

    def exists(self) -> bool:
        """Whether it is either."""
        return self._type() is not None

    def stat(self) -> FileStatus:
        """The file's size and time."""
        return self._status(self._info())

    def size(self) -> int:
        """Bytes of the file."""
        return int(self._info()["size"])

    def iterdir(self) -> Iterator[StorePath]:
        """Files and folders in this folder."""
        return (self / name for name in sorted(self._list()))

    def statuses(self, pattern: str) -> dict[AnyPath, FileStatus]:
        """Size and time of the files in this folder whose names match, all from the listing."""
        return {
            self / name: self._status(info)
            for name, info in self._list().items()
            if info["type"] == "file" and fnmatch(name, pattern)
        }

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """Those in this folder whose names match."""
        return (path for path in self.iterdir() if fnmatch(path.name, pattern))

    def rglob(self, pattern: str) -> Iterator[StorePath]:
        """Files in this folder and below whose names match."""
        for name in self._call("list", lambda fs, path: fs.find(path)):
            path = self / name[len(self._root) :].lstrip("/")
            if fnmatch(path.name, pattern):
                yield path

    def read_bytes(self) -> bytes:
        """The whole file."""
        return self.read_range(None, None)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole file as text."""
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int | None, stop: int | None) -> bytes:
        """Bytes ``start`` (included) to ``stop`` (excluded)."""
        return bytes(self._call("read", lambda fs, path: fs.cat_file(path, start=start, end=stop)))

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file for reading, with seeks; each read is a request for a range."""
        if mode != "rb":
            raise ValueError(f"{self}: objects are read as bytes and written whole, not opened as {mode!r}")
        return io.BufferedReader(_Ranges(self), _BUFFER)

    def download(self, target: Path) -> None:
        """Copy the file to this machine."""
        self._call("read", lambda fs, path: fs.get_file(path, str(target)))

    def upload(self, source: Path) -> None:
        """Put a local file here, in one PUT or, where it is large, as one upload of several parts."""
        self._call("write", lambda fs, path: fs.put_file(str(source), path))

    def create(self, content: bytes) -> bool:
        """Write the file if there is none; of several who try at once, one succeeds. Returns whether it is this one."""
        try:
            self._call("write", lambda fs, path: _create(fs, path, content))
        except FileExistsError:
            # An answer may have been lost, and the second attempt have found what the first one wrote.
            with suppress(FileNotFoundError):
                return self.read_bytes() == content
            return False
        return True

    def overwrite(self, content: bytes) -> None:
        """Write the file, whatever is there."""
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
            # It is taken for a pattern, in which *, ? and [ would stand for others' folders too.
            self._call("remove", lambda fs, path: fs.rm(glob.escape(path), recursive=True))

    def rmdir(self) -> None:
        """Nothing: a folder is gone with its last file."""

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system, and the path there. What others write must be seen: listings are not kept."""
        try:
            return fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise UserError(f"{self}: {error}") from error
        except ValueError as error:
            raise UserError(f"{self}: {error}; paths and URLs that fsspec knows (s3://, gs://) can be named") from error

    @property
    def _root(self) -> str:
        return self._place[1]

    def __reduce__(self) -> tuple[type[StorePath], tuple[str]]:
        # Not the file system: each process has connections of its own.
        return StorePath, (self.url,)

    def _list(self) -> dict[str, dict[str, Any]]:
        """What the store says of each file and folder in this folder, by name."""
        try:
            found = self._call("list", lambda fs, path: fs.ls(path, detail=True))
        except FileNotFoundError:
            return {}
        inside = f"{self._root}/"
        # An empty object may stand for the folder itself.
        return {
            each["name"][len(inside) :].rstrip("/"): each
            for each in found
            if each["name"].startswith(inside) and each["name"] != inside
        }

    def _status(self, info: Mapping[str, Any]) -> FileStatus:
        modified = next((info[name] for name in _TIMES if info.get(name)), None)
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

    def _call(self, what: str, operation: Callable[[Any, str], Result]) -> Result:
        """Do something on the store, up to ``_ATTEMPTS`` times.

        Raises:
            FileNotFoundError: the file, or what it lies in, is not there.
            FileExistsError: it was to be made, and is there.
            UserError: the store does not permit it, has no such bucket, cannot be reached, or still fails.
        """
        filesystem, path = self._place
        try:
            return _RETRY(operation, filesystem, path)
        except FileExistsError:
            raise
        except FileNotFoundError as error:
            # No bucket is no missing file, but a mistake in its name.
            if what == "write" or _said(error).get("Error", {}).get("Code") == "NoSuchBucket":
                raise UserError(f"cannot {what} {self}: {error}") from None
            raise
        except PermissionError as error:
            raise UserError(f"cannot {what} {self}: the store does not permit it: {error}") from error
        except Exception as error:  # noqa: BLE001  (each store has errors of its own)
            reason = f"{type(error).__name__}: {error}"
            # Without its cause: it has been tried again, and often enough.
            raise UserError(f"cannot {what} {self}, tried {_ATTEMPTS} times: {reason}") from None


def _create(filesystem: Any, path: str, content: bytes) -> None:  # noqa: ANN401  (of any store)
    """Write a file if there is none.

    Raises:
        FileExistsError: there is one. s3fs says so of Amazon's answer alone; others have its status, not its words.
    """
    try:
        filesystem.pipe_file(path, content, mode="create")
    except OSError as error:
        if _said(error).get("ResponseMetadata", {}).get("HTTPStatusCode") == HTTPStatus.PRECONDITION_FAILED:
            raise FileExistsError(path) from error
        raise


def _said(error: BaseException) -> Mapping[str, Any]:
    """The answer of an S3 store that s3fs made an error of; empty where there is none."""
    answer = getattr(error.__cause__, "response", None)
    return answer if isinstance(answer, dict) else {}


class _Ranges(io.RawIOBase):
    """A file on a store as a stream that can seek."""

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
        """The rest in one request; the base class asks for a few kilobytes at a time."""
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
"""A file or folder here or on an object store."""


def parse_path(text: str) -> AnyPath:
    """What a user wrote: a URL, or a path of this machine."""
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return StorePath(text.rstrip("/")) if "://" in text else Path(text)
