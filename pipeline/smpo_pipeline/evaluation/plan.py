"""What an evaluation is to do, checked before anything heavy is imported or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from smpo_common.errors import UserError
from smpo_common.files import read_json, sha256_json
from smpo_pipeline.evaluation.prompts import read_prompts
from smpo_pipeline.evaluation.results import Results, Settings, read_results
from smpo_pipeline.evaluation.sources import ModelSource, choose_base, identity, parse_models, reward_identity

IMAGES_FOLDER = "images"
ORIGIN_FILE = "made_from.json"


@dataclass(frozen=True)
class Plan:
    """An evaluation to be made.

    Attributes:
        out: the folder for everything it writes.
        models: the first is the baseline.
        base: folder or hub id of the whole model that completes outputs of smpo-train, where there are any.
        settings: all that decides the numbers.
        batch_size: images at once.
        device: ``cpu`` or ``cuda``; None is ``cuda`` where there is one.
    """

    out: Path
    models: list[ModelSource]
    base: str | None
    settings: Settings
    batch_size: int
    device: str | None

    def folder(self, model: str) -> Path:
        """Where a model's images lie."""
        return self.out / IMAGES_FOLDER / model

    def file(self, model: str, prompt_number: int, index: int) -> Path:
        """One image."""
        return self.folder(model) / f"{prompt_number:05d}-{index:02d}.png"

    def origin(self, model: str) -> str:
        """Hash of all that decides the content of a model's image files, except how many there are."""
        values = self.settings.model_dump(exclude={"models", "rewards", "images_per_prompt"}, exclude_none=True)
        return sha256_json({**values, "model": self.settings.models[model]})


def make_plan(
    out: Path,
    models: Sequence[str],
    base: str | None,
    prompts: Path,
    rewards: Sequence[str],
    *,
    limit: int | None,
    images_per_prompt: int,
    steps: int,
    guidance_scale: float,
    seed: int,
    dtype: str,
    resolution: int | None,
    variant: str | None,
    batch_size: int,
    device: str | None,
) -> Plan:
    """Check the command line's values and find out which files they stand for.

    Raises:
        UserError: one of them is wrong.
    """
    sources = parse_models(models)
    whole = choose_base(sources, base)
    if not sources:
        raise UserError("name at least one model with --model NAME=DIR")
    if not rewards:
        raise UserError("name at least one reward with --reward NAME[=MODEL]")
    if len(set(rewards)) != len(rewards):
        raise UserError("--reward names the same reward twice")
    settings = Settings(
        models={model.name: identity(model, whole) for model in sources},
        rewards={spec: reward_identity(spec) for spec in rewards},
        prompts=read_prompts(prompts, limit),
        images_per_prompt=images_per_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        dtype=dtype,
        resolution=resolution,
        variant=variant,
    )
    return Plan(out, sources, whole, settings, batch_size, device)


def finished_results(plan: Plan, *, overwrite: bool) -> Results | None:
    """The results of this very evaluation where it has been made before, else None: it is to be made.

    With ``overwrite`` it always is: nothing here sees the code of somebody's own reward.

    Raises:
        UserError: the folder holds results or images of other settings (and ``overwrite`` is off), or files that no
            evaluation wrote.
    """
    results = None if overwrite else read_results(plan.out)
    if results is not None:
        if results.digest == plan.settings.digest():
            return results
        raise UserError(
            f"--out {plan.out} holds an evaluation with other settings "
            f"({results.settings.difference(plan.settings)}): choose another folder, or replace it with --overwrite"
        )
    for model in plan.models:
        _check_images(plan, model.name, overwrite=overwrite)
    return None


def _check_images(plan: Plan, model: str, *, overwrite: bool) -> None:
    folder = plan.folder(model)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / ORIGIN_FILE).is_file():
        raise UserError(f"{folder} is not empty and was not written by evaluate; choose another --out")
    if read_json(folder / ORIGIN_FILE).get("origin") != plan.origin(model) and not overwrite:
        raise UserError(
            f"--out {plan.out} holds unfinished images of {model!r} with other settings: "
            "choose another folder, or replace them with --overwrite"
        )
