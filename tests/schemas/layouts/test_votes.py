"""Counts and shares of votes as labels: Rapidata, open-image-preferences, HPDv2."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_common.errors import UserError
from smpo_schemas.pairs import PairRejectedError, RowRange, read_prompts
from tests.schemas.layouts.helpers import layout_names, listed, preferred, read, share_of, write_images, write_json

IMAGES = {"image1": {"bytes": b"one", "path": "a.jpg"}, "image2": {"bytes": b"two", "path": None}}
BASE = {"prompt": "a cat", **IMAGES, "model1": "flux", "model2": "sd3"}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def test_rapidata_counts_of_votes_in_all_splits(tmp_path):
    """The old style has a split for each thousand rows."""
    for split, votes in (("train_0001", (7, 3)), ("train_0002", (0, 0)), ("train_0003", (2, 2))):
        row = BASE | dict(zip(("votes_image1", "votes_image2"), votes, strict=True)) | {"detailed_results": "[]"}
        write(tmp_path / "data" / f"{split}-00000-of-00001.parquet", row)
    assert layout_names(tmp_path) == ["rapidata"] * 3
    pairs = read(tmp_path)
    assert [(pair.label, pair.votes) for pair in pairs] == [(0.7, 10), (None, None), (0.5, 4)]
    assert (pairs[0].image_0, pairs[0].image_1) == (b"one", b"two")
    assert (pairs[0].further["model_0"], pairs[0].further["model_1"]) == ("flux", "sd3")
    with pytest.raises(UserError, match="--axis preference: this file has votes of one question"):
        listed(tmp_path, axis="preference")


def shares(axis: str, one: float | None, people: int) -> dict:
    details = None if one is None else json.dumps([{"votedFor": "image1"}] * people)
    other = None if one is None else 1 - one
    return {
        f"weighted_results_image1_{axis}": one,
        f"weighted_results_image2_{axis}": other,
        f"detailed_results_{axis}": details,
    }


def test_rapidata_shares_by_axis(tmp_path):
    full = BASE | shares("preference", 0.75, 12) | shares("coherence", 0.25, 9) | shares("alignment", 1.0, 5)
    lacks = BASE | shares("preference", 0.5, 4) | shares("coherence", None, 0) | shares("alignment", 0.0, 3)
    schema = pa.Table.from_pylist([full]).schema
    pq.write_table(pa.Table.from_pylist([full, lacks], schema), tmp_path / "a.parquet")
    labels = {
        axis: [(pair.label, pair.votes) for pair in read(tmp_path, axis=axis)]
        for axis in (None, "coherence", "alignment")
    }
    assert labels[None] == [(0.75, 12), (0.5, 4)]
    assert labels["coherence"] == [(0.25, 9), (None, None)]
    assert labels["alignment"] == [(1.0, 5), (0.0, 3)]
    with pytest.raises(UserError, match="--axis style: this file has results for preference, coherence, alignment"):
        listed(tmp_path, axis="style")


def test_more_results_of_open_image_preferences(tmp_path):
    rows = [
        BASE | {"category": "Anime", "aggregated_results": text} for text in ('{"image1": 6, "image2": 4}', "broken")
    ]
    first, second = read(write(tmp_path / "a.parquet", *rows))
    assert (first.label, first.votes, first.further["category"]) == (0.6, 10, "Anime")
    assert (second.label, second.votes) == (None, None)


def answers(number: int, given: list, status: list | None = None) -> dict:
    hub = "https://huggingface.co/datasets/data-is-better-together/open-image-preferences-v1/resolve/main"
    return {
        "id": f"id {number}",
        "status": "completed",
        "images": {
            "image_1": f"{hub}/image_simplified_sd/{number}.jpg",
            "image_2": f"image_simplified_dev/{number}.jpg",
            "prompt": f"prompt {number}",
            "model_1": "sd", "model_2": "dev", "evolution": "simplified", "category": "Anime", "sub_category": "x",
        },
        "preference.responses": given,
        "preference.responses.users": [str(each) for each in range(len(given))],
        "preference.responses.status": status or ["submitted"] * len(given),
    }  # fmt: skip


def test_answers_of_open_image_preferences(tmp_path):
    rows = [
        answers(0, ["image_1", "image_1", "image_2"]),
        answers(1, ["image_2", "both_good"]),
        answers(2, ["image_1", "image_2"], ["submitted", "discarded"]),
        answers(3, []),
    ]
    path = write(tmp_path / "train.parquet", *rows)
    write_images(
        tmp_path / "images", [f"image_simplified_{side}/{row}.jpg" for side in ("sd", "dev") for row in range(3)]
    )
    assert layout_names(path) == ["open-image-preferences"]
    *pairs, missing = read(path, image_root=tmp_path / "images")
    assert [pair.pair_id for pair in pairs] == ["id 0", "id 1", "id 2"]
    assert [(pair.label, pair.votes) for pair in pairs] == [(pytest.approx(2 / 3), 3), (0.25, 2), (1.0, 1)]
    assert (pairs[1].image_0, pairs[1].image_1) == (b"image_simplified_sd/1.jpg", b"image_simplified_dev/1.jpg")
    assert (pairs[1].prompt, pairs[1].further["model_1"]) == ("prompt 1", "dev")
    assert isinstance(missing, PairRejectedError)
    (file,) = listed(path)
    assert list(read_prompts(RowRange(path, 1, 3), file.layout)) == ["prompt 1", "prompt 2"]


@pytest.mark.parametrize("folder", ["train", ""])
def test_hpdv2_pairs(tmp_path, folder):
    rows = [
        {"prompt": "a", "file_path": ["0.jpg", "1.jpg"], "human_preference": [0, 1], "user_hash": "u"},
        {"prompt": "b", "file_path": ["2.jpg", "3.jpg"], "human_preference": [1, 0], "user_hash": None},
        {"prompt": "c", "file_path": ["2.jpg", "3.jpg"], "human_preference": [1, 1]},
        {"prompt": "d", "file_path": ["2.jpg"], "human_preference": [1]},
        {"prompt": "e", "file_path": ["2.jpg", "3.jpg"], "human_preference": "yes"},
    ]
    write_images(tmp_path / folder, [f"{number}.jpg" for number in range(4)])
    *pairs, short, odd = read(write_json(tmp_path / "train.json", rows))
    assert [pair.label for pair in pairs] == [0.0, 1.0, 0.5]
    assert (pairs[0].annotator, pairs[1].image_0) == ("u", b"2.jpg")
    assert str(short).startswith("no image: file_path")
    assert str(odd).startswith("bad label: human_preference")


def test_hpdv2_rankings_by_each_annotator(tmp_path):
    ranks = [[1, 2, 3], [2, 1, 3], [1, 1, 2], [1, 3, 2]]
    people = [{"rank": each, "user_hash": str(number)} for number, each in enumerate(ranks)]
    rows = [
        {"prompt": "a", "image_path": ["0.jpg", "1.jpg", "2.jpg"], "rank": [1, 2, 3], "raw_annotations": people},
        {"prompt": "b", "image_path": ["3.jpg", "4.jpg"], "rank": [2, 1]},
    ]
    write_images(tmp_path / "test", [f"{number}.jpg" for number in range(5)])
    path = write_json(tmp_path / "test.json", rows)
    assert layout_names(path) == ["hpdv2-rankings"]
    *of_a, of_b = read(path)
    shares_of_a = {frozenset((p.image_0, p.image_1)): (share_of(p, min(p.image_0, p.image_1)), p.votes) for p in of_a}
    # 0 before 1: rankings 1 and 4, not 2, and a tie in 3; 0 before 2: all; 1 before 2: all but 4.
    assert shares_of_a == {
        frozenset((b"0.jpg", b"1.jpg")): (0.625, 4),
        frozenset((b"0.jpg", b"2.jpg")): (1.0, 4),
        frozenset((b"1.jpg", b"2.jpg")): (0.75, 4),
    }
    assert (preferred(of_b), of_b.votes, of_b.prompt) == (b"4.jpg", None, "b")


def image_of(prompt: int, number: int, rank: int | None) -> dict:
    return {
        "image_path": f"images/train/train_1/{prompt}-{number}.webp", "prompt_id": f"p{prompt}",
        "prompt": f"prompt {prompt}", "classification": "People", "image_amount_in_total": 4, "rank": rank,
        "overall_rating": 4, "image_text_alignment_rating": 3, "fidelity_rating": 5,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_image_reward_db_rankings_and_ties(tmp_path, kind):
    """Rows of two prompts, mixed; paths start from the root of the data set, wherever the table lies."""
    rows = [
        image_of(0, 0, 1),
        image_of(1, 0, 2),
        image_of(0, 1, 2),
        image_of(1, 1, 1),
        image_of(0, 2, 2),
        image_of(1, 2, None),
    ]
    write_images(tmp_path, [row["image_path"] for row in rows if row["image_path"] != rows[4]["image_path"]])
    if kind == "json":
        path = write_json(tmp_path / "images" / "train" / "train_1" / "train_1.json", rows)
    else:
        path = write(tmp_path / "metadata-train.parquet", *rows)
    assert layout_names(path) == ["image-reward-db"]
    found = read(path, rows_a_unit=4)
    assert len(found) == 6  # three pairs of each prompt
    pairs = [each for each in found if not isinstance(each, PairRejectedError)]
    names = {frozenset((p.image_0[-8:-5], p.image_1[-8:-5])): p for p in pairs}
    assert preferred(names[frozenset((b"0-0", b"0-1"))]).endswith(b"0-0.webp")
    assert preferred(names[frozenset((b"1-0", b"1-1"))]).endswith(b"1-1.webp")
    assert [names[frozenset((b"1-2", other))].label for other in (b"1-0", b"1-1")] == [None, None]
    assert [str(each)[:19] for each in found if isinstance(each, PairRejectedError)] == ["image not readable:"] * 2
    write_images(tmp_path, [rows[4]["image_path"]])
    (tie,) = [p for p in read(path) if {p.image_0[-6:-5], p.image_1[-6:-5]} == {b"1", b"2"} and p.prompt == "prompt 0"]
    assert (tie.label, tie.further["category"]) == (0.5, "People")


def test_rankings_in_two_formats_are_not_read_twice(tmp_path):
    rows = [image_of(0, 0, 1), image_of(0, 1, 2)]
    write(tmp_path / "metadata-train.parquet", *rows)
    write_json(tmp_path / "images" / "train" / "train_1" / "train_1.json", rows)
    with pytest.raises(UserError, match="train_1.json and .*metadata-train.parquet may hold the same pairs"):
        listed(tmp_path)


def test_both_orders_of_a_ranking_are_present(tmp_path):
    rows = [image_of(prompt, number, number) for prompt in range(60) for number in (0, 1)]
    write_images(tmp_path, [row["image_path"] for row in rows])
    pairs = read(write(tmp_path / "metadata-train.parquet", *rows), rows_a_unit=50)
    assert all(preferred(pair).endswith(b"-0.webp") for pair in pairs)
    assert 15 < sum(pair.label for pair in pairs) < 45


@pytest.mark.parametrize("people", [3, True, {"rank": [1, 2]}, "ab", [3], [{"rank": 3}]])
def test_annotations_that_are_none_leave_the_ranks(tmp_path, people):
    write_images(tmp_path, ["0.jpg", "1.jpg"])
    row = {"prompt": "a", "image_path": ["0.jpg", "1.jpg"], "rank": [2, 1], "raw_annotations": people}
    (pair,) = read(write_json(tmp_path / "test.json", [row]))
    assert (preferred(pair), pair.votes) == (b"1.jpg", None)


@pytest.mark.parametrize("count", [256, 257])
def test_a_ranking_of_very_many_images_is_refused_before_its_pairs_are_listed(tmp_path, count):
    rows = [{"image_path": "0.jpg", "prompt_id": "p", "prompt": "a", "rank": 1} for _ in range(count)]
    lists = [{"prompt": "a", "image_path": ["0.jpg"] * count, "rank": [1] * count}]
    for name, content in (("images.json", rows), ("test.json", lists)):
        path = write_json(tmp_path / name, content)
        if count <= 256:
            assert listed(path)[0].rows == 256 * 255 / 2
        else:
            with pytest.raises(UserError, match=f"{name} has 257 images of one prompt"):
                listed(path)
