"""The flags of ``smpo-pipeline rounds``. Imports neither torch nor Ray."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import ConfigDict, Field, model_validator

from smpo_common.errors import UserError
from smpo_common.options import Flag, Options, Overwrite
from smpo_pipeline.options import ExistingPath, ModelSource, Out
from smpo_schemas.inversion_settings import GENERATED

Flags = dict[str, Any]
"""Values of a command's flags, by their keys in a config file."""


def _mapping(value: Any) -> Flags:  # noqa: ANN401  (of a config file, or YAML text)
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"a stage's flags are not valid YAML: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"expected a YAML mapping of a stage's flags to values, not {value!r}")
    return value


_FLAGS = Flag(typed=dict, metavar="YAML", parser=_mapping)
StageFlags = Annotated[Flags, _FLAGS]
OptionalStage = Annotated[Flags | None, _FLAGS]


class StagesOptions(Options):
    """The stages of a round, each with flags of its command."""

    model_config = ConfigDict(title="Stages: flags of each command, as a mapping in the config file")

    generate: StageFlags = Field(default_factory=dict)
    """Flags of `generate`."""
    refresh: OptionalStage = None
    """Flags of `refresh`: refit a reward, so that it prefers human choices over the round's images (APO). `score` then
    uses the reward `refreshed`, too. Default: not done."""
    score: StageFlags = Field(default_factory=dict)
    """Flags of `score`."""
    select: StageFlags = Field(default_factory=dict)
    """Flags of `select`."""
    weigh: OptionalStage = None
    """Flags of `weigh`: weights of the selected pairs, which training then uses; golden_column may be a column of the
    prompts. Default: not done."""
    invert: StageFlags = Field(default_factory=dict)
    """Flags of `invert`."""
    train: StageFlags = Field(default_factory=dict)
    """Flags of `smpo-train`; beta may be a list, with a value for each round."""
    evaluate: OptionalStage = None
    """Flags of `evaluate`, such as prompts that are not trained on: compares the base and all rounds' models. Default:
    not done."""

    def given(self) -> dict[str, Flags]:
        """Return the flags of each stage that is done, without those that are set for each round."""
        stages = {name: dict(flags) for name, flags in self if flags is not None}
        if isinstance(stages["train"].get("beta"), list):
            del stages["train"]["beta"]
        return stages


class RoundsOptions(Options):
    """The flags of ``rounds``."""

    base: Annotated[ModelSource, Flag(place=True)]
    """Text-to-image model to begin with: hub id or diffusers folder."""
    prompts: Annotated[tuple[ExistingPath, ...], Flag(typed=list[str], metavar="FILE", place=True)]
    """Prompts to train on: one file for all rounds, or a list with one for each."""
    out: Out
    rounds: Annotated[int, Field(ge=1)] = 1
    """Number of rounds. Run again with a larger number to go on."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed; round 0 has this one, round 1 the next. evaluate has it in all rounds."""
    start: Literal["previous", "base"] = "previous"
    """Where a round's training begins: at the model of the round before, or again at the base."""
    reference: Literal["base", "previous"] | None = None
    """The frozen model that a round's training is held to. Default: with refresh the model of the round before, else
    the base."""
    inverting: Literal["reference", "policy"] = "reference"
    """Which model inverts a round's images: the reference, or the model of the round before, which drew them."""
    force: bool = False
    """Accept --inverting policy with --reference base, which did harm (docs/results/drift.md)."""
    stop_if_worse: Annotated[str | None, Flag(metavar="REWARD")] = None
    """Stop after a round whose model loses to that of the round before by this reward of evaluate: the 95 % interval of
    its win rate ends below 50 %. Take a reward that is not trained on."""
    launcher: Annotated[str | None, Flag(metavar="COMMAND")] = None
    """Command that starts training on several devices, such as torchrun --nproc-per-node 8. Default: smpo-train
    alone."""
    stages: StagesOptions = StagesOptions()
    dry_run: Annotated[bool, Flag(recorded=False)] = False
    """Write the stages' config files, print the commands of all rounds, and run none."""
    overwrite: Overwrite = False
    """Start over. Without it an unfinished run is continued."""

    @property
    def held_to(self) -> Literal["base", "previous"]:
        """``reference``, or its default."""
        return self.reference or ("base" if self.stages.refresh is None else "previous")

    @model_validator(mode="after")
    def _refuse_what_does_not_fit(self) -> Self:
        if self.held_to == "base" and self.inverting == "policy" and not self.force:
            raise UserError(
                "--inverting policy with --reference base did harm (docs/results/drift.md): the reference's states are "
                "then not its own; use --reference previous, or --force"
            )
        if self.held_to == "previous" and self.start == "base":
            raise UserError("--start base with --reference previous: training would begin away from its reference")
        source = self.stages.invert.get("source")
        if self.rounds > 1 and source in GENERATED and (self.held_to, self.inverting) == ("base", "reference"):
            raise UserError(
                f"invert: --source {source} takes latents of the model that drew the images, from round 1 on the one "
                "before, but the base inverts; use --reference previous, or --inverting policy"
            )
        betas = self.stages.train.get("beta")
        for key, values in {"prompts": self.prompts, "train: beta": betas if isinstance(betas, list) else ()}.items():
            if len(values) > 1 and len(values) < self.rounds:
                raise UserError(f"{key}: {len(values)} values for {self.rounds} rounds; give one, or one for each")
        if self.stop_if_worse and self.stages.evaluate is None:
            raise UserError(f"--stop-if-worse {self.stop_if_worse} needs the stage evaluate")
        return self
