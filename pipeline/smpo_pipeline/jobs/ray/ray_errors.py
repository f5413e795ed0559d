"""Ray's errors as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile

from ray.exceptions import RayError, RayTaskError

from smpo_common.errors import UserError
from smpo_common.retry import TRANSIENT_ERRNOS
from smpo_pipeline.jobs.ray.session import RETRIES


@contextmanager
def plain_errors() -> Iterator[None]:
    """What a stage found or the cluster could not fix, without what Ray wraps around it."""
    try:
        yield
    except RayTaskError as error:
        cause = _user_error(error)
        if cause is None:
            raise
        raise cause from None
    except RayError as error:
        raise UserError(
            f"Ray could not go on: {type(error).__name__}: {_reason(error)}; "
            "what is committed stays, the same command goes on"
        ) from error


def _reason(error: RayError) -> str:
    """The exception of an actor's constructor, which Ray writes behind its traceback; else all that Ray says.

    Its first line alone does not tell which actor died, where, and of what.
    """
    lines = str(error).strip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    if not frames:
        return " ".join(map(str.strip, lines))
    said = " ".join(dropwhile(lambda line: line.startswith(" "), lines[frames[-1] :]))
    return said.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")


def _user_error(error: BaseException) -> UserError | None:
    """The UserError, or the failure of storage, inside what Ray wrapped around it, if that is what it was."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, UserError):
            # Ray Data adds how often it tried.
            return UserError(
                str(getattr(current, "cause", current)).partition("Failed to apply UDF transform")[0].strip()
            )
        if isinstance(current, OSError) and current.errno in TRANSIENT_ERRNOS:
            where = current.filename or "storage"
            return UserError(f"{where}: {current.strerror}, tried {RETRIES + 1} times; the same command goes on")
        current = getattr(current, "cause", None) or current.__cause__
    return None
