from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from smpo_pipeline.evaluation import run as run_module
from smpo_pipeline.evaluation.evaluation import Evaluation, prepare_evaluation
from smpo_pipeline.evaluation.options import EvaluateJobOptions, EvaluateOptions, EvaluateSamplingOptions
from smpo_pipeline.generation.suites import PromptSource
from tests.evaluation.stubs import STUBS, EvaluationMaker, write_training
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_unet


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make a whole model and an output of smpo-train: another denoiser for it, with metrics and record."""
    folder = tmp_path_factory.mktemp("models")
    base = make_tiny_model(folder / "base")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        make_tiny_unet().save_pretrained(folder / "tuned" / "unet")
    lines = [f'{{"step": {step}, "loss": {0.7 - step / 100}, "lr": 0.1}}\n' for step in range(1, 9)]
    (folder / "tuned" / "metrics.jsonl").write_text("".join(lines))
    write_training(folder / "tuned", {"redness": 1.0})
    return {"base": base, "tuned": folder / "tuned"}


@pytest.fixture
def stub_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "load_reward", lambda spec, device: STUBS[spec](None, device))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na dog\n\ncat and dog <b>\n")
    return path


@pytest.fixture
def plan_of(models: dict[str, Path], prompts: Path, tmp_path: Path) -> EvaluationMaker:
    """Prepare an evaluation of base against tuned, with some settings replaced."""

    def make(**changes: Any) -> Evaluation:
        # replace() does not validate, which the stubs' names would not pass.
        options = EvaluateOptions.model_construct(
            model=(f"base={models['base']}", f"tuned={models['tuned']}"),
            prompts=PromptSource(None, prompts),
            reward=("brightness",),
            out=tmp_path / "out",
            sampling=EvaluateSamplingOptions(images_per_prompt=3, steps=2, guidance_scale=1.0),
            running=EvaluateJobOptions(batch_size=4, device="cpu"),
        )
        return prepare_evaluation(options.replace(**changes))

    return make
