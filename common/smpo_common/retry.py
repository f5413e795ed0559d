"""Transient I/O errors: retry them, and never reject a pair for one."""

from __future__ import annotations

import errno

import tenacity

from smpo_common.errors import UserError

TRANSIENT_ERRNOS = (
    errno.EIO,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ENOTCONN,
    getattr(errno, "EREMOTEIO", errno.EIO),  # Linux only
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
"""Errors of network file systems whose server is away, and of a machine with too many open files or too little memory.
A full or read-only disk is not among them: waiting does not help."""


class TransientError(Exception):
    """A transient failure that is not an OSError, such as that of a busy server."""


def _is_transient(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, UserError) else error
    return isinstance(cause, TransientError) or (isinstance(cause, OSError) and cause.errno in TRANSIENT_ERRNOS)


TRANSIENT_RETRY = tenacity.Retrying(
    retry=tenacity.retry_if_exception(_is_transient),
    wait=tenacity.wait_exponential(),
    stop=tenacity.stop_after_attempt(6),
    reraise=True,
)
"""Retries after 1, 2, 4, 8 and 16 seconds.

For the driver and for requests to reward servers: Ray itself retries workers' tasks, and
:class:`smpo_common.store_path.StorePath` its requests.
"""

retry_transient = TRANSIENT_RETRY.wraps
"""Decorate a function that is safe to call again, to retry it on transient errors."""
