"""Run Python programs in processes that are forked from one that has imported the libraries.

Importing torch, transformers, diffusers and Ray takes 5 to 10 s of CPU; most programs of the tests take less. What is
forked is a process like any other, with its own arguments, environment, folder and output. What reads the environment
at import (``HF_HOME``), or has to show what is imported, needs a fresh interpreter.
"""

from __future__ import annotations

import atexit
import functools
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

_ROOT = Path(__file__).parents[2]
_ENVIRONMENT = dict(os.environ)
_SERVERS: list[int] = []


@functools.cache
def forking_python() -> str:
    """Start the server; return the path of an executable that takes the arguments of ``python``."""
    folder = Path(tempfile.mkdtemp(prefix="forking-"))
    atexit.register(shutil.rmtree, folder)
    executable, address = folder / "python", str(folder / "socket")
    python = shlex.quote(sys.executable)
    client = shlex.join(["-S", "-E", str(_ROOT / "tests/forking/client.py"), address])
    # Ray's services, which inherit pipes, get a fresh interpreter; they start once.
    executable.write_text(
        f'#!/bin/sh\ncase $2 in */ray/*) exec {python} "$@";; *) exec {python} {client} "$@";; esac\n'
    )
    executable.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        command = [sys.executable, "-m", "tests.forking.server", str(listener.fileno())]
        # The server ends with its standard input, which is this process's to close. Libraries keep what they read from
        # the environment when they are imported: nothing that one test has set.
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], cwd=_ROOT, env=_ENVIRONMENT
        )
    _SERVERS.append(server.pid)
    return str(executable)


def forked() -> list[psutil.Process]:
    """All forked programs that run, then their children."""
    return [process for server in _SERVERS for process in psutil.Process(server).children(recursive=True)]
