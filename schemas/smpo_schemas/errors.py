"""The one exception that is shown to users as a single line."""

from __future__ import annotations

from pydantic import ValidationError


class UserError(Exception):
    """A user's mistake or a condition of their machine: one line that names the file, the value and the mend.

    Both command lines print it without a traceback and exit with status 2. Everything else is a bug and keeps its
    traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def describe_problem(error: ValidationError) -> str:
    """The first problem of a validation error, as ``field: what is wrong``."""
    problem = error.errors()[0]
    return f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
