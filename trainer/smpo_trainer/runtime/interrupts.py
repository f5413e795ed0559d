"""Stop a run on a signal, at the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context in which SIGINT and SIGTERM set ``requested``; a second SIGINT interrupts as usual.

    Attributes:
        requested: number of the last signal, 0 without one.
    """

    requested: int = 0

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.requested = number
        # Not for SIGTERM, which may come twice: from the scheduler, and passed on by the launcher.
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def ignore_signals_in_worker(_worker: int) -> None:
    """Let only the trainer end a data loader process.

    Schedulers and terminals signal all processes of a run, but the trainer needs its loaders to finish the step. When
    the trainer exits, Python sends SIGTERM to its remaining children and waits for them. If the trainer is killed,
    torch ends its loaders within seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A handler does not learn who sent a signal: block SIGTERM and let a thread wait for it, which does.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_from(process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != process:
        pass
    os._exit(0)
