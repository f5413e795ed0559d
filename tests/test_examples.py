"""The YAML files of examples/ are read by the commands that they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from typer.testing import CliRunner

from smpo_common.options import Options, add_command
from smpo_pipeline.evaluation.options import EvaluateOptions
from smpo_pipeline.jobs.generate.options import GenerateOptions
from smpo_pipeline.jobs.invert.options import InvertOptions
from smpo_pipeline.jobs.score.options import ScoreOptions
from smpo_pipeline.rounds.check import check_stages
from smpo_pipeline.rounds.children import resolve_training
from smpo_pipeline.rounds.options import RoundsOptions
from smpo_pipeline.selection.options import SelectOptions
from smpo_trainer.beta_decay import BetaDecay
from smpo_trainer.settings import TrainSettings

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*/*.yaml"))
MODELS: dict[str, type[Options]] = {
    "generate": GenerateOptions,
    "score": ScoreOptions,
    "select": SelectOptions,
    "invert": InvertOptions,
    "train": TrainSettings,
    "evaluate": EvaluateOptions,
    "rounds": RoundsOptions,
}
HUB_MODELS = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "madebyollin/sdxl-vae-fp16-fix",
    "stabilityai/stable-diffusion-3.5-medium",
    "black-forest-labs/FLUX.1-dev",
)


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Parse a file as its command does, in a folder where the data, earlier outputs and cached models are."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for model in HUB_MODELS:
        (cache / repo_folder_name(repo_id=model, repo_type="model")).mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "prompts.txt").touch()
    (tmp_path / "examples").symlink_to(EXAMPLES)
    for run in {tmp_path / "runs" / file.parent.name for file in FILES}:
        for name in ("candidates", "scores", "selected/scores"):
            (run / name).mkdir(parents=True)
        (run / "selected/pairs.parquet").touch()
    monkeypatch.chdir(tmp_path)

    def parse(file: Path) -> Options:
        app, seen = typer.Typer(), []

        def command(options: Any) -> None:
            seen.append(options)

        command.__annotations__["options"] = MODELS[file.stem]
        add_command(app, command)
        done = CliRunner().invoke(app, ["--config", str(file)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        (options,) = seen
        return options

    return parse


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_it_is_read_as_it_stands(read: Any, file: Path) -> None:
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    values = read(file).flat_values()
    for name, value in written.items():
        if not isinstance(value, list | str):  # paths become absolute, rewards mappings
            assert values[name] == value, name
    command = {"train": "smpo-train"}.get(file.stem, f"smpo-pipeline {file.stem}")
    assert file.read_text().startswith(f"# {command} --config examples/{file.parent.name}/{file.name}\n")


@pytest.mark.parametrize("folder", sorted({file.parent.name for file in FILES} - {"rounds"}))
def test_the_stages_fit_together(folder: str) -> None:
    """Each stage reads what the one before it writes, of the same model and pairs."""
    stages = {
        file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in FILES if file.parent.name == folder
    }
    invert, train, evaluate = stages["invert"], stages["train"], stages["evaluate"]
    score = stages.get("score") or yaml.safe_load((EXAMPLES / "sd15" / "score.yaml").read_text(encoding="utf-8"))
    if select := stages.get("select"):
        assert [stages["generate"]["out"]] == score["pairs"] == select["candidates"]
        assert stages["generate"]["model"] == invert["model"]
        assert select["scores"] == score["out"]
        assert invert["pairs"] == [f"{select['out']}/pairs.parquet"]
        assert invert["scores"] == f"{select['out']}/scores"
    else:
        assert invert.get("scores", score["out"]) == score["out"]  # only what learns from labels has none
        assert invert["pairs"] == score["pairs"]
    assert train["shards"] == [invert["out"]]
    assert train["model"] == invert["model"]
    assert {reward.partition(":")[0] for reward in train.get("reward", [])} <= set(score["reward"])
    (base, tuned) = (each.partition("=")[2] for each in evaluate["model"])
    assert (base, tuned) == (train["model"], train["out"])
    assert Path(evaluate["prompts"]).name == "prompts.txt"


def test_a_preset_in_a_file_sets_the_other_flags(read: Any) -> None:
    settings = read(EXAMPLES / "sd35-tracked" / "train.yaml")
    assert (settings.loss.gamma, settings.loss.beta, settings.loss.beta_decay) == (1, 5000, BetaDecay(100, 200, 0.5))


def test_the_stages_of_rounds_take_their_flags(read: Any) -> None:
    check_stages(read(EXAMPLES / "rounds" / "rounds.yaml"), resolve_training)


def test_prompts_are_distinct() -> None:
    prompts = (EXAMPLES / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(prompts)) == len(prompts) == 32
