"""Decoding in a child process, so that a file can do no worse than lose its own pair.

Image libraries are native code and files come from anywhere: one may crash the process that decodes it, or keep it busy
for ever. Each worker has one child that decodes for it; a file that kills the child is tried again (the child may have
died of something else), then rejected. Where memory ran out, others may have taken it: that is waited out.
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
from typing import IO

import numpy as np

from smpo_pipeline.images.decode import ImageRejectedError, decode_image

SECONDS = 20
"""A file of the largest size that is not rejected takes a few."""

PAUSES = (2.0, 10.0)
"""Seconds before the second and the third try, where the child may have had too little memory."""

TRIES = 1 + len(PAUSES)

_MAY_PASS = (-signal.SIGKILL, 1)
"""Statuses of a child that the kernel killed for its memory, that ran into a MemoryError, or that could not start."""

_PIPE = 1 << 20
"""Bytes on their way. With Linux's own 64 kB, it takes twice as long to hand an image over."""

_SIZE = struct.Struct("<q")
_ANSWER = struct.Struct("<qqq")
"""Width, height and bytes that follow: of an image its pixels; with width 0 the reason why there is none."""


class Decoder:
    """A child process that decodes; it is started at the first file, and again after a file has killed it."""

    def __init__(self, seconds: int = SECONDS) -> None:
        """``seconds``: how long one file may take."""
        self._seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None

    def decode(self, data: bytes) -> np.ndarray:
        """As :func:`smpo_pipeline.images.decode.decode_image`, in the child.

        Returns:
            Its pixels, uint8 [H, W, 3], as they came through the pipe: one more copy costs a tenth of the decoding.

        Raises:
            ImageRejectedError: as there, or the file killed the child, or outlived its time, each time it was tried.
        """
        died = 0
        for pause in (0.0, *PAUSES):
            if died in _MAY_PASS:
                time.sleep(pause)
            answer = self._ask(data)
            if answer is not None:
                (width, height), content = answer
                if width:
                    return np.frombuffer(content, np.uint8).reshape(height, width, 3)
                raise ImageRejectedError(content.decode())
            died = self._bury()
        if died == -signal.SIGALRM:
            raise ImageRejectedError(f"decoder hangs: no image after {self._seconds} s, {TRIES} times")
        cause = signal.Signals(-died).name if died < 0 else f"status {died}"
        why = " (too little memory?)" if died in _MAY_PASS else ""
        raise ImageRejectedError(f"crashed the decoder: it ended with {cause}{why}, {TRIES} times")

    def _ask(self, data: bytes) -> tuple[tuple[int, int], bytes] | None:
        """Size and content of the child's answer, or None where it gave none."""
        child = self._child = self._child or self._start()
        assert child.stdin is not None and child.stdout is not None  # noqa: S101, PT018  (for mypy: they are pipes)
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
        # Not Popen's pipesize, which raises where a user's pipes hold as much as Linux lets them, or on another system.
        with suppress(OSError, AttributeError):
            fcntl.fcntl(child.stdout, fcntl.F_SETPIPE_SZ, _PIPE)
        return child

    def _bury(self) -> int:
        """The exit status of a child that has closed its pipe."""
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
    """This process's."""
    return Decoder()


def _read(pipe: IO[bytes], size: int) -> bytes | None:
    """``size`` bytes, or None where the pipe ends before."""
    content = pipe.read(size)
    return content if len(content) == size else None


def _serve(requests: IO[bytes], answers: IO[bytes], seconds: int) -> None:
    """What the child does until its parent closes the pipe, or has died."""
    while head := requests.read(_SIZE.size):
        data = requests.read(*_SIZE.unpack(head))
        # The signal's default action ends the process inside whatever native code it is in; no handler would run there.
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with os.fdopen(os.dup(1), "wb") as answers, open(os.devnull, "wb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 1)  # what a library prints is no answer
        _serve(sys.stdin.buffer, answers, int(sys.argv[1]))
