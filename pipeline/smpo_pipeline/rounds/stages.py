"""The stages of a round as commands, with the files that they read and write."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from smpo_pipeline.evaluation.results import RESULTS_FILE
from smpo_pipeline.rounds.options import RoundsOptions
from smpo_pipeline.weighing.options import WeighOptions
from smpo_schemas.generation.candidates import CANDIDATES_FILE
from smpo_schemas.generation.selection import PAIRS_FILE, SCORES_FOLDER, SELECTION_FILE
from smpo_schemas.manifest import MANIFEST_FILE
from smpo_schemas.scoring.refresh import REFRESH_FILE
from smpo_schemas.scoring.scores import SCORES_FILE
from smpo_schemas.scoring.weights import WEIGHTS_FILE
from smpo_schemas.trained_model import MERGED_FILE, TRAINING_FILE

BASE = "base"
"""The base's name in evaluations."""

FLAGS_FOLDER = "flags"
"""Folder of the stages' config files."""


@dataclass(frozen=True)
class Training:
    """What later stages must know of the flags of training.

    Attributes:
        lora: a LoRA is trained, not all weights.
        needs_scores: it reads the selection's table of scores, for win rates among all candidates.
        variant: of the base's files of weights.
    """

    lora: bool = False
    needs_scores: bool = False
    variant: str | None = None


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage.
        command: as a user types it.
        inputs: files that identify what it reads.
        marker: the file that it writes last.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    marker: Path

    @property
    def output(self) -> Path:
        """Its folder."""
        return self.marker.parent

    @property
    def typed(self) -> str:
        """The command, quoted for a shell."""
        return shlex.join(self.command)


def round_name(number: int) -> str:
    """Name a round, as its folder and its model in evaluations."""
    return f"round-{number:03d}"


@dataclass(frozen=True)
class Plan:
    """The commands of all rounds.

    Attributes:
        options: of ``rounds``.
        training: what the stages must know of the flags of training.
        flags: folder of the stages' config files.
    """

    options: RoundsOptions
    training: Training
    flags: Path

    def folder(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.options.out / round_name(number)

    @property
    def merges(self) -> bool:
        """Whether a round's LoRA is merged into its denoiser, since the next one trains on top of it."""
        options = self.options
        return self.training.lora and "previous" in (options.start, options.held_to)

    def policy(self, number: int) -> Path:
        """Return the folder of a round's trained model, as evaluate and the next round take it."""
        # Inside the run's folder, whose record tells evaluate what the model was trained on.
        return self.folder(number) / ("run/merged" if self.merges else "run")

    def prompts(self, number: int) -> Path:
        """Return the file of a round's prompts."""
        files = self.options.prompts
        return files[number if len(files) > 1 else 0]

    def beta(self, number: int) -> object:
        """Return a round's beta, if each round has its own; else None."""
        betas = self.options.stages.train.get("beta")
        return betas[number if len(betas) > 1 else 0] if isinstance(betas, list) else None

    def stages(self, number: int) -> list[Stage]:
        """Return the stages of a round, in order."""
        return list(self._stages(number))

    def _stages(self, number: int) -> Iterator[Stage]:
        given, folder = self.options.stages, self.folder(number)
        candidates, selected = folder / "candidates" / CANDIDATES_FILE, folder / "pairs" / SELECTION_FILE
        pairs, scores = folder / "pairs" / PAIRS_FILE, folder / "pairs" / SCORES_FOLDER
        yield self._generate(number, candidates)
        scored = folder / "scores" / SCORES_FILE
        if given.refresh is not None:
            yield self._refresh(number, candidates)
        yield self._score(number, candidates, scored)
        arguments = ("--candidates", candidates.parent, "--scores", scored.parent, *self._seed(number))
        yield self._stage("select", arguments, (candidates, scored), selected)
        if given.weigh is not None:
            yield self._weigh(number, pairs, scores)
        yield self._invert(number, pairs, scores)
        yield self._train(number, scores)
        if self.merges:
            yield self._merge(number)
        if given.evaluate is not None:
            yield self._evaluate(number)

    def _generate(self, number: int, marker: Path) -> Stage:
        prompts, previous = self.prompts(number), self._previous(number)
        policy: tuple[object, ...] = ()
        if previous:
            policy = ("--lora" if self.training.lora and not self.merges else "--unet", previous.parent)
        arguments = ("--model", self.options.base, *policy, "--prompts", prompts, *self._seed(number))
        return self._stage("generate", arguments, (prompts, *filter(None, [previous])), marker)

    def _refresh(self, number: int, candidates: Path) -> Stage:
        arguments = ("--candidates", candidates.parent, *self._seed(number))
        return self._stage("refresh", arguments, (candidates,), self.folder(number) / "refreshed" / REFRESH_FILE)

    def _score(self, number: int, candidates: Path, marker: Path) -> Stage:
        arguments: list[object] = ["--pairs", candidates.parent]
        inputs = [candidates]
        if self.options.stages.refresh is not None:
            refreshed = self.folder(number) / "refreshed"
            given = self.options.stages.score.get("reward", [])
            arguments += ["--reward", *(given if isinstance(given, list) else [given]), f"refreshed={refreshed}"]
            inputs += [refreshed / REFRESH_FILE]
        return self._stage("score", arguments, tuple(inputs), marker)

    def _weigh(self, number: int, pairs: Path, scores: Path) -> Stage:
        arguments = ("--scores", scores, "--pairs", pairs, *self._seed(number))
        stage = self._stage("weigh", arguments, (pairs.parent / SELECTION_FILE,), scores / WEIGHTS_FILE)
        return replace(stage, command=stage.command[:-2])  # its output is in --scores

    def _invert(self, number: int, pairs: Path, scores: Path) -> Stage:
        options, previous = self.options, self._previous(number)
        models: tuple[object, ...] = ("--model", options.base)
        inputs = [pairs.parent / SELECTION_FILE]
        if previous and options.held_to == "previous":
            models, inputs = (*models, "--unet", previous.parent), [*inputs, previous]
        elif previous and options.inverting == "policy":
            models, inputs = (*models, "--inverting-unet", previous.parent), [*inputs, previous]
        arguments = ("--pairs", pairs, "--scores", scores, *models, *self._seed(number))
        return self._stage("invert", arguments, tuple(inputs), self.folder(number) / "shards" / MANIFEST_FILE)

    def _train(self, number: int, scores: Path) -> Stage:
        options, folder, previous = self.options, self.folder(number), self._previous(number)
        arguments: list[object] = ["--shards", folder / "shards", "--model", options.base]
        inputs = [folder / "shards" / MANIFEST_FILE]
        if previous and options.start == "previous":
            arguments += ["--unet", previous.parent]
            inputs += [previous]
        weigh = options.stages.weigh
        if self.training.needs_scores or weigh is not None:
            arguments += ["--scores", scores]
        if weigh is not None:
            arguments += ["--weight-column", weigh.get("column", WeighOptions.model_fields["column"].default)]
            inputs += [scores / WEIGHTS_FILE]
        if (beta := self.beta(number)) is not None:
            arguments += ["--beta", beta]
        arguments += self._seed(number)
        stage = self._stage("train", arguments, tuple(inputs), folder / "run" / TRAINING_FILE)
        launcher = shlex.split(options.launcher or "")
        program = (*launcher, "-m", "smpo_trainer") if launcher else ("smpo-train",)
        return replace(stage, command=(*program, *stage.command[2:]))

    def _merge(self, number: int) -> Stage:
        folder, previous, variant = self.folder(number), self._previous(number), self.training.variant
        arguments: list[object] = ["--model", self.options.base, "--positive", folder / "run"]
        arguments += ["--unet", previous.parent] if previous and self.options.start == "previous" else []
        arguments += ["--variant", variant] if variant else []
        inputs = (folder / "run" / TRAINING_FILE, *filter(None, [previous]))
        return self._stage("merge", (*arguments, "--overwrite"), inputs, self._policy_marker(number))

    def _evaluate(self, number: int) -> Stage:
        models = [f"{round_name(each)}={self.policy(each)}" for each in range(number + 1)]
        arguments = ("--model", f"{BASE}={self.options.base}", *models, "--seed", self.options.seed)
        inputs = tuple(self._policy_marker(each) for each in range(number + 1))
        return self._stage("evaluate", arguments, inputs, self.folder(number) / "evaluation" / RESULTS_FILE)

    def _stage(self, name: str, arguments: object, inputs: tuple[Path, ...], marker: Path) -> Stage:
        config = ("--config", self.flags / f"{name}.yaml") if self.options.stages.given().get(name) else ()
        words = ("smpo-pipeline", name, *config, *arguments, "--out", marker.parent)  # type: ignore[misc]
        return Stage(name, tuple(map(str, words)), inputs, marker)

    def _seed(self, number: int) -> tuple[object, ...]:
        return ("--seed", self.options.seed + number)

    def _policy_marker(self, number: int) -> Path:
        return self.policy(number) / (MERGED_FILE if self.merges else TRAINING_FILE)

    def _previous(self, number: int) -> Path | None:
        """Return the file that the round before wrote last, in its model's folder; None in round 0."""
        return self._policy_marker(number - 1) if number else None
