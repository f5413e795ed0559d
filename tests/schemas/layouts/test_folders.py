"""Pairs that are folders of images: kohya-like and SimpleTuner's."""

from __future__ import annotations

import pytest

from smpo_common.errors import UserError
from smpo_schemas.pairs import PairRejectedError
from tests.schemas.layouts.helpers import layout_names, listed, preferred, read, write_images, write_json


def write_captions(folder, **captions: str):
    for name, text in captions.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8-sig")


@pytest.mark.parametrize(("win", "lose"), [("w", "l"), ("chosen", "rejected")])
def test_two_folders(tmp_path, win, lose):
    write_images(tmp_path, [f"{win}/{n}.png" for n in range(20)] + [f"{lose}/{n}.webp" for n in range(1, 21)])
    write_captions(tmp_path / win, **{str(n): f"größer {n}\nsecond line" for n in range(2, 20)})
    write_captions(tmp_path / lose, **{str(n): f"other {n}" for n in (1, 2)})
    assert layout_names(tmp_path) == ["win-lose-folders"]
    found = read(tmp_path)
    pairs = [each for each in found if not isinstance(each, PairRejectedError)]
    assert len(found) == 21
    assert [str(each) for each in found if isinstance(each, PairRejectedError)] == [
        "no prompt: column 'prompt' is empty or not text",  # 0 has no caption
        "no prompt: column 'prompt' is empty or not text",  # 20 has no preferred image
    ]
    assert {pair.prompt for pair in pairs} == {"other 1", *(f"größer {n}" for n in range(2, 20))}
    assert all(preferred(pair).startswith(f"{win}/".encode()) for pair in pairs)
    assert {pair.label for pair in pairs} == {0.0, 1.0}


def test_a_missing_image_is_named(tmp_path):
    write_images(tmp_path, ["w/a.png", "l/b.png"])
    write_captions(tmp_path / "w", a="a cat")
    write_captions(tmp_path / "l", b="a dog")
    assert [str(each) for each in read(tmp_path)] == [
        "no image: rejected holds no bytes and no path", "no image: chosen holds no bytes and no path"
    ]  # fmt: skip


def test_suffixes_in_concept_folders(tmp_path):
    """Kohya's folders are named by how often their images are repeated."""
    for folder, name in (("10_cat", "cat"), ("5_dog", "dog")):
        write_images(tmp_path / folder, [f"{name}_w.png", f"{name}_l.jpg", "alone.png"])
    write_captions(tmp_path / "10_cat", cat="a cat")
    write_captions(tmp_path / "5_dog", dog_w="a dog")
    assert layout_names(tmp_path) == ["win-lose-suffixes"] * 2
    pairs = read(tmp_path)
    assert [pair.prompt for pair in pairs] == ["a cat", "a dog"]
    assert [preferred(pair) for pair in pairs] == [b"cat_w.png", b"dog_w.png"]


def test_a_changed_caption_is_another_input(tmp_path):
    write_images(tmp_path, ["w/a.png", "l/a.png"])
    digests = []
    for text in ("a cat", "a dog", "a cat"):
        write_captions(tmp_path / "w", a=text)
        digests.append(listed(tmp_path)[0].digest)
    assert digests[0] == digests[2] != digests[1]


def test_two_images_of_one_name_are_refused(tmp_path):
    write_images(tmp_path, ["w/a.png", "w/a.jpg", "l/a.png"])
    with pytest.raises(UserError, match="a.jpg and .*a.png have one name"):
        listed(tmp_path)


def backend(**changes: object) -> list[dict]:
    preferred_set = {
        "id": "preferred", "dataset_type": "image", "type": "local", "instance_data_dir": "win",
        "conditioning_data": ["rejected", "mask"],
    }  # fmt: skip
    rejected_set = {
        "id": "rejected", "dataset_type": "conditioning", "conditioning_type": "reference_strict", "type": "local",
        "instance_data_dir": "lose", "source_dataset_id": "preferred",
    }  # fmt: skip
    mask = rejected_set | {"id": "mask", "conditioning_type": "mask", "instance_data_dir": "mask"}
    return [preferred_set | changes, rejected_set, mask, {"id": "text", "dataset_type": "text_embeds"}]


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ({}, "from the file"),
        ({"caption_strategy": "filename"}, "a red cat"),
        ({"caption_strategy": "instanceprompt", "instance_prompt": "sks cat"}, "sks cat"),
    ],
)
def test_simpletuner(tmp_path, given, prompt):
    write_images(tmp_path, ["win/deep/a_red_cat.png", "lose/deep/a_red_cat.png", "mask/deep/a_red_cat.png"])
    write_captions(tmp_path / "win" / "deep", a_red_cat="from the file")
    path = write_json(tmp_path / "multidatabackend.json", backend(**given))
    assert layout_names(path) == ["simpletuner"]
    (pair,) = read(path)
    assert (pair.prompt, preferred(pair)) == (prompt, b"win/deep/a_red_cat.png")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "aws"}, "data set preferred is of type aws"),
        ({"caption_strategy": "parquet"}, "caption_strategy 'parquet' of preferred is not read"),
        (
            {"instance_data_dir": "elsewhere"},
            "instance_data_dir 'elsewhere' of preferred is no folder here.*--image-root",
        ),
    ],
)
def test_what_is_not_read_of_simpletuner(tmp_path, given, message):
    write_images(tmp_path, ["win/a.png", "lose/a.png"])
    with pytest.raises(UserError, match=message):
        listed(write_json(tmp_path / "multidatabackend.json", backend(**given)))


def test_patterns(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split, ["w/a.png", "l/a.png"])
        write_captions(tmp_path / split / "w", a=split)
    assert [pair.prompt for pair in read(tmp_path / "tr*")] == ["train"]
    assert [pair.prompt for pair in read(tmp_path / "t*")] == ["test", "train"]
    with pytest.raises(UserError, match=r"x\* does not exist"):
        listed(tmp_path / "x*")
