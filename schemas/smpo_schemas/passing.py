"""Failures of storage that pass: worth another try, and never a reason to reject a pair."""

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
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
)
"""What network file systems say while their server is away. A full disk, or one that may not be written, is another
matter: somebody has to do something about it first."""
