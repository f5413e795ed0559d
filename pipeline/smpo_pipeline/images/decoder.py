"""Decode images in a child process, so that a bad file costs only its own pair.

Image libraries are native code: a file may crash the process that decodes it, or keep it busy forever. Each worker has
one child process that decodes for it. A file that kills the child is tried again, since the child may have died of
something else, and then rejected. After a lack of memory there is a pause before the next try.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from threading import Lock
from typing import IO

import numpy as np

from smpo_pipeline.images.decode import ImageRejectedError, decode_image
from smpo_schemas.reject_kinds import RejectKind

SECONDS = 20
"""Time limit per file; the largest accepted images take a few seconds."""

PAUSES = (2.0, 10.0)
"""Seconds before the second and third try, if the child may have run out of memory."""

TRIES = 1 + len(PAUSES)

_MAYBE_OUT_OF_MEMORY = (-signal.SIGKILL, 1)
"""Exit statuses of a child that the kernel killed for its memory, or that ended by a MemoryError or failed to start."""

_PIPE = 1 << 20
"""Size of the pipe in bytes. With Linux's default of 64 kB the transfer of an image takes twice as long."""

_SIZE = struct.Struct("<q")
_ANSWER = struct.Struct("<qqq")
"""Width, height and the number of bytes that follow: the pixels, or, if the width is 0, the reason for a rejection."""


class Decoder:
    """A child process that decodes, for any thread; started with the first file, and again after one has killed it."""

    def __init__(self, seconds: int = SECONDS) -> None:
        """Prepare a decoder; ``seconds`` is the time limit per file."""
        self._seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    def decode(self, data: bytes) -> np.ndarray:
        """Call :func:`smpo_pipeline.images.decode.decode_image` in the child.

        Returns:
            Pixels, uint8 [H, W, 3], a view of the bytes from the pipe (a copy would take a tenth of the decoding time).

        Raises:
            ImageRejectedError: the image cannot be used, or in each try it killed the child or took too long.
        """
        with self._lock:
            return self._decode(data)

    def _decode(self, data: bytes) -> np.ndarray:
        status = 0
        for pause in (0.0, *PAUSES):
            if status in _MAYBE_OUT_OF_MEMORY:
                time.sleep(pause)
            answer = self._request(data)
            if answer is not None:
                (width, height), content = answer
                if width:
                    return np.frombuffer(content, np.uint8).reshape(height, width, 3)
                raise ImageRejectedError(content.decode())
            status = self._reap_child()
        if status == -signal.SIGALRM:
            raise ImageRejectedError(f"{RejectKind.DECODER_HANGS}: no image after {self._seconds} s, {TRIES} times")
        cause = signal.Signals(-status).name if status < 0 else f"status {status}"
        why = " (too little memory?)" if status in _MAYBE_OUT_OF_MEMORY else ""
        raise ImageRejectedError(f"{RejectKind.CRASHED_DECODER}: it ended with {cause}{why}, {TRIES} times")

    def _request(self, data: bytes) -> tuple[tuple[int, int], bytes] | None:
        """Send a file; return the size and content of the answer, or None if the child died."""
        child = self._child = self._child or self._start()
        assert child.stdin is not None and child.stdout is not None  # noqa: S101, PT018  (for mypy)
        try:
            child.stdin.write(_SIZE.pack(len(data)))
            child.stdin.write(data)
            child.stdin.flush()
        except BrokenPipeError:
            return None
        head = _read(child.stdout, _ANSWER.size)
        if head is None:
            return None
        width, height, size = _ANSWER.unpack(head)
        content = _read(child.stdout, size)
        return None if content is None else ((width, height), content)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", __name__, str(self._seconds)]
        paths = os.pathsep.join(path for path in sys.path if path)
        child = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert child.stdout is not None  # noqa: S101
        # Not Popen's pipesize, which raises on other systems, and if the user's pipes have reached Linux's limit.
        with suppress(OSError, AttributeError):
            fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, _PIPE)
        return child

    def _reap_child(self) -> int:
        """Wait for a child that has closed its pipe; return its exit status."""
        child, self._child = self._child, None
        assert child is not None  # noqa: S101
        try:
            child.wait(self._seconds)
        except subprocess.TimeoutExpired:
            child.kill()
        child.communicate()
        return child.returncode


@cache
def worker_decoder() -> Decoder:
    """Return the decoder of this process."""
    return Decoder()


def _read(pipe: IO[bytes], size: int) -> bytes | None:
    """Read ``size`` bytes, or return None if the pipe ends before."""
    content = pipe.read(size)
    return content if len(content) == size else None


def _serve(requests: IO[bytes], answers: IO[bytes], seconds: int) -> None:
    """Answer requests in the child until the parent closes the pipe or dies."""
    while head := requests.read(_SIZE.size):
        data = requests.read(*_SIZE.unpack(head))
        # The signal's default action ends the process even inside native code, where no Python handler would run.
        signal.alarm(seconds)
        try:
            image = decode_image(data)
            width, height, content = image.width, image.height, image.tobytes()
        except ImageRejectedError as reason:
            width, height, content = 0, 0, str(reason).encode(errors="backslashreplace")
        signal.alarm(0)
        answers.write(_ANSWER.pack(width, height, len(content)))
        answers.write(content)
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with os.fdopen(os.dup(1), "wb") as answers, open(os.devnull, "wb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 1)  # keeps what libraries print out of the answers
        _serve(sys.stdin.buffer, answers, int(sys.argv[1]))
