"""``hf://`` paths, read from a server on loopback that answers as the hub does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.servers.hub_server import hub_server

REPO = "owner/pairs"


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    with hub_server(tmp_path) as hub:
        folder = hub.make(f"datasets/{REPO}")
        for split in range(2):
            rows = [{"prompt": f"cat {split}", "chosen": b"good", "rejected": b"bad"}] * 3
            (folder / "data").mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"train-{split}.parquet")
        (folder / "README.md").write_text("pairs")
        yield hub.url


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
