"""Folders of images that other programs made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from smpo_common.errors import UserError
from smpo_pipeline.evaluation.image_folders import ImageFolder, read_image_folder
from tests.command import run_here

PROMPTS = ["a cat", "a dog"]


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., None]:
    """Write files, each with its name as content."""

    def write(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)

    return write


def read(folder: Path, images: int = 2, *, more: bool = False) -> ImageFolder:
    return read_image_folder("other", str(folder), PROMPTS, images, more_prompts=more)


@pytest.mark.parametrize(
    "names",
    [
        ["0-0.png", "0-1.png", "1-0.png", "1-1.png"],
        ["00000-08.jpg", "00000-10.png", "00001_9.webp", "00001_10.JPEG"],
        ["00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/9.png", "00001/samples/10.png"],
    ],
)
def test_images_by_their_numbers(tmp_path: Path, put: Callable[..., None], names: list[str]) -> None:
    put(*names[::-1], "grid.txt", "00001/metadata.jsonl")
    found = read(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in found.files] == names
    before = found.identity
    assert read(tmp_path).identity == before
    (tmp_path / names[2]).write_text("another image")
    assert read(tmp_path).identity != before


def test_one_image_of_each_prompt_and_of_more_prompts(tmp_path: Path, put: Callable[..., None]) -> None:
    put("0.png", "1.png", "2.png")
    assert [file.name for file in read(tmp_path, 1, more=True).files] == ["0.png", "1.png"]
    with pytest.raises(UserError, match="2.png is of prompt 2, but --prompts has 2, numbered from 0"):
        read(tmp_path, 1)


def test_images_by_a_table(tmp_path: Path, put: Callable[..., None]) -> None:
    put("x/b.png", "x/a.png", "c.png")
    rows = [("x/b.png", " a cat "), ("c.png", "a dog"), ("x/a.png", "a bird")]
    lines = [json.dumps({"file_name": name, "text": prompt}) for name, prompt in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert [file.name for file in read(tmp_path, 1, more=True).files] == ["b.png", "c.png"]
    with pytest.raises(UserError, match="a.png is of a prompt that --prompts lacks: 'a bird'"):
        read(tmp_path, 1)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("\ufefffile_name,prompt\nx/b.png,a cat\nc.png,a dog\n", encoding="utf-8")
    assert [file.name for file in read(tmp_path, 1).files] == ["b.png", "c.png"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "--images other=.*: the folder holds no images"),
        (["cat.png"], "cat.png does not say whose it is; name images PROMPT.png"),
        (["1-0.png", "1-1.png", "2-0.png", "2-1.png"], "2-0.png is of prompt 2, but --prompts has 2, numbered from 0"),
        (["0-0.png", "0-1.png", "1-0.png"], "1 of 2 prompts do not have 2 images .* prompt 1, with 1: 'a dog'"),
        (["0.png", "1.png"], "each prompt has 1 images; give --images-per-prompt 1, not 2"),
        (["0-1.png", "0-01.png", "1-0.png", "1-1.png"], "have no numbers of their own"),
        (["0/samples/a.png"], "a.png in .* have no numbers"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, put: Callable[..., None], names: list[str], words: str) -> None:
    put(*names)
    with pytest.raises(UserError, match=words):
        read(tmp_path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"file_name": "no.png", "prompt": "a cat"}, "no.png is missing, which metadata.jsonl lists"),
        ({"prompt": "a cat"}, "lacks file_name or prompt"),
        ([], "--images other=.*: metadata.jsonl: line 1 is not a JSON object"),
    ],
)
def test_wrong_tables(tmp_path: Path, row: object, words: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=words):
        read(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--images other=.*nothing is not a folder"):
        read(tmp_path / "nothing")


def test_the_config_of_an_evaluation_without_models_is_taken_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in (0, 1):
            Image.new("RGB", (8, 8), (number, 9, 9)).save(tmp_path / name / f"{number}.png")
    flags = ("--images", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", "--prompts", tmp_path / "prompts.txt")
    flags += ("--images-per-prompt", 1, "--reward", "tests.evaluation.stubs:Brightness", "--device", "cpu")
    first = run_here(capfd, "smpo-pipeline", "evaluate", *flags, "--out", tmp_path / "report")
    assert (first.returncode, first.stderr) == (0, "")
    config = ("--config", tmp_path / "report/config.yaml")
    again = run_here(capfd, "smpo-pipeline", "evaluate", *config, "--out", tmp_path / "again")
    assert (again.returncode, again.stderr) == (0, "")
