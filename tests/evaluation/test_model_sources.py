from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from smpo_common.errors import UserError
from smpo_pipeline.evaluation.model_sources import choose_base, identity, parse_models, reward_identity


def test_kinds_and_base(models: dict[str, Path], tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    found = parse_models([f"base={models['base']}", f"tuned={models['tuned']}", f"lora={lora}", "hub=owner/some-model"])
    assert [model.kind for model in found] == ["pipeline", "denoiser", "lora", "pipeline"]
    assert choose_base(found, None) == str(models["base"])
    assert choose_base(found, "other") == "other"
    assert choose_base(found[:1], None) is None
    assert found[1].metrics == models["tuned"] / "metrics.jsonl"
    assert found[0].metrics is None
    with pytest.raises(UserError, match="--base"):
        choose_base(found[1:3], None)


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["base"], "write NAME=DIR"),
        (["=x"], "write NAME=DIR"),
        (["a/b=x"], "write NAME=DIR"),
        (["a=/nowhere/at/all"], "/nowhere/at/all is neither a folder"),
        (["a=owner/m", "a=owner/n"], "--model a=owner/n: .*'a'"),
        (["a={empty}"], "--model a=.*model_index.json.*unet/config.json"),
    ],
)
def test_unusable_models(tmp_path: Path, specs: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_models([spec.format(empty=tmp_path) for spec in specs])


def test_identity_follows_content_and_not_place(models: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models["base"], copy)
    (here, there) = parse_models([f"a={models['base']}", f"b={copy}"])
    assert identity(here, None) == identity(there, None)
    config = copy / "vae" / "config.json"
    config.write_text(config.read_text().replace("}", " }"))
    assert identity(here, None) != identity(there, None)


def test_identity_of_a_tuned_model_covers_its_base(models: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models["base"], copy)
    (tuned,) = parse_models([f"tuned={models['tuned']}"])
    before = identity(tuned, str(copy))
    unet = copy / "unet" / "config.json"
    unet.write_text(unet.read_text() + "\n")
    assert identity(tuned, str(copy)) == before  # the base's own denoiser is replaced
    text = copy / "text_encoder" / "config.json"
    text.write_text(text.read_text() + "\n")
    assert identity(tuned, str(copy)) != before


def test_a_reward_is_recognised_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    files = {name: folder / name for name in ("w.pt", "config.json", "tokenizer.json", "other.pt", "part/w.npz")}
    for file in files.values():
        file.write_bytes(b"1")

    def changed(spec: str) -> set[str]:
        """List the files whose content is part of the reward's identity."""
        before, found = reward_identity(spec), set()
        for name, file in files.items():
            file.write_bytes(b"2")
            found |= {name} if reward_identity(spec) != before else set()
            file.write_bytes(b"1")
        assert reward_identity(spec) == before
        return found

    assert changed(f"hpsv2={folder / 'w.pt'}") == {"w.pt", "config.json", "tokenizer.json"}
    assert changed(f"mine:Own={folder}") == set(files)
    # A reward without a model, or with a hub id, does not depend on the working directory.
    monkeypatch.chdir(folder)
    for spec in ("toy-truth", "hpsv2", "pickscore=owner/model", "mine:Own="):
        assert changed(spec) == set()
    assert len({reward_identity(spec) for spec in ("toy-truth", "hpsv2", "pickscore=owner/model")}) == 3


def test_linked_folders_are_part_of_an_identity(models: dict[str, Path], tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "reward", tmp_path / "elsewhere"
    shutil.copytree(models["base"], folder / "model")
    shutil.copytree(folder / "model" / "unet", elsewhere / "deep")
    (folder / "model" / "unet" / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (model,) = parse_models([f"a={folder / 'model'}"])

    def both() -> tuple[str, str]:
        return reward_identity(f"mine:Own={folder}"), identity(model, None)

    before = both()
    config = elsewhere / "deep" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert all(old != new for old, new in zip(before, both(), strict=True))
