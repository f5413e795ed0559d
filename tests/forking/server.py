"""Import the libraries once, then fork a process for each program that :mod:`tests.forking.client` asks for."""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
from pathlib import Path


def serve(listener: socket.socket) -> list[str]:
    """Fork until standard input ends. Return in each forked process, with the arguments of its program."""
    import tests.forking.libraries  # noqa: F401

    gc.freeze()  # so that collections in children do not copy the pages of what is imported
    clients: dict[int, socket.socket] = {}
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with listener:
        while True:
            ready, _, _ = select.select([0, awake, listener, *clients.values()], [], [])
            if 0 in ready:
                os._exit(0)
            for pid, client in list(clients.items()):
                if client in ready:  # the client was killed
                    os.kill(pid, signal.SIGKILL)
            if awake in ready:
                os.read(awake, 1 << 12)
                _report_ended(clients)
            if listener in ready:
                client, _ = listener.accept()
                length, descriptors, _, _ = socket.recv_fds(client, 8, 3)
                with client.makefile("rb") as request:
                    program = json.loads(request.read(int.from_bytes(length, "big")))
                if (pid := os.fork()) == 0:
                    break
                for descriptor in descriptors:
                    os.close(descriptor)
                client.sendall(pid.to_bytes(8, "big"))
                clients[pid] = client
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for other in (client, *clients.values()):
        other.close()
    return _become(*program, descriptors)


def _report_ended(clients: dict[int, socket.socket]) -> None:
    """Tell each client whose process has ended its status."""
    while clients:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with clients.pop(pid) as client:
            try:
                client.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
            except OSError:  # it was killed
                continue


def _become(arguments: list[str], folder: str, environment: dict[str, str], descriptors: list[int]) -> list[str]:
    """Take over output, folder and environment of the client; return the arguments."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in paths if path and path not in sys.path]
    return arguments


def _run(arguments: list[str]) -> None:
    """Run what follows ``python`` on a command line, as the interpreter does."""
    if arguments[0] == "-u":
        sys.stdout.reconfigure(line_buffering=True)
        arguments = arguments[1:]
    kind, *rest = arguments
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = sys.modules["__main__"] = type(sys)("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)  # noqa: S102
    elif kind == "-m":
        sys.argv, sys.path[0] = rest, str(Path.cwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    _run(serve(socket.socket(fileno=int(sys.argv[1]))))
