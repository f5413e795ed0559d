"""JSON lists whose first image is always the preferred one."""

from __future__ import annotations

import json
import math
import tracemalloc

import pytest

from smpo_common.errors import UserError
from smpo_schemas.pairs import PairRejectedError, json_rows
from tests.schemas.layouts.helpers import layout_names, listed, preferred, read, share_of, write_images, write_json

ROW = {"prompt": "größer", "confidence": 0.97, "choice_dist": [12, 4], "model1": "flux", "model2": "kolors"}


def rows_of(count: int) -> list[dict]:
    return [
        ROW | {"path1": f"images/{number}-good.jpg", "path2": f"images/{number}-bad.jpg"} for number in range(count)
    ]


def write(folder, rows, **given):
    write_images(folder, [row[side] for row in rows for side in ("path1", "path2")])
    return write_json(folder / "train.json", rows, **given)


def test_the_larger_share_is_the_first_images_and_positions_are_drawn(tmp_path):
    pairs = read(write(tmp_path, rows_of(200)))
    assert layout_names(tmp_path) == ["hpdv3"]
    assert all(b"good" in preferred(pair) for pair in pairs)
    assert {share_of(pair, preferred(pair)) for pair in pairs} == {0.75}
    first = sum(b"good" in pair.image_0 for pair in pairs)
    assert abs(first - 100) < 4 * math.sqrt(200) / 2  # four standard deviations of a fair coin
    for pair in pairs:
        assert pair.votes == 16
        models = ("flux", "kolors") if b"good" in pair.image_0 else ("kolors", "flux")
        assert (pair.further["model_0"], pair.further["model_1"]) == models
        assert pair.further["confidence"] == 0.97


def test_the_votes_may_come_in_either_order_or_not_at_all(tmp_path):
    rows = rows_of(5)
    rows[1] |= {"choice_dist": [4, 12]}
    del rows[2]["choice_dist"], rows[2]["confidence"]
    rows[3] |= {"choice_dist": [0, 0]}
    rows[4] |= {"choice_dist": [1.0, 0.0]}
    pairs = read(write(tmp_path, rows))
    assert [(share_of(pair, preferred(pair)), pair.votes) for pair in pairs] == [
        (0.75, 16), (0.75, 16), (1.0, None), (1.0, None), (1.0, None)
    ]  # fmt: skip
    assert all(b"good" in preferred(pair) for pair in pairs)


@pytest.mark.parametrize("votes", ["[1e999, 0]", "[NaN, 1]", "[1" + 400 * "0" + ", 1]", '["3", "1"]', "7", "null"])
def test_votes_that_are_no_numbers_are_left_out(tmp_path, votes):
    path = write(tmp_path, rows_of(1))
    row = json.loads(path.read_text())[0]
    path.write_text(json.dumps([{**row, "choice_dist": "VOTES"}]).replace('"VOTES"', votes))
    (pair,) = read(path)
    assert (share_of(pair, preferred(pair)), pair.votes) == (1.0, None)


def test_low_confidence_and_missing_images_are_rejected(tmp_path):
    rows = rows_of(4)
    rows[1] |= {"confidence": 0.5}
    rows[2] |= {"confidence": None}
    path = write(tmp_path, rows)
    (tmp_path / rows[3]["path2"]).unlink()
    found = read(path, min_confidence=0.95)
    assert [str(each) for each in found if isinstance(each, PairRejectedError)] == [
        "low confidence: 0.5 is below 0.95",
        f"image not readable: path2 {str(tmp_path / rows[3]['path2'])!r}: No such file or directory",
    ]
    assert sum(isinstance(each, PairRejectedError) for each in read(path)) == 1


def test_a_choice_that_no_layout_uses_is_refused(tmp_path):
    with pytest.raises(UserError, match="--axis has no effect on the layout hpdv3; it is for"):
        listed(write(tmp_path, rows_of(1)), axis="alignment")
    with pytest.raises(UserError, match="unknown --layout hpd; known: .*hpdv3"):
        listed(tmp_path, layout="hpd")
    with pytest.raises(UserError, match="is not in the layout pick-a-pic, which needs caption, jpg_0, jpg_1"):
        listed(tmp_path / "train.json", layout="pick-a-pic")


def test_images_under_another_root(tmp_path):
    write_images(tmp_path / "elsewhere", ["images/0-good.jpg", "images/0-bad.jpg"])
    (pair,) = read(write_json(tmp_path / "json" / "train.json", rows_of(1)), image_root=tmp_path / "elsewhere")
    assert preferred(pair) == b"images/0-good.jpg"


@pytest.mark.parametrize("head", [b"", b"\xef\xbb\xbf", b" \n"])
@pytest.mark.parametrize("block", [64, 1 << 20])
def test_a_list_is_read_in_blocks_of_any_size_with_a_byte_order_mark(tmp_path, monkeypatch, head, block):
    monkeypatch.setattr(json_rows, "_BLOCK_BYTES", block)
    rows = [{"prompt": 'ä[]{},\\"' * (row % 5), "image_0": "i", "image_1": "i", "row": row} for row in range(2100)]
    write_images(tmp_path, ["i"])
    path = write_json(tmp_path / "x.json", rows, head=head)
    (file,) = listed(path)
    assert (file.rows, len(file.offsets)) == (2100, 3)
    if block > 64:
        assert [pair.prompt for pair in read(path, rows_a_unit=700)] == [row["prompt"] for row in rows]


def test_a_cut_list_is_refused_and_other_json_left_out(tmp_path):
    path = write(tmp_path, rows_of(3))
    (tmp_path / "settings.json").write_text('{\n "a": 1\n}')
    (tmp_path / "prompts.json").write_text('["a cat", "a dog"]')
    assert layout_names(tmp_path) == ["hpdv3"]
    with pytest.raises(UserError, match="neither a JSON list of rows nor JSON Lines"):
        listed(tmp_path / "settings.json")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="train.json is damaged or cut off: byte .* starts no element"):
        listed(tmp_path)


@pytest.mark.slow
def test_a_long_list_is_never_held_as_a_whole(tmp_path):
    path = tmp_path / "train.json"
    rows = rows_of(1)
    path.write_bytes(b"[" + b",".join([json_rows.json.dumps(rows[0]).encode()] * 40_000) + b"]")
    tracemalloc.start()
    (file,) = listed(path, image_root=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert file.rows == 40_000
    assert file.bytes > 6e6
    assert peak < 6e6  # the block, its text and an element; json.loads takes 40 MB
