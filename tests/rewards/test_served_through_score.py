"""``score`` with rewards that servers compute, over Ray: columns by name, reasons, no pair lost."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_schemas.rejects import read_rejects
from smpo_schemas.scoring.scores import read_scores, read_scores_info
from tests.pictures import encode, picture
from tests.servers.json_server import json_server

pytestmark = pytest.mark.slow


def test_pairs_are_scored_or_rejected_with_the_servers_reason(tmp_path, here_on_ray):
    rows = [
        {
            "pair_id": str(number),
            "prompt": "no score" if number == 3 else f"a cat {number}",
            "image_0": encode(picture(30, 20, seed=number)),
            "image_1": encode(picture(30, 20, seed=number + 50)),
        }
        for number in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")

    def lengths(body):
        return 200, {"scores": [None if prompt == "no score" else len(prompt) for prompt in body["prompts"]]}

    with json_server(lengths) as server:
        command = ("score", "--pairs", tmp_path / "pairs.parquet", "--out", tmp_path / "out", "--device", "cpu")
        done = here_on_ray("smpo-pipeline", *command, "--reward", f"http={server.url},name=ocr")
        assert done.returncode == 0, done.stderr
        assert sum(len(body["prompts"]) for body in server.bodies) == 12
        url = server.url
    info = read_scores_info(tmp_path / "out")
    assert (list(info.rewards), info.rewards["ocr"].model) == (["ocr"], url)
    table = read_scores(tmp_path / "out", info)
    assert table["ocr_0"].to_pylist() == table["ocr_1"].to_pylist() == [7.0] * 5
    (reject,) = read_rejects(tmp_path / "out" / "rejected.parquet")
    assert (reject.pair_id, reject.reason) == ("3", f"no answer: {url} has no score for this image (ocr)")
