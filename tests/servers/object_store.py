"""An S3-speaking server on loopback (moto's), which can be told to fail as real ones do."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from moto.backends import get_backend
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

_ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>injected</Message></Error>"
_STATUSES = {"500": ("500 Internal Server Error", b"InternalError"), "503": ("503 Slow Down", b"SlowDown")}
_CONDITION = b"<Condition>If-None-Match</Condition>"


class Quiet(WSGIRequestHandler):
    """Logs nothing."""

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002  (werkzeug's name)
        pass


class Faults:
    """A WSGI application in front of another one; fails every ``every``-th request, in turn in each of its ways.

    The ways: an answer of 500, of 503, one that comes late, one whose body breaks off, and one that comes so late
    (``hang`` seconds) that a client whose read timeout is shorter has gone.

    Attributes:
        every: which request fails; 0: none.
        ways: in which way each does.
        amazon: whether a failed precondition is named as Amazon's answer names it, and as other stores' do not.
        injected: how often each way was taken.
        requests: how many there were.
    """

    def __init__(self, inner: Callable[..., Iterable[bytes]]) -> None:
        self.every = 0
        self.ways: Iterator[str] = itertools.cycle(("500", "503", "slow", "cut"))
        self.hang = 3.0
        self.amazon = True
        self.injected: Counter[str] = Counter()
        self.requests = 0
        self._inner, self._lock = inner, threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        way = self._next()
        if way in _STATUSES:
            # A client waits for its request to be read.
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, code = _STATUSES[way]
            start(status, [("Content-Type", "application/xml")])
            return [_ERROR % code]
        if way == "slow":
            time.sleep(0.3)
        body = self._inner(environ, start)
        if way == "hang":
            # What was asked for is done; nobody waits for the answer any more.
            body = [b"".join(body)]
            time.sleep(self.hang)
        if not self.amazon:
            body = [b"".join(body).replace(_CONDITION, b" " * len(_CONDITION))]
        return self._cut(body) if way == "cut" else body

    def _next(self) -> str | None:
        with self._lock:
            self.requests += 1
            if not self.every or self.requests % self.every:
                return None
            way = next(self.ways)
            self.injected[way] += 1
            return way

    @staticmethod
    def _cut(body: Iterable[bytes]) -> Iterator[bytes]:
        whole = b"".join(body)
        yield whole[: len(whole) // 2]
        if whole:
            raise ConnectionResetError("injected")


@contextmanager
def object_store(environment: Callable[[str, str], None]) -> Iterator[Faults]:
    """A server with an empty bucket ``bucket``; ``environment`` sets the variables that clients find it by."""
    get_backend("s3").reset()  # one for all servers of a process
    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    environment("AWS_ACCESS_KEY_ID", "test")
    environment("AWS_SECRET_ACCESS_KEY", "test")
    environment("AWS_DEFAULT_REGION", "us-east-1")
    environment("AWS_MAX_ATTEMPTS", "2")  # of the client itself; by default it waits longer than a test should
    fsspec.filesystem("s3").clear_instance_cache()
    fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")
    try:
        yield faults
    finally:
        server.shutdown()
        thread.join()
