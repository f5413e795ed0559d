"""Check the flags of all stages against their commands before anything runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from smpo_common.errors import UserError
from smpo_common.files import write_bytes
from smpo_common.options import Options, parse_arguments
from smpo_pipeline.evaluation.options import EvaluateOptions
from smpo_pipeline.jobs.generate.options import GenerateOptions
from smpo_pipeline.jobs.invert.options import InvertOptions
from smpo_pipeline.jobs.score.options import ScoreOptions
from smpo_pipeline.refreshing.options import RefreshOptions
from smpo_pipeline.rewards import parse_reward
from smpo_pipeline.rounds.options import RoundsOptions
from smpo_pipeline.rounds.stages import Plan, Stage, Training
from smpo_pipeline.selection.options import SelectOptions
from smpo_pipeline.weighing.options import WeighOptions

Resolve = Callable[[list[str]], Mapping[str, Any]]
"""Parses arguments of smpo-train, which this program does not import; returns the values of all its flags."""

_MODELS: dict[str, type[Options]] = {
    "generate": GenerateOptions,
    "refresh": RefreshOptions,
    "score": ScoreOptions,
    "select": SelectOptions,
    "weigh": WeighOptions,
    "invert": InvertOptions,
    "evaluate": EvaluateOptions,
}

_OWN = {
    "generate": ("model", "prompts", "unet", "lora", "seed", "plan"),
    "refresh": ("candidates", "seed"),
    "score": ("pairs",),
    "select": ("candidates", "scores", "seed"),
    "weigh": ("scores", "pairs", "seed"),
    "invert": ("pairs", "scores", "model", "unet", "inverting_unet", "seed"),
    "train": ("shards", "model", "unet", "scores", "weight_column", "seed", "print_config"),
    "evaluate": ("model", "base", "seed"),
}
"""Flags that ``rounds`` sets, besides --out."""


def write_flags(options: RoundsOptions, folder: Path) -> None:
    """Write the config files of the stages."""
    for name, flags in options.stages.given().items():
        if flags:
            content = yaml.safe_dump(flags, sort_keys=False, allow_unicode=True)
            write_bytes(folder / f"{name}.yaml", content.encode())


def check_stages(options: RoundsOptions, resolve: Resolve) -> Training:
    """Parse the commands of all stages, with an empty folder for what is not there yet.

    Raises:
        UserError: a flag is unknown, set by ``rounds`` itself, or refused; it names stage and flag.
    """
    for name, flags in options.stages.given().items():
        for key in (*_OWN.get(name, ()), "out", "overwrite"):
            if key in flags:
                raise UserError(f"{name}: {key}: `rounds` sets this flag; leave it out")
    _check_stop(options)
    with tempfile.TemporaryDirectory(prefix="smpo-") as folder:
        write_flags(options, Path(folder))
        plan = Plan(options.replace(launcher=None), Training(), Path(folder))
        resolved: Mapping[str, Any] = {}
        # Round 1 is the first with a model before it; later ones differ from it in beta alone.
        for number in range(options.rounds if plan.beta(0) is not None else min(options.rounds, 2)):
            for stage in plan.stages(number):
                if stage.name == "train":
                    resolved = _parsed(stage, plan, resolve)
                elif number <= 1:
                    _parsed(stage, plan, partial(_strictly, stage.name, options))
    return Training(
        lora=resolved.get("lora_rank") is not None,
        needs_scores=resolved.get("preference") == "winrate",
        variant=resolved.get("variant"),
    )


def _check_stop(options: RoundsOptions) -> None:
    if not options.stop_if_worse:
        return
    rewards = (options.stages.evaluate or {}).get("reward", [])
    specs = list(map(str, rewards if isinstance(rewards, list) else [rewards]))
    # Importing rewards takes seconds: only where a class or an address (URL,name=NAME) decides the name.
    names = [parse_reward(spec)[0].name if ":" in spec else spec.partition("=")[0] for spec in specs]
    if options.stop_if_worse not in names:
        raise UserError(f"--stop-if-worse {options.stop_if_worse}: evaluate: reward has only {', '.join(names)}")


def _parsed(stage: Stage, plan: Plan, parse: Callable[[list[str]], Any]) -> Any:  # noqa: ANN401  (what ``parse`` returns)
    """Parse a stage's arguments; an error names the stage in place of the config file."""
    program = 1 if stage.name == "train" else 2  # words: smpo-train, or smpo-pipeline and the command
    arguments = [_existing(word, plan) for word in stage.command[program:]]
    try:
        return parse(arguments)
    except UserError as error:
        said = str(error).replace(f"--config {plan.flags / stage.name}.yaml: ", "")
        raise UserError(f"{stage.name}: {said}") from error


def _existing(word: str, plan: Plan) -> str:
    """Replace a path below the output folder by a folder that exists."""
    name, equals, path = word.rpartition("=")
    return f"{name}{equals}{plan.flags}" if Path(path).is_relative_to(plan.options.out) else word


def _strictly(name: str, options: RoundsOptions, arguments: list[str]) -> None:
    """Parse as if the flags of a stage stood on its command line, where those that have no effect are refused."""
    model = _MODELS[name]
    parsed = parse_arguments(model, _repeated(arguments))
    model.parse(parsed.flat_values(), frozenset(options.stages.given()[name]))


def _repeated(arguments: list[str]) -> list[str]:
    """Write ``--model a b`` as ``--model a --model b``; all flags of the stages' commands have values."""
    flag, words = "", []
    for word in arguments:
        if word.startswith("--"):
            flag = word
        else:
            words += [flag, word]
    return words
