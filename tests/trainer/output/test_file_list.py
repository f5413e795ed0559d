"""The declared files of a run, and the declared content of its record, are those that runs leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smpo_trainer.output.file_list import CHECKPOINT_FILES, RUN_FILES
from smpo_trainer.output.training_record import RewardInMix, TrainedShards, TrainingRecord
from tests.trainer.conftest import Train

PROMPTS = "a red circle\n"


def names(folder: Path) -> set[str]:
    """What a folder holds, as the lists name it."""
    found = {f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir()}
    return {"checkpoint-NNNNNN/" if name.startswith("checkpoint-") else name for name in found}


@pytest.mark.slow
def test_runs_leave_the_declared_files(train: Train, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    options = {"image_prompts": tmp_path / "prompts.txt", "image_sampling_steps": 1, "max_steps": 1}
    full = train("full", ema_decay=0.9, reference="recomputed", **options)
    train("lora", lora_rank=2, max_steps=1, lora_format="kohya")
    # A finished run is not trained again, but its adapter is written in this format, too.
    lora = train("lora", lora_rank=2, max_steps=1, lora_format="comfyui")
    left = names(full) | names(lora)
    assert left == set(RUN_FILES) - {"transformer/", "nonfinite.jsonl", "spikes.jsonl", "best/", "wandb/"}
    assert names(full / "checkpoint-000001") == set(CHECKPOINT_FILES) - {"transformer/"}


def test_the_record_of_a_run_has_the_declared_fields(train: Train) -> None:
    record = json.loads((train(max_steps=1) / "training.json").read_text())
    assert set(record) == set(TrainingRecord.__annotations__)
    assert set(record["rewards"]["taste"]) == set(RewardInMix.__annotations__)
    assert set(record["shards"][0]) == set(TrainedShards.__annotations__)
