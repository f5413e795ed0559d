"""Pick-a-Pic as Parquet and as WebDataset."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_common.errors import UserError
from smpo_schemas.pairs import PairRejectedError
from tests.schemas.layouts.helpers import layout_names, listed, read, write_tar

V2 = {
    "are_different": True, "best_image_uid": "b", "caption": "a cat", "created_at": "2023", "has_label": True,
    "image_0_uid": "a", "image_1_uid": "b", "image_0_url": "https://a", "image_1_url": "https://b", "jpg_0": b"zero",
    "jpg_1": b"one", "label_0": 0.0, "label_1": 1.0, "model_0": "m", "model_1": "n", "ranking_id": 7, "user_id": 3,
    "num_example_per_prompt": 1,
}  # fmt: skip


def test_parquet_labels_without_has_label_mean_nothing(tmp_path):
    rows = [V2, V2 | {"label_0": 0.5, "ranking_id": 8}, V2 | {"has_label": False, "label_0": 1.0, "ranking_id": 9}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000.parquet")
    assert layout_names(tmp_path) == ["pick-a-pic"]
    first, tie, unlabelled = read(tmp_path)
    assert (first.pair_id, first.prompt, first.image_0, first.image_1) == ("7", "a cat", b"zero", b"one")
    assert [pair.label for pair in (first, tie, unlabelled)] == [0.0, 0.5, None]
    assert first.annotator == "3"


def samples(*keys: str) -> list[tuple[str, bytes]]:
    return [
        member
        for key in keys
        for member in (
            (f"{key}.jpg_0.jpg", f"{key} zero".encode()),
            (f"{key}.jpg_1.jpg", f"{key} one".encode()),
            (f"{key}.label_0.txt", b"0.0"),
            (f"{key}.label_1.txt", b"1.0"),
            (f"{key}.original_prompt.txt", f"größer {key}".encode()),
        )
    ]


def test_webdataset_mirror(tmp_path):
    write_tar(tmp_path / "00001.tar", samples("0", "1", "2"))
    write_tar(tmp_path / "00000.tar", samples("0"))
    assert layout_names(tmp_path) == ["pick-a-pic-webdataset"] * 2
    pairs = read(tmp_path)
    assert [(pair.prompt, pair.image_0, pair.label) for pair in pairs] == [
        (f"größer {key}", f"{key} zero".encode(), 0.0) for key in "0012"
    ]
    assert pairs[0].pair_id == pairs[1].pair_id
    assert len({pair.pair_id for pair in pairs}) == 3


def test_a_damaged_sample_is_rejected_alone(tmp_path):
    members = samples("a", "b", "c", "d")
    del members[1]  # the second image of a
    members[11] = ("c.label_0.txt", b"nonsense")
    members.append(("d.jpg_0.jpg", b"again"))
    first, second, third, fourth = read(write_tar(tmp_path / "x.tar", members))
    assert str(first).startswith("no image: jpg_1.jpg")
    assert second.prompt == "größer b"
    assert str(third).startswith("bad label")
    assert str(fourth).startswith("value not readable")
    assert all(isinstance(each, PairRejectedError) for each in (first, third, fourth))


@pytest.mark.parametrize("label", ["[1]", "{}", "1" + 400 * "0"])
def test_a_label_that_is_no_number_is_rejected(tmp_path, label):
    members = [member for member in samples("a", "b") if member[0] != "a.label_0.txt"]
    members.insert(1, ("a.json", f'{{"label_0.txt": {label}}}'.encode()))
    first, second = read(write_tar(tmp_path / "x.tar", members))
    assert isinstance(first, PairRejectedError)
    assert second.label == 0


@pytest.mark.slow
def test_units_of_a_tar(tmp_path):
    path = write_tar(tmp_path / "x.tar", samples(*(f"{number:03d}" for number in range(2100))))
    (file,) = listed(path)
    assert (file.rows, len(file.offsets)) == (2100, 3)
    pairs = read(path, rows_a_unit=700)
    assert [pair.prompt for pair in pairs] == [f"größer {number:03d}" for number in range(2100)]


def test_a_tar_of_single_images_is_left_out_of_a_folder(tmp_path):
    """The images of a JSON list lie in a tar beside it."""
    write_tar(tmp_path / "images.tar", [(f"images/{number}.jpg", b"x") for number in range(20)])
    with pytest.raises(UserError, match=r"no rows in any file; .*images.tar holds no WebDataset samples"):
        listed(tmp_path)
    write_tar(tmp_path / "00000.tar", samples("0"))
    assert len(listed(tmp_path)) == 1
    with pytest.raises(UserError, match="holds no WebDataset samples"):
        listed(tmp_path / "images.tar")


def test_named_columns_of_any_webdataset(tmp_path):
    members = [("a.left.png", b"l"), ("a.right.png", b"r"), ("a.json", b'{"text": "a dog", "won": 0.25, "people": 4}')]
    choices = {"prompt": "text", "image_0": "left.png", "image_1": "right.png", "label": "won", "votes": "people"}
    (pair,) = read(write_tar(tmp_path / "x.tar", members), columns=choices)
    assert (pair.prompt, pair.image_0, pair.image_1, pair.label, pair.votes) == ("a dog", b"l", b"r", 0.25, 4)
