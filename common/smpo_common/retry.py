"""Failures of storage and of the machine that pass: worth another try, and never a reason to reject a pair."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

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

_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def trying_again(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that may be begun anew, called again up to five times where storage fails for a moment.

    For the driver; what workers do Ray tries again. An object store's failures were tried again where they occurred.
    """

    @wraps(function)
    def tried(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        for pause in _PAUSES_SECONDS:
            try:
                return function(*args, **kwargs)
            except (OSError, UserError) as error:
                cause = error.__cause__ if isinstance(error, UserError) else error
                if not isinstance(cause, OSError) or cause.errno not in PASSING_ERRNOS:
                    raise
            time.sleep(pause)
        return function(*args, **kwargs)

    return tried
