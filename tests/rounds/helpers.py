"""Rounds whose stages are only pretended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from smpo_common.options import parse_arguments
from smpo_pipeline.evaluation.results import (
    RESULTS_FILE,
    Results,
    RewardEntry,
    Settings,
    find_all,
    write_results,
    write_scores,
)
from smpo_pipeline.rounds.options import RoundsOptions
from smpo_pipeline.rounds.stages import Plan, Training

ALL = ["generate", "score", "select", "invert", "train"]
MARKERS = {
    "generate": "candidates.json",
    "refresh": "refresh.json",
    "score": "scores.json",
    "select": "selection.json",
    "invert": "manifest.json",
    "smpo-train": "training.json",
    "merge": "merged.json",
    "evaluate": RESULTS_FILE,
}
PROMPTS = 8


def config(folder: Path, **more: Any) -> dict[str, Any]:
    """A config that all commands take, and the files that it names."""
    for name in ("model", "clip"):
        (folder / name).mkdir(exist_ok=True)
    for name in ("prompts.txt", "other.txt"):
        if not (folder / name).exists():
            (folder / name).write_text(f"a cat of {name}\n")
    stages = {
        "score": {"reward": [f"pickscore={folder / 'clip'}"]},
        "select": {"by": "extremes"},
        "train": {"max_steps": 3},
    }
    return {"base": str(folder / "model"), "prompts": str(folder / "prompts.txt"), **stages, **more}


def evaluated(folder: Path) -> dict[str, Any]:
    return {"prompts": str(folder / "other.txt"), "reward": "toy-truth"}


def write_config(folder: Path, **more: Any) -> Path:
    path = folder / "rounds.yaml"
    path.write_text(yaml.safe_dump(config(folder, **more)))
    return path


def options_of(folder: Path, *flags: object, **more: Any) -> RoundsOptions:
    arguments = ("--config", write_config(folder, **more), "--out", folder / "out", *flags)
    return parse_arguments(RoundsOptions, [str(each) for each in arguments])


def plan_of(folder: Path, *flags: object, lora: bool = False, **more: Any) -> Plan:
    options = options_of(folder, *flags, **more)
    return Plan(options, Training(lora=lora), options.out / "flags")


def flag(command: Sequence[str], name: str) -> list[str] | None:
    """The values of a flag; None: it is not there."""
    if name not in command:
        return None
    rest = command[command.index(name) + 1 :]
    return list(rest[: next((place for place, word in enumerate(rest) if word.startswith("--")), len(rest))])


class FakeRunner:
    """Writes the last file of each stage; ``scores`` gives each model's scores [P] by its name."""

    def __init__(self, scores: Mapping[str, Sequence[float]] | None = None) -> None:
        self.ran: list[str] = []
        self.scores = scores or {}
        self.before: Callable[[str], int | None] = lambda _stage: None

    def __call__(self, command: Sequence[str]) -> int:
        name = command[1] if command[0] == "smpo-pipeline" else command[0]
        (out,) = flag(command, "--out") or ()
        stage = f"{Path(out).parent.name.removeprefix('round-')} {name}"
        self.ran.append(stage)
        if status := self.before(stage):
            return status
        Path(out).mkdir(parents=True, exist_ok=True)
        if name == "evaluate":
            names = [each.partition("=")[0] for each in flag(command, "--model") or ()]
            write_evaluation(Path(out), {each: self.scores.get(each, np.arange(PROMPTS)) for each in names})
        else:
            (Path(out) / MARKERS[name]).write_text(json.dumps(list(command)))
        return 0


def write_evaluation(folder: Path, scores: Mapping[str, Sequence[float]]) -> None:
    """Write results and scores of one image a prompt under toy-truth; the first model is the baseline."""
    models = list(scores)
    settings = Settings(
        models=dict.fromkeys(models, "x"), rewards={"toy-truth": "x"}, prompts=[f"p{i}" for i in range(PROMPTS)],
        images_per_prompt=1, steps=1, guidance_scale=1.0, seed=0, dtype="fp32",
    )  # fmt: skip
    by_model = {model: np.asarray(values, dtype=np.float64)[:, None] for model, values in scores.items()}
    write_scores(folder, {"toy-truth": by_model}, settings, {model: ["x.png"] * PROMPTS for model in models})
    results = Results(
        schema_version=1, digest="x", settings=settings, num_prompts=PROMPTS, num_images=PROMPTS, baseline=models[0],
        models=[], rewards=[RewardEntry(name="toy-truth", unit="", model="", fingerprint="")],
        findings=find_all({"toy-truth": by_model}, models[0]), versions={},
    )  # fmt: skip
    write_results(folder, results)
