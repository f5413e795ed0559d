"""Training on shards with stored text: the numbers of live text, and no text encoder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from transformers import CLIPTextModel

from smpo_schemas.manifest import read_manifest
from tests.trainer.conftest import Train
from tests.trainer.helpers import PROMPTS, arguments, column, make_shards, run_cli, with_stored_text
from tests.trainer.output.test_resume import launch_two

NAMES = ("loss", "grad_norm", "val/loss", "error/image_0")
OPTIONS = {"val_fraction": 0.3, "val_every": 1, "beta": 200, "lr": 1e-5}
URL = "memory://bucket/stored"


@pytest.fixture(scope="module")
def stored(shards: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_stored_text(shards, model, tmp_path_factory.mktemp("stored") / "shards")


@pytest.fixture
def no_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a text encoder was loaded")

    monkeypatch.setattr(CLIPTextModel, "from_pretrained", refuse)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stored_equals_live_to_the_bit(
    train: Train, shards: Path, model: Path, tmp_path: Path, dtype: str, request: pytest.FixtureRequest
) -> None:
    live = train("live", dtype=dtype, **OPTIONS)
    made = with_stored_text(shards, model, tmp_path / "made", dtype)
    assert read_manifest(made).text.prompts == len(PROMPTS)
    request.getfixturevalue("no_encoders")
    out = train("stored", on=made, dtype=dtype, **OPTIONS)
    for name in NAMES:
        assert column(out, name) == column(live, name)


@pytest.fixture
def bucket(stored: Path) -> Iterator[MemoryFileSystem]:
    memory = fsspec.filesystem("memory")
    memory.put(str(stored), "/bucket/stored", recursive=True)
    yield memory
    memory.rm("/bucket", recursive=True)


@pytest.mark.slow
def test_text_from_a_url_is_fetched_and_kept_within_the_limit(
    train: Train, shards: Path, tmp_path: Path, bucket: object, no_encoders: None
) -> None:
    """Shards and text are fetched again and again, since the limit is below one of them."""
    options = {"shuffle_window": 1, "max_steps": 9, "beta": 200, "lr": 1e-5, "workers": 2}
    cache = {"cache": tmp_path / "cache", "cache_gib": 0}
    remote = train("remote", on=URL, **cache, **options)
    files = {path.name for path in (tmp_path / "cache").rglob("text/*.safetensors")}
    assert "index.safetensors" in files
    again = train("again", on=URL, cache=tmp_path / "other", **options)
    assert column(remote, "loss") == column(again, "loss")
    assert {path.name for path in (tmp_path / "other").rglob("text/*.safetensors")} == {
        "index.safetensors", "text-000000.safetensors", "text-000001.safetensors",
    }  # fmt: skip


@pytest.mark.slow
def test_a_url_gives_the_numbers_of_live_text(train: Train, shards: Path, tmp_path: Path, bucket: object) -> None:
    options = {"shuffle_window": 1, "max_steps": 4, "beta": 200, "lr": 1e-5}
    live = train("live", **options)
    remote = train("remote", on=URL, cache=tmp_path / "cache", **options)
    assert column(remote, "loss") == column(live, "loss")


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of other pairs of some of the prompts."""
    return make_shards(tmp_path_factory.mktemp("other") / "shards", model, num_pairs=3, seed=1, prefix="other")


@pytest.mark.slow
def test_two_directories_are_joined(
    train: Train, shards: Path, stored: Path, other: Path, model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    live = train("live", on=[shards, other], **OPTIONS)
    second = with_stored_text(other, model, tmp_path / "second")
    request.getfixturevalue("no_encoders")
    joined = train("joined", on=[stored, second], **OPTIONS)
    for name in NAMES:
        assert column(joined, name) == column(live, name)


@pytest.mark.slow
def test_beside_shards_without_stored_text_the_encoders_are_loaded(
    train: Train, shards: Path, stored: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = train("live", on=[shards, other], **OPTIONS)
    capsys.readouterr()
    mixed = train("mixed", on=[stored, other], **OPTIONS)
    assert column(mixed, "loss") == column(live, "loss")
    assert f"the text encoders are loaded, since --shards {other} has no stored text" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "cut", "altered", "no index"])
def test_damage_is_one_line(
    stored: Path,
    model: Path,
    tmp_path: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(stored, tmp_path / "shards")
    name = "index.safetensors" if damage == "no index" else "text-000001.safetensors"
    path = tmp_path / "shards" / "text" / name
    content = path.read_bytes()
    path.unlink()
    if damage in ("cut", "altered"):
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    assert run_cli(monkeypatch, arguments(tmp_path / "shards", model, tmp_path / "run")) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    for words in (str(path), "copy the folder text/", "--overwrite"):
        assert words in said


def test_a_prompt_that_is_not_stored_is_one_line(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = with_stored_text(shards, model, tmp_path / "shards", prompts=PROMPTS[1:])
    assert run_cli(monkeypatch, arguments(lacking, model, tmp_path / "run")) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    for words in (f"text lacks the prompt {PROMPTS[0]!r}", "--overwrite"):
        assert words in said


def test_another_model_is_refused_without_its_text_encoders(
    stored: Path, v_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, arguments(stored, v_model, tmp_path / "run")) == 2
    assert "another noise schedule or prediction type" in capsys.readouterr().err


@pytest.mark.slow
def test_images_are_drawn_by_encoders_that_are_loaded_for_it(train: Train, stored: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    plain = train("plain", on=stored, max_steps=2)
    drawn = train("drawn", on=stored, max_steps=2, image_prompts=prompts, image_sampling_steps=2)
    assert column(drawn, "loss") == column(plain, "loss")
    assert len(list((drawn / "validation").glob("*.png"))) == 2


def test_the_former_flag_is_answered(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.yaml").write_text("text: cache\n")
    for typed, start in (({"text": "cache"}, "unknown flag --text"), ({"config": tmp_path / "old.yaml"}, "--config")):
        assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run", **typed)) == 2
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0
        assert start in said
        assert "`smpo-pipeline invert`" in said


@pytest.mark.long
def test_two_processes_read_the_same_text(train: Train, stored: Path, model: Path, tmp_path: Path) -> None:
    gentle = {"max_steps": 2, "beta": 200, "lr": 1e-5}  # by default a step magnifies rounding
    one = train("one", on=stored, batch_size=4, **gentle)
    two = launch_two(arguments(stored, model, tmp_path / "two", batch_size=2, **gentle))
    assert two.returncode == 0, two.stderr
    assert column(tmp_path / "two", "loss") == pytest.approx(column(one, "loss"), rel=1e-3)
