"""How a model was trained, as an evaluation records it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smpo_common.errors import UserError
from smpo_pipeline.evaluation.provenance import read_training
from tests.evaluation.stubs import write_training


def test_a_run_its_checkpoints_and_its_lora_file(tmp_path: Path) -> None:
    write_training(tmp_path / "run", {"pickscore": 0.25, "clipscore": 1.0})
    (tmp_path / "run" / "checkpoint-000200").mkdir()
    (tmp_path / "run" / "checkpoint-000200" / "pytorch_lora_weights.safetensors").touch()
    for place in ("", "checkpoint-000200", "checkpoint-000200/pytorch_lora_weights.safetensors"):
        shown, rewards = read_training(str(tmp_path / "run" / place))
        assert rewards == ["pickscore", "clipscore"]
        assert shown["rewards"] == "pickscore:0.25, clipscore:1"
        assert (shown["objective"], shown["beta"], shown["steps"], shown["shards"]) == ("smpo", 2000, 200, "a, b")
        assert "lora_rank" not in shown


def test_models_of_unknown_training(tmp_path: Path) -> None:
    assert read_training(str(tmp_path)) == read_training("owner/model") == ({}, [])
    (tmp_path / "training.json").write_text(json.dumps({"settings": {}}))
    with pytest.raises(UserError, match="training.json is not a record of smpo-train"):
        read_training(str(tmp_path))
