"""Failures of storage and of the machine that pass: worth another try, and never a reason to reject a pair."""

from __future__ import annotations

import errno

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
