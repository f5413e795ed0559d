"""Failures of storage and of the machine that pass: worth another try, and never a reason to reject a pair."""

from __future__ import annotations

import errno

import tenacity

from smpo_common.errors import UserError

PASSING_ERRNOS = (
    errno.EIO,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ENOTCONN,
    getattr(errno, "EREMOTEIO", errno.EIO),  # Linux alone has it
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
"""What network file systems say while their server is away, and what a machine says while it has too many open files,
or too little memory. A full disk, or one that may not be written, is another
matter: somebody has to do something about it first."""


def _is_passing(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, UserError) else error
    return isinstance(cause, OSError) and cause.errno in PASSING_ERRNOS


PASSING_RETRY = tenacity.Retrying(
    retry=tenacity.retry_if_exception(_is_passing),
    wait=tenacity.wait_exponential(),
    stop=tenacity.stop_after_attempt(6),
    reraise=True,
)
"""Retries after 1, 2, 4, 8 and 16 seconds.

For the driver; what workers do Ray tries again. An object store's failures were tried again where they occurred.
"""

trying_again = PASSING_RETRY.wraps
"""Decorates a function that may be called again where storage fails for a moment."""
