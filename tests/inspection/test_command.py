from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from smpo_common.errors import UserError
from smpo_pipeline.cli import app
from smpo_pipeline.inspection.recognise import recognise
from smpo_pipeline.inspection.sheet import text_block, tile
from tests.inspection.helpers import make_pairs, make_scores


def call(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["inspect", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_recognised_by_content(tmp_path: Path, shards: Path) -> None:
    pairs = make_pairs(tmp_path / "data" / "some.parquet") if (tmp_path / "data").mkdir() is None else None
    scores = make_scores(tmp_path / "scores")
    assert recognise(tmp_path / "data") == ("pairs", tmp_path / "data")
    assert pairs is not None
    assert recognise(pairs) == ("pairs", pairs)
    assert recognise(scores) == recognise(scores / "scores.json") == ("scores", scores)
    assert recognise(shards) == recognise(shards / "manifest.json") == ("shards", shards)
    assert recognise(shards / "shard-000000.tar") == ("shards", shards)
    (tmp_path / "data" / "selection.json").touch()
    assert recognise(tmp_path / "data") == ("selection", tmp_path / "data")


def test_pairs_sheet(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs.parquet")
    out = tmp_path / "sheet.png"
    assert f"contact sheet: {out}" in call(pairs, "--out", out, "--scores", make_scores(tmp_path / "scores"))
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        assert image.height > 1000


def test_shards_sheet_in_the_current_folder(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "contact sheet: inspect-trajectories.png" in call(shards, "--samples", 1)
    with Image.open("inspect-trajectories.png") as image:
        image.load()
        assert image.width > 1000


def test_scores_and_no_samples_write_no_sheet(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "contact sheet" not in call(make_scores(tmp_path / "scores"))
    assert "contact sheet" not in call(shards, "--samples", 0)
    assert list(tmp_path.glob("*.png")) == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "does not exist"),
        ([], "holds neither"),
        (["shard-000000.tar"], "manifest.json"),
        (["scores-000000.parquet"], "scores.json"),
        (["a.parquet"], "cannot be read"),
    ],
)
def test_wrong_paths_are_one_line(tmp_path: Path, files: list[str] | None, words: str) -> None:
    folder = tmp_path / "in"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).write_bytes(b"damaged")
    with pytest.raises(UserError, match=words):
        call(folder)


def test_another_model_cannot_decode(tmp_path: Path, shards: Path) -> None:
    from tests.tiny.stable_diffusion import make_tiny_model

    other = make_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="another VAE"):
        call(shards, "--model", other, "--out", tmp_path / "sheet.png")
    with pytest.raises(UserError, match="--model"):
        call(shards, "--model", tmp_path / "nothing", "--out", tmp_path / "sheet.png")


def test_text_is_wrapped_and_cut() -> None:
    one, many = text_block("short", 200), text_block("word " * 200, 200, lines=3)
    assert many.width == one.width == 200
    assert many.height == 3 * one.height


def test_tiles_enlarge_small_pictures_without_smoothing() -> None:
    picture = Image.new("RGB", (2, 2), "red")
    picture.putpixel((0, 0), (0, 0, 255))
    shown = tile(picture, 64)
    assert set(shown.getdata()) == {(255, 0, 0), (0, 0, 255)}
    assert tile(None, 64, note="gone").size == (64, 64)
