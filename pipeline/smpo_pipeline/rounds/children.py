"""Run the stages' commands in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from smpo_common.errors import UserError

_MODULES = {"smpo-pipeline": "smpo_pipeline", "smpo-train": "smpo_trainer"}


def run_child(command: Sequence[str]) -> int:
    """Run a command to its end; what it prints is seen.

    Returns:
        Its exit status; negative: the signal that ended it.
    """
    process = subprocess.Popen(_executable(command))  # noqa: S603  (a program of our own)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal has interrupted it, too
        raise
    except BaseException:
        process.terminate()
        process.wait()
        raise


def resolve_training(arguments: Sequence[str]) -> dict[str, Any]:
    """Let ``smpo-train`` parse its arguments; returns all its flags.

    Raises:
        UserError: they are refused.
    """
    command = _executable(["smpo-train", *arguments, "--print-config"])
    # Errors as plain lines, not in boxes.
    environment = {**os.environ, "TYPER_USE_RICH": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        raise UserError(said[0].partition(": ")[2] if said else f"smpo-train ended with {done.returncode}")
    return dict(yaml.safe_load(done.stdout))


def _executable(command: Sequence[str]) -> list[str]:
    program, *arguments = command
    return [sys.executable, "-m", _MODULES[program], *arguments] if program in _MODULES else [program, *arguments]
