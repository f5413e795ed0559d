"""Image files that wait to be used."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from threading import Lock
from types import TracebackType
from typing import IO, Self

_MEMORY = 1 << 30


class ImageStore:
    """Files by number: in memory up to a limit, beyond it in a temporary file, which is removed at the end.

    Threads may share one.
    ``generate`` writes the images of a prompt together, so that few wait. Where a prompt's rows are far apart, the
    temporary file may grow to the size of all selected images; TMPDIR says where it is.
    """

    def __init__(self, memory: int = _MEMORY) -> None:
        """Make an empty store; ``memory`` is the maximum number of bytes in memory."""
        self._left = memory
        self._held: dict[int, bytes] = {}
        self._places: dict[int, tuple[int, int]] = {}
        self._file: IO[bytes] | None = None
        self._closing = ExitStack()
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def put(self, number: int, data: bytes) -> None:
        """Keep a file."""
        with self._lock:
            if len(data) <= self._left:
                self._left -= len(data)
                self._held[number] = data
                return
            if self._file is None:
                file = tempfile.TemporaryFile(prefix="smpo-images-")  # noqa: SIM115  (closed by the stack)
                self._file = self._closing.enter_context(file)
            self._file.seek(0, 2)
            self._places[number] = (self._file.tell(), len(data))
            self._file.write(data)

    def get(self, number: int) -> bytes:
        """Return a file.

        Raises:
            KeyError: it is not here.
        """
        with self._lock:
            if number in self._held or self._file is None:
                return self._held[number]
            place, size = self._places[number]
            self._file.seek(place)
            return self._file.read(size)

    def drop(self, number: int) -> None:
        """Forget a file, if it is here."""
        with self._lock:
            self._left += len(self._held.pop(number, b""))
            self._places.pop(number, None)
