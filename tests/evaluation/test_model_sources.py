from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from smpo_common.errors import UserError
from smpo_pipeline.evaluation.model_sources import choose_base, identity, parse_models, reward_identity
from smpo_pipeline.generation.generator import load_generator


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put files into a hub cache, which alone is asked: makes the folder of a repository's one commit."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repository: str) -> Path:
        folder, commit = tmp_path / "hub" / f"models--{repository.replace('/', '--')}", "0" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
        return folder / "snapshots" / commit

    return put


def test_kinds_and_base(models: dict[str, Path], tmp_path: Path, hub: Callable[..., Path]) -> None:
    (hub("owner/some-model") / "model_index.json").write_text("{}")
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


def test_published_denoisers_and_loras(models: dict[str, Path], tmp_path: Path, hub: Callable[..., Path]) -> None:
    """As those of Diffusion-DPO (unet/ alone), LCM (a denoiser at the top) and SPO (a LoRA under any name)."""
    shutil.copytree(models["tuned"] / "unet", hub("mhdang/dpo") / "unet")
    shutil.copytree(models["tuned"] / "unet", hub("owner/lcm"), dirs_exist_ok=True)
    lora = hub("owner/spo")
    for name in ("pytorch_lora_weights.safetensors", "some lora.safetensors"):
        (lora / name).write_bytes(b"x")
    specs = ["dpo=mhdang/dpo", "lcm=owner/lcm", "spo=owner/spo", "other=owner/spo/some lora.safetensors"]
    dpo, lcm, spo, other = parse_models(specs)
    assert [model.kind for model in (dpo, lcm, spo, other)] == ["denoiser", "denoiser", "lora", "lora"]
    assert (spo.lora_file.parent, other.lora_file.name) == (lora, "some lora.safetensors")
    base = str(models["base"])
    (tuned,) = parse_models([f"tuned={models['tuned']}"])
    assert {identity(model, base) for model in (dpo, lcm)} == {identity(tuned, base)}
    prints = {load_generator(model, base, "cpu", "fp32").fingerprint() for model in (dpo, lcm, tuned)}
    assert len(prints) == 1
    (hub("owner/none") / "README.md").write_text("x")
    for spec, words in (
        ("a=owner/none", "--model a=owner/none: .* on the hub has no model_index.json, no unet/config.json"),
        ("a=owner/spo/no.safetensors", "owner/spo on the hub has no file no.safetensors"),
        (
            "a=owner/nowhere/x.safetensors",
            "--model a=owner/nowhere/x.safetensors: no such folder: owner/nowhere; as a hub",
        ),
    ):
        with pytest.raises(UserError, match=words):
            parse_models([spec])


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
