"""Ending a run early, at a step's end rather than in its middle."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, SIGINT and SIGTERM set ``requested``; a second SIGINT acts as it always does.

    SIGTERM may come as often as it likes: a scheduler sends it to all processes, and a launcher passes its own on.

    Attributes:
        requested: the number of the signal that came; 0: none did.
    """

    requested: int = 0

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.requested = number
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def leave_signals_to_the_trainer(_worker: int) -> None:
    """In a loader process: who stops a run signals all of its processes, but the trainer's step needs its loaders.

    Only the trainer's own SIGTERM ends one: Python's exit sends it to children that are left, and waits for their end.
    Where the trainer itself is gone, torch's loop ends a loader within seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        pass
    os._exit(0)
