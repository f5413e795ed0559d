"""FSDP: accelerate's own, over two processes on the CPU, which it is told are GPUs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from smpo_schemas.errors import UserError
from smpo_trainer.checkpoints import Checkpoint, Checkpoints
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, run_cli
from tests.trainer.test_resume import ENVIRONMENT, TWO_PROCESSES, launch_two

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D",
    # As `accelerate launch` sets it.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def launch(args: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *TWO_PROCESSES, "-m", "tests.trainer.fsdp_driver", *args],
        check=False,
        env={**ENVIRONMENT, **FSDP, **environment},
        text=True,
        capture_output=True,
        timeout=180,
    )


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog\n")
    return path


@pytest.fixture
def options(prompts: Path) -> dict[str, Any]:
    """A run in which all that differs for a denoiser that is cut up happens, and before every step but the first."""
    return {
        "max_steps": 4,
        "beta": 200,
        "grad_accum": 2,
        "save_every": 1,
        "ema_decay": 0.9,
        "val_fraction": 0.3,
        "val_every": 1,
        "validation_prompts": prompts,
        "validation_every": 1,
        "validation_sampling_steps": 2,
    }


def assert_same_course(out: Path, expected: Path, *names: str, rtol: float = 1e-4) -> None:
    for name in ("step", "loss", "grad_norm", "rewards/margins", *names):
        np.testing.assert_allclose(column(out, name), column(expected, name), rtol=rtol, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_cut_up_equals_one_process(
    train: Train, shards: Path, model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    one = train("one", batch_size=4, **options)
    two = tmp_path / "two"
    done = launch(arguments(shards, model, two, batch_size=2, **options))
    assert done.returncode == 0, done.stderr
    assert_same_course(two, one, "val/loss")
    # Each process holds its part alone.
    held = [tuple(map(int, pair)) for pair in re.findall(r"holds (\d+) of (\d+)", done.stderr)]
    assert len(held) == 2
    assert all(0.4 < part / total < 0.6 for part, total in held)
    assert sum(part for part, _ in held) == held[0][1]
    # What is saved is whole, and diffusers' own.
    unet = UNet2DConditionModel.from_pretrained(two / "unet")
    expected = UNet2DConditionModel.from_pretrained(one / "unet").state_dict()
    start = UNet2DConditionModel.from_pretrained(model / "unet").state_dict()
    assert all(type(each) is torch.nn.Parameter for each in unet.parameters())
    for name, tensor in unet.state_dict().items():
        moved, difference = (expected[name] - start[name]).norm(), (tensor - expected[name]).norm()
        assert difference <= 0.05 * moved, name
    for step in range(5):
        images = [
            np.asarray(Image.open(out / "validation" / f"step-{step:06d}.png"), dtype=np.int16) for out in (one, two)
        ]
        assert np.abs(images[0] - images[1]).max() <= 2


@pytest.mark.slow
def test_a_run_goes_on_cut_up_or_not(
    train: Train,
    shards: Path,
    model: Path,
    tmp_path: Path,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = train("whole", batch_size=4, **options)
    out = tmp_path / "run"
    cut_up = arguments(shards, model, out, batch_size=2, **options)
    assert "error: power cut" in launch(cut_up, POWER_CUT="1").stderr
    assert (out / "checkpoint-000001").is_dir()
    save = Checkpoints.save

    def save_and_die(self: Checkpoints, checkpoint: Checkpoint) -> Path:
        path = save(self, checkpoint)
        if checkpoint.step == 3:
            raise UserError("power cut")
        return path

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        assert run_cli(monkeypatch, arguments(shards, model, out, batch_size=4, **options)) == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    done = launch(cut_up)
    assert done.returncode == 0, done.stderr
    assert "going on after step 3 of 4" in done.stdout
    assert_same_course(out, whole, "val/loss")
    expected = load_file(whole / "unet/diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(out / "unet/diffusion_pytorch_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_adapter_with_live_reference_cut_up_equals_ddp(
    shards: Path, model: Path, tmp_path: Path, mixed_precision: str
) -> None:
    options = {"beta": 200, "lora_rank": 2, "reference": "live", "mixed_precision": mixed_precision, "lr": 1e-3}
    options["gradient_checkpointing"] = True
    for name, launcher in (("ddp", launch_two), ("fsdp", launch)):
        done = launcher(arguments(shards, model, tmp_path / name, **options))
        assert done.returncode == 0, done.stderr
    assert_same_course(tmp_path / "fsdp", tmp_path / "ddp")
    tensors, expected = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("fsdp", "ddp"))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
