"""The memory account against a real run: the tensors of a step, and the files of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from smpo_models.loading import load_family
from smpo_models.memory_account.live import LiveTensors
from smpo_models.memory_account.training import TrainingRun, account_training
from smpo_trainer.trainer import Trainer
from tests.tiny.stable_diffusion import IMAGE_SIDE
from tests.trainer.conftest import Train


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_a_run_holds_what_the_account_says(
    train: Train, model: Path, monkeypatch: pytest.MonkeyPatch, lora_rank: int | None
) -> None:
    peaks, train_step = [], Trainer.train_step

    def step(self: Trainer, *args: object) -> object:
        with LiveTensors() as live:
            record = train_step(self, *args)
        peaks.append(live.peak)
        return record

    monkeypatch.setattr(Trainer, "train_step", step)
    lora = {} if lora_rank is None else {"lora_rank": lora_rank}
    out = train(max_steps=2, batch_size=4, dtype="fp32", **lora)
    run = TrainingRun(IMAGE_SIDE, IMAGE_SIDE, batch_size=4, dtype="fp32", lora_rank=lora_rank, gpu=False)
    memory = account_training(load_family(str(model), ()), run)
    # Weights and, in the second step, the optimizer's state were there before.
    assert peaks[1] == pytest.approx(memory.gradients + memory.activations, rel=0.1)
    files = [path for path in (out / "checkpoint-000002").rglob("*") if path.is_file()]
    # Each of the tensors, some hundreds, has a name and a header of its own.
    assert 0 < sum(path.stat().st_size for path in files) - memory.checkpoint < 100_000 + 0.02 * memory.checkpoint
