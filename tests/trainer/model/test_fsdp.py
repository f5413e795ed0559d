"""FSDP through accelerate, over two CPU processes that accelerate takes for GPUs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from smpo_trainer.output.checkpoints import Checkpoints
from tests.forking import forking_python
from tests.tiny.flow import make_tiny_flux, make_tiny_sd3
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, dying_after, invert_tiny, metrics, run_cli
from tests.trainer.output.test_resume import ENVIRONMENT

# As in docs/guide/training.md.
FSDP = "--num_processes 2 --use_fsdp --fsdp_version 2"
WRAP = "TRANSFORMER_BASED_WRAP"
# Options that accelerate would ask for or warn about.
CHOSEN = "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"


def launch(args: list[str], *, wrap: str = WRAP, **environment: str) -> subprocess.CompletedProcess[str]:
    flags = [*FSDP.split(), "--fsdp_auto_wrap_policy", wrap, *CHOSEN.split()]
    command = ["-m", "accelerate.commands.accelerate_cli", "launch", *flags]
    python = forking_python()
    return subprocess.run(
        [python, *command, "-m", "tests.trainer.fsdp_driver", *args],
        check=False,
        env={**ENVIRONMENT, "PYTHON_EXEC": python, **environment},
        text=True,
        capture_output=True,
        timeout=400,
    )


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a cat\na dog\n")
    return path


@pytest.fixture
def options(prompts: Path) -> dict[str, Any]:
    """A run with everything that differs for a sharded denoiser; some checkpoints directly follow a backward."""
    return {
        "max_steps": 3,
        "beta": 200,
        "grad_accum": 2,
        "save_every": 1,
        "ema_decay": 0.9,
        "val_fraction": 0.3,
        "val_every": 2,
        "image_prompts": prompts,
        "image_every": 2,
        "image_sampling_steps": 2,
    }


def assert_same_course(out: Path, expected: Path) -> None:
    for name in ("step", "loss", "grad_norm"):
        np.testing.assert_allclose(column(out, name), column(expected, name), rtol=1e-4, atol=1e-5, err_msg=name)


def assert_same_held_out_loss(out: Path, expected: Path) -> None:
    losses = [[line["val/loss"] for line in metrics(run) if "val/loss" in line] for run in (out, expected)]
    assert len(losses[0]) == 2
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_fsdp_equals_one_process(
    train: Train, shards: Path, model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """As two processes without it do: ``tests/trainer/output/test_resume.py``."""
    one, sharded = train("one", batch_size=4, **options), tmp_path / "sharded"
    done = launch(arguments(shards, model, sharded, **options))
    assert done.returncode == 0, done.stderr
    assert_same_course(sharded, one)
    assert_same_held_out_loss(sharded, one)
    # Each process holds its own shard.
    held = [tuple(map(int, pair)) for pair in re.findall(r"holds (\d+) of (\d+)", done.stderr)]
    assert len(held) == 2
    assert all(0.4 < part / total < 0.6 for part, total in held)
    assert sum(part for part, _ in held) == held[0][1]
    # Saved tensors are full, and diffusers loads them.
    unet = UNet2DConditionModel.from_pretrained(sharded / "unet")
    expected = UNet2DConditionModel.from_pretrained(one / "unet").state_dict()
    start = UNet2DConditionModel.from_pretrained(model / "unet").state_dict()
    assert all(type(parameter) is torch.nn.Parameter for parameter in unet.parameters())
    for name, tensor in unet.state_dict().items():
        moved, difference = (expected[name] - start[name]).norm(), (tensor - expected[name]).norm()
        assert difference <= 0.05 * moved, name
    for step in (0, 2, 3):
        images = [
            np.asarray(Image.open(out / "validation" / f"step-{step:06d}.png"), dtype=np.int16)
            for out in (one, sharded)
        ]
        assert np.abs(images[0] - images[1]).max() <= 2


@pytest.mark.long
def test_a_run_resumes_with_and_without_fsdp(
    train: Train,
    shards: Path,
    model: Path,
    tmp_path: Path,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del options["image_prompts"]
    whole = train("whole", batch_size=4, **options)
    out = tmp_path / "run"
    sharded = arguments(shards, model, out, **options)
    assert "error: power cut" in launch(sharded, POWER_CUT="1").stderr
    assert (out / "checkpoint-000001").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dying_after(2))
        assert run_cli(monkeypatch, arguments(shards, model, out, batch_size=4, **options)) == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    done = launch(sharded)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 2 of 3" in done.stdout
    assert_same_course(out, whole)
    assert_same_held_out_loss(out, whole)
    expected = load_file(whole / "unet/diffusion_pytorch_model.safetensors")
    for name, tensor in load_file(out / "unet/diffusion_pytorch_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=5e-5)


@pytest.mark.long
@pytest.mark.parametrize("wrap", [WRAP, "NO_WRAP"])
def test_adapter_with_live_reference(train: Train, shards: Path, model: Path, tmp_path: Path, wrap: str) -> None:
    options = {"max_steps": 3, "beta": 200, "lora_rank": 2, "reference": "live", "gradient_checkpointing": True}
    one = train("one", batch_size=4, **options)
    sharded = arguments(shards, model, tmp_path / "sharded", save_every=1, **options)
    assert "error: power cut" in launch(sharded, wrap=wrap, POWER_CUT="1").stderr
    done = launch(sharded, wrap=wrap)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 1 of 3" in done.stdout
    assert_same_course(tmp_path / "sharded", one)
    tensors, expected = (load_file(out / "pytorch_lora_weights.safetensors") for out in (tmp_path / "sharded", one))
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=5e-5)


@pytest.mark.long
def test_arithmetic_in_bf16_is_that_of_the_reference(train: Train, shards: Path, model: Path, tmp_path: Path) -> None:
    options = {"max_steps": 1, "dtype": "bf16", "reference": "recomputed"}
    one = train("one", batch_size=4, **options)
    done = launch(arguments(shards, model, tmp_path / "sharded", **options))
    assert done.returncode == 0, done.stderr
    # The reference errors were computed before sharding.
    assert column(tmp_path / "sharded", "drift") == [0]
    # Autograd sums the gradients of a tensor with two uses in another order.
    np.testing.assert_allclose(column(tmp_path / "sharded", "grad_norm"), column(one, "grad_norm"), rtol=1e-2)


@pytest.mark.parametrize(
    ("make", "blocks", "options"),
    [
        pytest.param(make_tiny_sd3, ["JointTransformerBlock"], {}, marks=pytest.mark.slow, id="sd3"),
        pytest.param(
            make_tiny_flux,
            ["FluxSingleTransformerBlock", "FluxTransformerBlock"],
            {"lora_rank": 2, "dtype": "bf16", "gradient_checkpointing": True},
            marks=pytest.mark.long,
            id="flux, narrow below an adapter",
        ),
    ],
)
def test_transformers_are_gathered_block_by_block(
    train: Train, tmp_path: Path, make: Callable[[Path], Path], blocks: list[str], options: dict[str, Any]
) -> None:
    model = make(tmp_path / "model")
    shards = invert_tiny(model, tmp_path / "shards")
    options = {"max_steps": 3, "beta": 200, "reference": "recomputed", **options}
    one = train("one", on=shards, base=model, batch_size=4, **options)
    done = launch(arguments(shards, model, tmp_path / "sharded", **options))
    assert done.returncode == 0, done.stderr
    (gathered,) = set(re.findall(r"gathers (.*)", done.stderr))
    assert all(block in gathered for block in blocks)
    held = [tuple(map(int, pair)) for pair in re.findall(r"holds (\d+) of (\d+)", done.stderr)]
    assert len(held) == 2
    assert all(0.4 < part / total < 0.6 for part, total in held)
    if options.get("dtype") == "bf16":
        # Autograd sums the gradients of a tensor with several uses in another order.
        np.testing.assert_allclose(column(tmp_path / "sharded", "loss"), column(one, "loss"), rtol=2e-3)
        assert column(tmp_path / "sharded", "drift")[0] == 0
        return
    assert_same_course(tmp_path / "sharded", one)
    (file,) = (one / "transformer").glob("*.safetensors")
    expected = load_file(file)
    for name, tensor in load_file(tmp_path / "sharded" / "transformer" / file.name).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=5e-5)
