"""The exception that is shown to users as a single line."""

from __future__ import annotations

from pydantic import ValidationError

_MAX_CHARACTERS = 1500


def one_line(text: str) -> str:
    """Make text one printable line: untrusted files may put control characters, or megabytes, into a message."""
    words = " ".join(text.split())
    shown = words if len(words) <= _MAX_CHARACTERS else f"{words[:_MAX_CHARACTERS]} ..."
    return shown if shown.isprintable() else "".join(_printable(character) for character in shown)


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


class UserError(Exception):
    """A user's mistake or a problem of their machine: one line that names the file, the value and the remedy.

    Both command lines print it without a traceback and exit with status 2. Any other exception is a bug and keeps its
    traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def describe_problem(error: ValidationError) -> str:
    """Describe a validation error's first problem, as ``field: what is wrong``."""
    problem = error.errors()[0]
    return f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
