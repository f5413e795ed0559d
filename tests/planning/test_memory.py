"""The memory account on the command line: from configs alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smpo_common.options import fields_of
from smpo_models.loading import load_family
from smpo_pipeline.planning.options import MemoryOptions
from smpo_pipeline.terminal import format_bytes
from smpo_trainer.settings import TrainSettings
from tests.command import assert_one_line, run_here
from tests.tiny.families import FAMILIES
from tests.tiny.stable_diffusion import make_tiny_model


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights."""
    folder = make_tiny_model(tmp_path_factory.mktemp("configs") / "model")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


def test_the_flags_are_those_of_the_trainer():
    trainers = {name: field.annotation for name, field, *_ in fields_of(TrainSettings)}
    own = {name: field.annotation for name, field, *_ in fields_of(MemoryOptions)}
    assert own.pop("gpu_memory") == float | None
    assert own.pop("train_batch_size") is trainers["batch_size"]
    assert own == {name: trainers[name] for name in own}


@pytest.mark.slow
def test_configs_alone_say_what_fits(configs, tmp_path, capfd):
    written = tmp_path / "plan.json"
    lora = ("--lora-rank", 4, "--quantize", "nf4", "--gradient-checkpointing", "--train-batch-size", 1)
    flags = ("--model", configs, "--gpu-memory", 0.01, "--batch-size", 2, "--json", written)
    done = run_here(capfd, "smpo-pipeline", "plan", *flags)
    assert done.returncode == 0, done.stderr
    assert "smpo-train does not fit in 0.01 GB" in done.stdout
    assert "a smaller --train-batch-size, --gradient-checkpointing" in done.stdout
    memory = json.loads(written.read_text())["memory"]
    parts = ("weights", "text_encoders", "optimizer", "gradients", "activations")
    assert memory["train_total"] == sum(memory["train"][part] for part in parts) > 0.01e9
    assert f"a checkpoint takes {format_bytes(memory['train']['checkpoint'])} of disk" in done.stdout
    run_here(capfd, "smpo-pipeline", "plan", *flags, "--source", "tracked")
    assert (json.loads(written.read_text())["memory"]["invert"]["encoding"], memory["invert"]["encoding"] > 0) == (0, 1)
    less = run_here(capfd, "smpo-pipeline", "plan", *flags, *lora)
    assert "smpo-train fits in 0.01 GB" in less.stdout
    assert json.loads(written.read_text())["memory"]["train_total"] < memory["train_total"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_accounted_for(name, tmp_path, capfd):
    family = load_family(str(FAMILIES[name](tmp_path / "model")), ())
    side = ("--resolution", max(32, family.resolution_limits()[0]))
    flags = ("--model", tmp_path / "model", "--gpu-memory", 80, *side)
    adapted = run_here(capfd, "smpo-pipeline", "plan", *flags, "--lora-rank", 4)
    if not family.lora_targets:
        assert_one_line(adapted, "--lora-rank 4", "diffusers has no LoRA", name)
        adapted = run_here(capfd, "smpo-pipeline", "plan", *flags)
    assert "smpo-train fits in 80 GB" in adapted.stdout, adapted.stderr


def test_quantized_weights_cannot_all_be_trained(configs, capfd):
    done = run_here(capfd, "smpo-pipeline", "plan", "--model", configs, "--quantize", "int8")
    assert_one_line(done, "--quantize int8", "--lora-rank")
