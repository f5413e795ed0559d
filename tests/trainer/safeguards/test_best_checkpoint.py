"""The best checkpoint by a reward of validation images, and the process that scores them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from smpo_common.errors import UserError
from smpo_models.sharing.model_card import model_card, shared_files
from smpo_pipeline.score_images import score_lines
from smpo_schemas.trained_model import LORA_FILE, lora_file
from smpo_trainer.experiment import resolve_experiment
from smpo_trainer.model.policy import Policy
from smpo_trainer.output.checkpoints import Checkpoint, Checkpoints
from smpo_trainer.safeguards.best_checkpoint import BestCheckpoint
from smpo_trainer.safeguards.spikes import Spike, SpikeDetector
from smpo_trainer.validation.rewards import mean_reward, require_reward
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, collecting, column, metrics, resolve_settings
from tests.trainer.safeguards.redness import REDNESS


def test_a_run_ends_after_so_many_worse_rewards() -> None:
    best = BestCheckpoint(patience=2)
    seen = [(best.update(step, reward), best.has_fallen) for step, reward in enumerate((1.0, 2.0, 1.5, 3.0, 3.0, 2.9))]
    assert seen == [(True, False), (True, False), (False, False), (True, False), (False, False), (False, True)]
    resumed = BestCheckpoint(patience=2)
    resumed.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert (resumed.step, resumed.reward, resumed.has_fallen) == (3, 3.0, True)


@pytest.mark.slow
def test_images_are_scored_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [np.full((4, 6, 3), level, dtype=np.uint8) for level in (10, 30)]
    assert mean_reward(REDNESS, images, ["a", "ünï"], "cpu") == pytest.approx((10 + 1 + 30 + 3) / 2, rel=1e-12)
    # The same program, in this process.
    monkeypatch.setattr("smpo_trainer.validation.rewards._run", lambda spec, *given: score_lines(spec, *_lines(given)))
    assert mean_reward(REDNESS, images, ["a", "b"], "cpu") == 21
    with pytest.raises(UserError, match=f"^--validation-reward {REDNESS}: 1 of 2 validation images have a score$"):
        mean_reward(REDNESS, images, ["a", "none"], "cpu")


def _lines(given: tuple[str, str]) -> tuple[str, list[str]]:
    return given[0], given[1].splitlines()


SCORE_AT_CTRL_C = """
import os, signal
os.killpg(os.getpgid(os.getppid()), signal.SIGINT)
print([7.0])
"""

TRAINER = """
from smpo_trainer.runtime.interrupts import StopRequest
from smpo_trainer.validation import rewards
rewards._PROGRAM = "scorer"
with StopRequest() as stop:
    print(rewards._run("reward", "cpu", ""), int(stop.requested))
"""


def test_ctrl_c_does_not_end_the_scoring(tmp_path: Path) -> None:
    (tmp_path / "scorer.py").write_text(SCORE_AT_CTRL_C)
    trainer = [sys.executable, "-c", TRAINER]
    done = subprocess.run(trainer, cwd=tmp_path, capture_output=True, text=True, check=False, start_new_session=True)
    assert done.stdout == f"[7.0] {int(signal.SIGINT)}\n", done.stderr


@pytest.mark.slow
def test_a_wrong_reward_is_one_line_before_anything_is_loaded(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="^--validation-reward pickscor: --reward pickscor: there is no reward"):
        require_reward("pickscor")
    run = arguments(shards, model, tmp_path / "run", validation_reward="pickscore")
    with pytest.raises(
        UserError, match="^--validation-reward pickscore scores validation images: give --image-prompts"
    ):
        resolve_experiment(resolve_settings(monkeypatch, run), print)
    monkeypatch.setattr("smpo_trainer.validation.rewards.find_spec", lambda _name: None)
    with pytest.raises(UserError, match="^--validation-reward pickscore needs the pipeline's reward models"):
        require_reward("pickscore")


REWARDS = {0: 0.5, 1: 0.6, 2: 0.9, 3: 0.7, 4: 0.8}


def drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fall: float = 0) -> dict[str, object]:
    """Options of a LoRA run that draws after each step; with these rewards, less ``fall`` when a step comes again."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    drawn: list[int] = []

    def reward(spec: str, images: Sequence[np.ndarray], prompts: Sequence[str], device: str) -> float:
        assert (spec, len(images), prompts, device) == (REDNESS, 1, ["a red circle"], "cpu")
        return REWARDS[drawn[-1]] - fall * (drawn.count(drawn[-1]) - 1)

    monkeypatch.setattr("smpo_trainer.train_loop.mean_reward", reward)
    draw = "smpo_trainer.validation.images.ValidationImages.draw"
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    monkeypatch.setattr(draw, lambda _self, step: drawn.append(step) or ([image], image))
    monkeypatch.setattr("smpo_trainer.experiment.require_reward", lambda _spec: None)
    options = {"image_prompts": tmp_path / "prompts.txt", "image_every": 1, "lora_rank": 2}
    return options | {"validation_reward": REDNESS}


@pytest.mark.slow
def test_the_best_model_is_the_result_also_of_a_killed_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = drawing(tmp_path, monkeypatch) | {"max_steps": 9, "save_every": 5, "validation_patience": 2}
    weights: list[dict[str, object]] = []
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", collecting(weights))  # type: ignore[arg-type]
        whole = train("whole", **options)
    assert "ended after step 4 of 9: --validation-reward was highest after step 2" in capsys.readouterr().out
    record = json.loads((whole / "training.json").read_text())
    assert record["best"] == {"step": 2, "reward": 0.9}
    assert record["steps"] == 4
    assert column(whole, "validation_reward") == [0.6, 0.9, 0.7, 0.8]
    assert metrics(whole)[0]["validation_reward/start"] == 0.5
    assert (whole / LORA_FILE).read_bytes() == (whole / "best" / LORA_FILE).read_bytes()
    assert (whole / LORA_FILE).read_bytes() == train("two", lora_rank=2, max_steps=2).joinpath(LORA_FILE).read_bytes()
    for step in (2, 4):
        (whole / "validation").mkdir(exist_ok=True)
        (whole / f"validation/step-{step:06d}.png").touch()
    card = model_card(whole, "name")
    assert "; 0.444 epochs; this is the best by validation images, after step 2 |" in card
    assert "(validation/step-000002.png)" in card
    assert [name for name in shared_files(whole) if "validation" in name] == ["validation/step-000002.png"]
    with monkeypatch.context() as patch:
        # After the checkpoint of the best step was written, before its model was kept.
        patch.setattr("smpo_trainer.output.run_folder.OutputFolder.keep_best", _die)
        with pytest.raises(AssertionError):
            train("killed", **options, on_spike="continue")
    killed = train("killed", **options)
    assert (killed / LORA_FILE).read_bytes() == (whole / LORA_FILE).read_bytes()
    assert column(killed, "validation_reward") == column(whole, "validation_reward")
    capsys.readouterr()
    train("whole", **options | {"max_steps": 20})
    said = capsys.readouterr().out
    assert "ended after step 4 of 20: --validation-reward was highest after step 2, whose model is the result" in said
    assert "resuming" not in said


def _die(*_: object) -> None:
    raise UserError("power cut")


@pytest.mark.slow
def test_the_best_model_stays_when_its_step_comes_again_after_a_rollback(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill follows the second checkpoint of step 2, which is worse than the first one."""
    options = drawing(tmp_path, monkeypatch, fall=0.2) | {"save_every": 1, "validation_patience": 9}
    save = Checkpoints.save

    def save_and_die(self: Checkpoints, checkpoint: Checkpoint, policy: Policy) -> Path:
        path = save(self, checkpoint, policy)
        if checkpoint.step == 2 and checkpoint.optimizer["spikes"]["spikes"]:
            raise UserError("power cut")
        return path

    def first_at_4(self: SpikeDetector, record: dict[str, float]) -> Spike | None:
        return Spike(4, error_ratio=9, usual=1) if record["step"] == 4 and not self.spikes else None

    monkeypatch.setattr(SpikeDetector, "check", first_at_4)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_die)
        with pytest.raises(AssertionError):
            train("run", **options, on_spike="rollback")
    out = train("run", **options, on_spike="rollback", lora_format="kohya")
    assert column(out, "validation_reward") == pytest.approx([0.4, 0.7, 0.5, 0.6])
    assert json.loads((out / "training.json").read_text())["best"] == {"step": 2, "reward": 0.9}
    assert (out / LORA_FILE).read_bytes() == train("two", lora_rank=2, max_steps=2).joinpath(LORA_FILE).read_bytes()
    assert not (out / "best" / lora_file("kohya")).exists()
    assert (out / lora_file("kohya")).is_file()
