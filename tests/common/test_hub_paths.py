"""``hf://`` paths, read from a server on loopback that answers as the hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

REPO = "owner/pairs"


class _Hub(BaseHTTPRequestHandler):
    """Information about a data set, its files by folder and by name, and ranges of their content."""

    folder: Path

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        tree, content = f"/api/datasets/{REPO}/tree/main", f"/datasets/{REPO}/resolve/main/"
        if path.startswith(tree):
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            inside = self.folder / path.removeprefix(tree).strip("/")
            self._json([self._entry(each) for each in sorted(inside.rglob("*") if recursive else inside.iterdir())])
        elif path.startswith(content):
            self._range((self.folder / path.removeprefix(content)).read_bytes())
        elif path in (f"/api/datasets/{REPO}", f"/api/datasets/{REPO}/revision/main"):
            self._json({"id": REPO, "sha": "0" * 40, "siblings": [], "tags": [], "private": False})
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self._json([self._entry(self.folder / name) for name in asked if (self.folder / name).exists()])

    def _entry(self, path: Path) -> dict[str, object]:
        name = str(path.relative_to(self.folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        return {"type": "file", "path": name, "oid": "0" * 40, "size": path.stat().st_size}

    def _range(self, data: bytes) -> None:
        first, last = (int(each) for each in self.headers["Range"].removeprefix("bytes=").split("-"))
        self._send(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    for split in range(2):
        rows = [{"prompt": f"cat {split}", "chosen": b"good", "rejected": b"bad"}] * 3
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"train-{split}.parquet")
    (tmp_path / "README.md").write_text("pairs")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": tmp_path}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


READ = f"""
from smpo_common.store_path import parse_path
from smpo_schemas.pairs import layouts_of, list_pair_files, read_rows, slice_files
for name in ("", "/data", "/data/train-1.parquet", "/data/train-*.parquet"):
    files = list_pair_files([parse_path("hf://datasets/{REPO}" + name)])
    layouts = layouts_of(files)
    pairs = [pair for (rows,) in slice_files(files, 3) for _, pair in read_rows(rows, layouts[rows.path])]
    names = sorted({{layout.name for layout in layouts.values()}})
    print(len(files), len(pairs), names, {{pair.prompt for pair in pairs}})
"""


def test_a_data_set_is_read_from_the_hub(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = str(tmp_path_factory.mktemp("home"))
    settings = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": home, "NO_PROXY": "*"}
    command = [sys.executable, "-c", READ]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" [")[0] for line in lines] == ["2 6", "2 6", "1 3", "2 6"]
    assert all("'chosen-rejected'" in line for line in lines)
    assert "{'cat 1'}" in lines[2]
