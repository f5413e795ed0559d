"""Missing or damaged weights, and those of another model, are one line before any work starts."""

from __future__ import annotations

import pickle
import shutil

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil

from tests.command import assert_one_line, run_here
from tests.rewards.conftest import MAKERS
from tests.tiny.rewards import save_clip_tokenizer
from tests.tiny.stable_diffusion import make_tiny_clip, make_tiny_model

CHECKPOINTS = {
    "pickscore": "model.safetensors",
    "clipscore": "model.safetensors",
    "hpsv2": "HPS_v2_compressed.pt",
    "aesthetic": "sac+logos+ava1-l14-linearMSE.pth",
    "imagereward": "ImageReward.pt",
}


@pytest.fixture
def refused(tmp_path, capfd):
    """Assert that ``score`` prints one line with these parts and writes nothing."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "x", "image_0": "a.png", "image_1": "b.png"}\n')

    def check(spec, *parts):
        out = tmp_path / "out"
        command = ("score", "--pairs", tmp_path / "pairs.jsonl", "--out", out, "--device", "cpu", "--reward", spec)
        assert_one_line(run_here(capfd, "smpo-pipeline", *command), *parts)
        assert not out.exists()

    return check


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_nothing_there(name, refused, tmp_path):
    refused(f"{name}={tmp_path / 'nothing'}", f"--reward {name}=", "nothing")
    (tmp_path / "empty").mkdir()
    refused(f"{name}={tmp_path / 'empty'}", f"--reward {name}=", "empty")
    refused(f"{name}=owner/repository/file.pt", f"--reward {name}=owner/repository/file.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_damaged_file(name, refused, folders, tmp_path):
    folder = shutil.copytree(folders[name], tmp_path / "model")
    file = folder / CHECKPOINTS[name]
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no weights at all"):
        file.write_bytes(content)
        refused(f"{name}={folder}", f"--reward {name}=")


OTHERS = {
    "pickscore": ("hpsv2", "HPS_v2_compressed.pt"),
    "clipscore": ("hpsv2", "HPS_v2_compressed.pt"),
    "hpsv2": ("imagereward", "ImageReward.pt"),
    "aesthetic": ("hpsv2", "HPS_v2_compressed.pt"),
    "imagereward": ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth"),
}
"""The reward whose checkpoint replaces a reward's own."""


@pytest.mark.parametrize("name", OTHERS)
def test_the_weights_of_another_reward(name, refused, folders, tmp_path):
    folder = shutil.copytree(folders[name], tmp_path / "model")
    (folder / CHECKPOINTS[name]).unlink()
    other, file = OTHERS[name]
    shutil.copy(folders[other] / file, folder / file)
    refused(f"{name}={folder}", f"--reward {name}=")


@pytest.mark.parametrize("name", ["hpsv2", "aesthetic", "imagereward"])
def test_a_file_that_would_run_code(name, refused, folders, tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    folder = shutil.copytree(folders[name], tmp_path / "model")
    torch.save({"state_dict": Harm()}, folder / CHECKPOINTS[name], pickle_module=pickle)
    refused(f"{name}={folder}", "is damaged, or is no plain file of weights")
    assert not (tmp_path / "harm").exists()
    for content in ({"weight": "text"}, {0: torch.zeros(1)}):
        torch.save({"state_dict": content}, folder / CHECKPOINTS[name])
        refused(f"{name}={folder}", "state dict")
    shutil.copy(folder / CHECKPOINTS[name], folder / "second.pt")
    refused(f"{name}={folder}", "must hold one checkpoint", "second.pt")


@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_a_folder_whose_bin_file_would_run_code(name, refused, folders, tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    folder = shutil.copytree(folders[name], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Harm()}, folder / "pytorch_model.bin", pickle_module=pickle)
    refused(f"{name}={folder}", f"--reward {name}=", "is damaged, or is no plain file of weights")
    assert not (tmp_path / "harm").exists()


def test_clip_of_another_depth_width_or_kind(refused, tmp_path):
    deeper = make_tiny_clip(tmp_path / "deeper")
    config = CLIPConfig.from_pretrained(deeper)
    config.vision_config.num_hidden_layers = 3
    config.save_pretrained(deeper)
    refused(f"pickscore={deeper}", "lacks 16 weights", "layers.2")
    wider = make_tiny_clip(tmp_path / "wider")
    config = CLIPConfig.from_pretrained(wider)
    config.projection_dim = 24
    config.save_pretrained(wider)
    refused(f"clipscore={wider}", "2 weights of another shape", "text_projection.weight")
    model = make_tiny_model(tmp_path / "sd")
    refused(f"pickscore={model / 'text_encoder'}", "is a 'clip_text_model' model")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_clip_with_another_models_tokenizer_or_processor(name, refused, folders, tmp_path):
    """Without this check nothing would fail, and scores would be wrong."""

    def copied(to, change):
        folder = shutil.copytree(folders[name], tmp_path / to)
        change(folder)
        return f"{name}={folder}"

    def no_tokenizer(folder):
        for file in folder.glob("*token*"):
            file.unlink()

    def other_end(folder):
        config = CLIPConfig.from_pretrained(folder)
        config.text_config.eos_token_id -= 1
        config.save_pretrained(folder)

    def other_size(folder):
        CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24).save_pretrained(folder)

    def not_cropped(folder):
        CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(folder)

    refused(copied("a", no_tokenizer), "its tokenizer is missing or has no vocabulary")
    refused(copied("b", lambda folder: (no_tokenizer(folder), save_clip_tokenizer(folder))), "49408 tokens, the")
    refused(copied("c", other_end), "the tokenizer ends a prompt with token")
    refused(copied("d", other_size), "3 x 24 x 24, the model takes 3 x 32 x 32")
    refused(copied("e", not_cropped), "3 x 51 x 32")


def test_an_open_clip_weight_of_too_few_dimensions(refused, folders, tmp_path):
    folder = shutil.copytree(folders["hpsv2"], tmp_path / "model")
    file = folder / CHECKPOINTS["hpsv2"]
    state = torch.load(file, weights_only=True)["state_dict"]
    for key in ("token_embedding.weight", "visual.conv1.weight"):
        torch.save(state | {key: torch.tensor(1.0)}, file)
        refused(f"hpsv2={folder}", f"--reward hpsv2={folder} cannot be loaded")


def test_the_list_of_makers_is_complete():
    assert set(MAKERS) == set(CHECKPOINTS)
