"""``inspect`` on hostile files: one line of error, or output that shows their texts harmlessly."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_common.files import write_json
from smpo_pipeline.images.decode import decode_image
from smpo_pipeline.inspection.sheet import text_block
from tests.command import assert_one_line, run_here
from tests.inspection.helpers import make_pairs, make_scores
from tests.pictures import encode, picture

ESCAPE = "\x1b[31m[/red] [bold]"


@pytest.mark.timeout(60)
def test_texts_are_shown_as_they_are_and_the_sheet_is_made(tmp_path, capfd):
    image = encode(picture())
    prompts = [ESCAPE, "a\x00b", "w" * 90_000, "word " * 15_000, "e" + "\u0301" * 5000, "\ud7ff\ue000\U0010ffff"]
    rows = [{"prompt": prompt, "image_0": image, "image_1": image, "annotator": prompt} for prompt in prompts]
    rows.append({"prompt": "w" * 10_000_000, "image_0": image, "image_1": image, "annotator": "me"})
    path, out = tmp_path / "pairs.parquet", tmp_path / "sheet.png"
    pq.write_table(pa.Table.from_pylist(rows), path)
    done = run_here(capfd, "smpo-pipeline", "inspect", path, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "text too long" in done.stdout  # the rest is wrapped, where depends on the folder
    assert "\\x1b[31m[/red]" in done.stdout
    assert "\x1b[31m" not in done.stdout
    assert "\x00" not in done.stdout
    assert decode_image(out.read_bytes()).width > 1000


@pytest.mark.timeout(20)
def test_a_long_word_is_cut_before_it_is_measured():
    assert text_block("w" * 50_000_000, 300, lines=3).width == 300


def test_damaged_pairs_and_scores_are_one_line(tmp_path, capfd):
    pairs = make_pairs(tmp_path / "pairs.parquet")
    data = pairs.read_bytes()
    pairs.write_bytes(data[:-40])
    assert_one_line(run_here(capfd, "smpo-pipeline", "inspect", pairs), "pairs.parquet")
    scores = make_scores(tmp_path / "scores")
    (scores / "rejected.parquet").write_bytes(b"PAR1")
    assert_one_line(run_here(capfd, "smpo-pipeline", "inspect", scores), "rejected.parquet")
    info = json.loads((scores / "scores.json").read_text())
    info["parts"][0]["name"] = "../../elsewhere"
    write_json(scores / "scores.json", info)
    assert_one_line(run_here(capfd, "smpo-pipeline", "inspect", scores), "scores.json is malformed", "parts.0.name")


def test_shards_with_other_scores_than_their_manifest_names(tmp_path, capfd, shards):
    manifest = json.loads((shards / "manifest.json").read_text())
    for entry in [*manifest["shards"], *([manifest["index"]] if manifest["index"] else [])]:
        (tmp_path / entry["name"]).write_bytes((shards / entry["name"]).read_bytes())
    manifest["rewards"] = {}
    write_json(tmp_path / "manifest.json", manifest)
    done = run_here(capfd, "smpo-pipeline", "inspect", tmp_path, "--samples", 0)
    assert_one_line(done, "has scores of", "manifest", "[]")
