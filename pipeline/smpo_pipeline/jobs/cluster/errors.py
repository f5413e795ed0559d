"""Turn Ray's errors into one line for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile

from ray.exceptions import RayError, RayTaskError

from smpo_common.errors import UserError
from smpo_common.retry import TRANSIENT_ERRNOS
from smpo_pipeline.jobs.cluster.session import RETRIES


@contextmanager
def unwrap_ray_errors() -> Iterator[None]:
    """Raise the error of a stage without Ray's wrapping, and a failure of the cluster itself as a UserError.

    Bugs in a stage keep Ray's error, with the worker's traceback.
    """
    try:
        yield
    except RayTaskError as error:
        cause = _user_error(error)
        if cause is None:
            raise
        raise cause from None
    except RayError as error:
        raise UserError(
            f"Ray failed: {type(error).__name__}: {_reason(error)}; committed units are kept, run the same command "
            "again to resume"
        ) from error


def _reason(error: RayError) -> str:
    """Return the exception of an actor's constructor, which Ray appends to its traceback; else all of Ray's message.

    The first line alone does not tell which actor died, where and of what.
    """
    lines = str(error).strip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    if not frames:
        return " ".join(map(str.strip, lines))
    exception = " ".join(dropwhile(lambda line: line.startswith(" "), lines[frames[-1] :]))
    return exception.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")


def _user_error(error: BaseException) -> UserError | None:
    """Return the UserError or storage failure in a chain of Ray's wrappers, or None if it is something else."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, UserError):
            # Ray Data appends how often it tried.
            return UserError(
                str(getattr(current, "cause", current)).partition("Failed to apply UDF transform")[0].strip()
            )
        if isinstance(current, OSError) and current.errno in TRANSIENT_ERRNOS:
            where = current.filename or "storage"
            return UserError(
                f"{where}: {current.strerror}, tried {RETRIES + 1} times; run the same command again to resume"
            )
        current = getattr(current, "cause", None) or current.__cause__
    return None
