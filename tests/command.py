"""Running the command lines as users do."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

from tests.forking import forking_python

_MODULES = {"smpo-pipeline": "smpo_pipeline.cli", "smpo-train": "smpo_trainer.cli"}


def run_command(
    program: str, *arguments: object, cwd=None, patch: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``smpo-pipeline`` or ``smpo-train`` in a process of its own, after the code ``patch``.

    With an ``environment`` of its own the interpreter is a fresh one, since libraries read theirs when imported.
    """
    code = f"import sys; sys.argv[0] = {program!r}; from {_MODULES[program]} import main\n{patch}\nmain()"
    return subprocess.run(
        [sys.executable if environment else forking_python(), "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


def run_here(capfd, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which saves its start: for mistakes that are found before any work."""
    main = importlib.import_module(_MODULES[program]).main
    before, sys.argv = sys.argv, [program, *map(str, arguments)]
    try:
        main()
        status = 0
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    finally:
        sys.argv = before
    printed = capfd.readouterr()
    return subprocess.CompletedProcess(sys.argv, status, printed.out, printed.err)


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """A user's mistake: status 2, one line that says these things, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part in lines[0]
