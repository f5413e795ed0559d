"""Requests to a server that speaks JSON. Only the given address is contacted: redirects are not followed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

import httpx2

from smpo_common.errors import UserError, one_line
from smpo_common.retry import TRANSIENT_RETRY, TransientError

_CONNECT_SECONDS = 10.0
_MAX_TEXT = 200
"""Characters of an answer in a message."""

BUSY = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
"""Statuses that say nothing about the request."""

_WRONG_ADDRESS = frozenset(
    {
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.METHOD_NOT_ALLOWED,
    }
)
"""Statuses that every request would get."""


class NoAnswerError(RuntimeError):
    """The server does not answer this request; it may answer others."""


class TimedOutError(NoAnswerError):
    """No answer came in time."""


class _PassingError(TransientError):
    """A failure to retry, and what to raise if it does not pass."""

    def __init__(self, final: Exception) -> None:
        super().__init__(str(final))
        self.final = final


class JsonClient:
    """Sends requests from any number of threads."""

    def __init__(self, what: str, timeout: float, headers: Mapping[str, str] | None = None) -> None:
        """Prepare a client; nothing is sent yet.

        Args:
            what: starts errors, for example ``--reward http``.
            timeout: seconds that an answer may take.
            headers: of all requests.
        """
        self._what, self._timeout = what, timeout
        self._http = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=_CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        )

    def get(self, url: str) -> Any:  # noqa: ANN401  (any JSON value)
        """Send a GET request once; return the JSON value, or None if the server does not answer with one.

        Raises:
            UserError: there is no server, or it refuses access.
        """
        try:
            response = self._http.get(url)
        except httpx2.RequestError as error:
            raise UserError(f"{self._what}: no server answers at {url}: {error or type(error).__name__}") from error
        if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise UserError(f"{self._what}: {self._describe(url, response)}")
        try:
            return response.json() if response.is_success else None
        except (ValueError, RecursionError):
            return None

    def post(
        self,
        url: str,
        body: Mapping[str, Any],
        retried: Collection[int] = BUSY,
        sending: Callable[[], None] = lambda: None,
    ) -> Any:  # noqa: ANN401  (any JSON value)
        """Send a JSON value and return the answer's. Lost connections, time-outs and some statuses are retried.

        Args:
            url: the address.
            body: the value.
            retried: statuses that are retried.
            sending: called before each try.

        Raises:
            NoAnswerError: the server has no answer to this request.
            UserError: the server cannot be reached, or refuses all requests.
        """
        try:
            return TRANSIENT_RETRY(partial(self._post, url, body, retried, sending))
        except _PassingError as error:
            raise error.final from error

    def _post(self, url: str, body: Mapping[str, Any], retried: Collection[int], sending: Callable[[], None]) -> Any:  # noqa: ANN401
        sending()
        try:
            response = self._http.post(url, json=body)
        except httpx2.ConnectTimeout as error:
            raise _PassingError(UserError(f"{self._what}: no server answers at {url}")) from error
        except httpx2.TimeoutException as error:
            raise _PassingError(TimedOutError(f"{url} did not answer within {self._timeout:g} s")) from error
        except httpx2.RequestError as error:
            said = f"no answer from {url}: {error or type(error).__name__}"
            raise _PassingError(UserError(f"{self._what}: {said}")) from error
        said, status = self._describe(url, response), response.status_code
        if status in retried:
            busy = status in BUSY
            raise _PassingError(UserError(f"{self._what}: {said}") if busy else NoAnswerError(said))
        if response.is_redirect or status in _WRONG_ADDRESS:
            raise UserError(f"{self._what}: {said}")
        if not response.is_success:
            raise NoAnswerError(said)
        try:
            return response.json()
        except (ValueError, RecursionError) as error:
            raise NoAnswerError(f"{said}, which is not JSON") from error

    @staticmethod
    def _describe(url: str, response: httpx2.Response) -> str:
        text = one_line(response.text[:_MAX_TEXT])
        return f"{url} answered {response.status_code}{': ' if text else ''}{text}"
