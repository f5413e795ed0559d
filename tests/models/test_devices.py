from __future__ import annotations

import pytest
import torch

from smpo_common.errors import UserError
from smpo_models import devices
from smpo_models.devices import choose_device
from tests.command import assert_one_line, run_here
from tests.tiny.stable_diffusion import make_tiny_clip, make_tiny_model


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine without a GPU that torch sees, and its folder of devices."""
    monkeypatch.setattr(devices, "_DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_the_cpu_of_a_machine_with_a_gpu_must_be_asked_for(machine, monkeypatch):
    (machine / "nvidiactl").touch()
    assert choose_device(None) == "cpu"
    (machine / "nvidia0").touch()
    with pytest.raises(UserError, match=rf"{machine}/nvidia0.*--device cpu"):
        choose_device(None)
    assert choose_device("cpu") == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device(None) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(None) == "cuda"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_to_be_had_is_refused(name):
    with pytest.raises(UserError, match=f"--device {name}: "):
        choose_device(name)


@pytest.mark.parametrize("command", ["score", "invert", "evaluate", "plan"])
def test_every_command_refuses_the_silent_cpu(command, machine, tmp_path, capfd):
    (machine / "nvidia0").touch()
    make_tiny_model(tmp_path / "model")
    make_tiny_clip(tmp_path / "clip")
    (tmp_path / "prompts.txt").write_text("a cat")
    common = ("--out", tmp_path / "out", "--model", tmp_path / "model")
    score = ("--reward", f"pickscore={tmp_path / 'clip'}", "--out", tmp_path / "out")
    flags = {
        "score": ("--pairs", tmp_path, *score),
        "invert": ("--pairs", tmp_path, "--scores", tmp_path, *common),
        "plan": ("--pairs", tmp_path, *common),
        "evaluate": ("--model", f"a={tmp_path / 'model'}", "--prompts", tmp_path / "prompts.txt", *score),
    }
    done = run_here(capfd, "smpo-pipeline", command, *flags[command])
    assert_one_line(done, "nvidia0", "--device cpu")
