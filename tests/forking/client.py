"""Stand in for ``python`` on a command line: have the server fork a process for it, pass signals on, end as it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys

_FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def run(address: str, arguments: list[str]) -> None:
    """Start the program that ``arguments`` name, as they would follow ``python``, and end with its status."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()  # noqa: PTH109
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        pid = int.from_bytes(server.recv(8), "big")
        for number in _FORWARDED:
            signal.signal(number, lambda received, _frame: os.kill(pid, received))
        status = int.from_bytes(server.recv(8), "big", signed=True)
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler to set
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
