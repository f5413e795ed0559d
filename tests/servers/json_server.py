"""A server on loopback that answers JSON requests as a test wants, in threads of this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]
"""Status and JSON value, or bytes as they are. A status of 0 closes the connection without an answer."""


class JsonServer:
    """What was asked, and how the server answers.

    Attributes:
        url: of the server.
        on_get: answers a path.
        on_post: answers a body; called in a thread per connection.
        bodies: of all POST requests so far.
        most_at_once: POST requests in work at the same time, at most.
    """

    def __init__(self, on_post: Callable[[Any], Answer], on_get: Callable[[str], Answer]) -> None:
        self.on_post, self.on_get = on_post, on_get
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self.url = ""

    def post(self, body: Any, headers: dict[str, str]) -> Answer:
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self.on_post(body)
        finally:
            with self._lock:
                self._at_once -= 1


@contextmanager
def json_server(
    on_post: Callable[[Any], Answer], on_get: Callable[[str], Answer] = lambda _path: (404, {})
) -> Iterator[JsonServer]:
    """Run a server until the block ends."""
    state = JsonServer(on_post, on_get)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(*state.on_get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(*state.post(body, dict(self.headers)))

        def reply(self, status: int, answer: Any) -> None:
            if not status:
                self.close_connection = True
                return
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Say nothing: a client that did not wait for a late answer has gone."""

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def late(answer: Answer, seconds: float) -> Answer:
    """Answer after a while."""
    time.sleep(seconds)
    return answer
