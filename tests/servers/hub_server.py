"""A server on loopback that answers as the Hugging Face hub does: repositories are made, filled and read.

Large files go by Git LFS, which the hub's library falls back to without Xet; Xet's own server is not imitated.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.hf_file_system import HfFileSystem

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens: one may write to the repositories of ``owner``, the other to none."""

LARGEST_REGULAR = 2000
"""Bytes of a file that is part of a commit."""

_SHA = "0" * 40
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?")
_CONTENT = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/main/(.*)")
_LFS = re.compile(r"/(?:datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch")


class Hub:
    """The hub's state: a folder per repository, ``models/OWNER/NAME`` or ``datasets/OWNER/NAME``.

    Attributes:
        url: of the server.
        private: which repositories are.
        requests: methods and paths so far.
        uploads: paths of the files of each commit.
        failing: pattern of paths that are answered with an error of the server.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, ""
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.uploads: list[list[str]] = []
        self.failing: str | None = None
        self.large: dict[str, bytes] = {}

    def folder(self, name: str) -> Path:
        """Folder of ``models/OWNER/NAME``."""
        return self.root / name

    def make(self, name: str, *, private: bool = False) -> Path:
        """Make a repository."""
        self.folder(name).mkdir(parents=True)
        if private:
            self.private.add(name)
        return self.folder(name)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self._path()
        api, content = _API.fullmatch(path), _CONTENT.fullmatch(path)
        if content:
            file = self.hub.folder(f"{content[1] or 'models/'}{content[2]}") / content[3]
            self._content(file)
        elif api and self.hub.folder(f"{api[1]}/{api[2]}").is_dir():
            self._about(f"{api[1]}/{api[2]}", api[3] or "")
        else:
            self._error(404, "RepoNotFound")

    do_HEAD = do_GET

    def _about(self, repo: str, rest: str) -> None:
        if rest.startswith("tree/main"):
            query = parse_qs(urlsplit(self.path).query)
            inside = self.hub.folder(repo) / rest.removeprefix("tree/main").strip("/")
            found = inside.rglob("*") if query.get("recursive", ["false"])[0].lower() == "true" else inside.iterdir()
            self._json([self._entry(repo, each) for each in sorted(found)])
        elif rest == "auth-check/write" and self._token() != WRITER:
            self._error(403)
        elif rest in ("", "revision/main", "auth-check/write"):
            private = repo in self.hub.private
            self._json({"id": repo.partition("/")[2], "sha": _SHA, "siblings": [], "tags": [], "private": private})
        else:
            self._error(404)

    def do_POST(self) -> None:
        path, body = self._path(), self.rfile.read(int(self.headers["Content-Length"]))
        api = _API.fullmatch(path)
        if self.hub.failing and re.search(self.hub.failing, path):
            self._error(500)
        elif path == "/api/validate-yaml":
            wrong = "license: not-a-license" in json.loads(body)["content"]
            self._json(
                {"errors": [{"message": '"license" must be one of [...]'}], "warnings": []}, 400 if wrong else 200
            )
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif _LFS.fullmatch(path):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._json({"objects": objects, "transfer": "basic"})
        elif api and (api[3] or "").startswith("preupload"):
            folder = self.hub.folder(f"{api[1]}/{api[2]}")
            self._json({"files": [_mode(folder, each) for each in json.loads(body)["files"]]})
        elif api and (api[3] or "").startswith("commit"):
            self._commit(f"{api[1]}/{api[2]}", body)
        elif api and (api[3] or "").startswith("paths-info"):
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            repo = f"{api[1]}/{api[2]}"
            files = [self.hub.folder(repo) / name for name in asked]
            self._json([self._entry(repo, file) for file in files if file.exists()])
        else:
            self._error(404)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self._path().rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.large[oid] = data
        self._json({})

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('type', 'model')}s/{asked['organization'] or 'owner'}/{asked['name']}"
        name = repo.partition("/")[2]
        if self._token() not in (WRITER, READER):
            self._error(401)
        elif self.hub.folder(repo).is_dir():
            self._json(
                {"error": "You already created this", "url": f"{self.hub.url}/{repo.removeprefix('models/')}"}, 409
            )
        elif self._token() == READER or not name.startswith("owner/"):
            self._error(403)
        else:
            self.hub.make(repo, private=asked.get("visibility") == "private")
            self._json({"url": f"{self.hub.url}/{repo.removeprefix('models/')}"})

    def _commit(self, repo: str, body: bytes) -> None:
        files = [json.loads(line) for line in body.splitlines()][1:]
        for each in files:
            value = each["value"]
            target = self.hub.folder(repo) / value["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            large = each["key"] == "lfsFile"
            target.write_bytes(self.hub.large[value["oid"]] if large else base64.b64decode(value["content"]))
        self.hub.uploads.append(sorted(each["value"]["path"] for each in files))
        page = f"{self.hub.url}/{repo.removeprefix('models/')}"
        self._json({"commitUrl": f"{page}/commit/{_SHA}", "commitOid": _SHA})

    def _entry(self, repo: str, path: Path) -> dict[str, object]:
        name = str(path.relative_to(self.hub.folder(repo)))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": _SHA, "size": 0}
        commit = {"id": _SHA, "title": "Upload", "date": "2026-01-02T03:04:05.000Z"}
        return {"type": "file", "path": name, "oid": _SHA, "size": path.stat().st_size, "lastCommit": commit}

    def _content(self, file: Path) -> None:
        if not file.is_file():
            self._error(404, "EntryNotFound")
            return
        data = file.read_bytes()
        if "Range" not in self.headers:
            self._send(200, data, {})
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = data[int(first) : int(last or len(data)) + 1]
        self._send(206, part, {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _error(self, status: int, code: str = "") -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _mode(folder: Path, asked: dict[str, Any]) -> dict[str, object]:
    """How a file is to be sent, and the hash of the one that is there."""
    large, path = asked["size"] > LARGEST_REGULAR, folder / asked["path"]
    answer: dict[str, object] = {
        "path": asked["path"],
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
    }
    if path.is_file():
        data = path.read_bytes()
        answer["oid"] = hashlib.sha256(data).hexdigest() if large else _git_hash(data)
    return answer


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).hexdigest()


@contextmanager
def hub_server(root: Path) -> Iterator[Hub]:
    """Run a hub until the block ends."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process uses, with a token that may write to ``owner/...``."""
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setenv("NO_PROXY", "*")
    with hub_server(tmp_path_factory.mktemp("hub")) as served:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        close_session()
        HfFileSystem.clear_instance_cache()
        yield served
        close_session()
        HfFileSystem.clear_instance_cache()
