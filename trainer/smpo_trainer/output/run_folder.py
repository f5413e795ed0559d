"""The output folder of a run: whether it is new, unfinished or finished, and what finishes it."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from smpo_common.commandline import CONFIG_FILE
from smpo_common.errors import UserError
from smpo_common.files import read_json, write_json
from smpo_common.same_settings import require_same_settings
from smpo_schemas.dtypes import Dtype
from smpo_schemas.trained_model import LORA_FILE, METRICS_FILE, TRAINING_FILE, UNET_FOLDER
from smpo_trainer.data.order import Batching
from smpo_trainer.experiment import Experiment
from smpo_trainer.model.policy import Policy
from smpo_trainer.monitoring.trackers import TENSORBOARD_FOLDER, WANDB_FOLDER
from smpo_trainer.output.checkpoints import Checkpoints, read_state
from smpo_trainer.output.skipped_steps import NONFINITE_FILE
from smpo_trainer.preference.reward_mix import RewardMix
from smpo_trainer.validation.images import VALIDATION_FOLDER

TRAINING_VERSION = 1
REFERENCE_FILE = "reference.safetensors"

_PACKAGES = ("smpo-diffusion", "torch", "diffusers", "transformers", "accelerate", "peft")


def dtype_of_run(out: Path) -> Dtype | None:
    """The dtype of the run that a folder holds, finished or not; None: it holds none."""
    checkpoint = Checkpoints(out, 1).latest()
    if checkpoint is not None:
        return cast("Dtype", read_state(checkpoint)[1]["dtype"])
    marker = out / TRAINING_FILE
    return cast("Dtype | None", read_json(marker)["settings"].get("dtype")) if marker.is_file() else None


class OutputFolder:
    """``OUT``: the trained model, ``training.json`` (written last), metrics, and what to go on from.

    That is checkpoints and, where the reference's errors were computed anew, these.
    """

    def __init__(self, path: Path, kept_checkpoints: int, *, keeps_after_the_end: bool) -> None:
        """Of a run.

        Args:
            path: the folder.
            kept_checkpoints: how many there are at once.
            keeps_after_the_end: also of a finished run; otherwise it keeps its last one.
        """
        self.path = path
        self.checkpoints = Checkpoints(path, kept_checkpoints)
        self.reference = path / REFERENCE_FILE
        self._kept_in_the_end = kept_checkpoints if keeps_after_the_end else 1

    def is_finished(self, identity: Mapping[str, Any]) -> bool:
        """Whether there is a finished run of exactly these settings; not where it, or another, is to be gone on with.

        Raises:
            UserError: the folder holds a run of other settings, or of more steps.
        """
        marker, checkpoint = self.path / TRAINING_FILE, self.checkpoints.latest()
        if marker.is_file():
            old = read_json(marker)["settings"]
            self._require_same(old, identity, "a finished")
            if old["max_steps"] == identity["max_steps"]:
                return True
        if checkpoint is not None:
            step, old = read_state(checkpoint)
            self._require_same(old, identity, "an unfinished")
            if step > identity["max_steps"]:
                raise self._refuse(f"a run of {step} steps: --max-steps {identity['max_steps']} is fewer")
        elif marker.is_file():
            raise self._refuse(f"a finished run without the checkpoint that --max-steps {identity['max_steps']} needs")
        return False

    def _require_same(self, old: Mapping[str, Any], new: Mapping[str, Any], state: str) -> None:
        require_same_settings(f"--out {self.path}", f"{state} run", {**old, "max_steps": new["max_steps"]}, new)

    def _refuse(self, what: str) -> UserError:
        return UserError(f"--out {self.path} holds {what}; choose another --out, or start over with --overwrite")

    def clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        # The marker first: a kill in between must not leave a folder that looks finished.
        for name in (TRAINING_FILE, CONFIG_FILE, METRICS_FILE, LORA_FILE):
            (self.path / name).unlink(missing_ok=True)
        self._forget()
        for name in (UNET_FOLDER, TENSORBOARD_FOLDER, WANDB_FOLDER, VALIDATION_FOLDER):
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.checkpoints.drop_all_but(0)

    def begin(self) -> None:
        """Make the folder that of an unfinished run, which goes on from the last checkpoint if there is one."""
        (self.path / TRAINING_FILE).unlink(missing_ok=True)
        if self.checkpoints.latest() is None:
            self._forget()

    def _forget(self) -> None:
        """Remove what only belongs to checkpoints: where there are none, it may be of a run with other settings."""
        for name in (REFERENCE_FILE, NONFINITE_FILE):
            (self.path / name).unlink(missing_ok=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Put the last checkpoint's model in place and write ``training.json``, which finishes the run.

        Raises:
            UserError: they cannot be written.
        """
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            raise RuntimeError("a run ends with a checkpoint")
        try:
            for name in (UNET_FOLDER, LORA_FILE):
                self._copy(checkpoint / name)
        except OSError as error:
            raise UserError(f"cannot write the trained weights into {self.path}: {error}") from error
        # Before the marker: what is finished is left as it is.
        self.tidy()
        write_json(self.path / TRAINING_FILE, {"schema_version": TRAINING_VERSION, **summary, "versions": _versions()})

    def tidy(self) -> None:
        """Drop the checkpoints that a finished run does not keep."""
        self.checkpoints.drop_all_but(self._kept_in_the_end)

    def _copy(self, source: Path) -> None:
        """Have a file or folder here, too, in the place of one by its name."""
        target = self.path / source.name
        staging = self.path / f".{source.name}.tmp"
        if source.is_dir():
            shutil.rmtree(staging, ignore_errors=True)
            shutil.copytree(source, staging, copy_function=_link_or_copy)
            shutil.rmtree(target, ignore_errors=True)
            staging.replace(target)
        elif source.is_file():
            staging.unlink(missing_ok=True)
            _link_or_copy(source, staging)
            staging.replace(target)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    """Two names for one file, which nobody changes in place; a copy where the file system knows no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[package] = "unknown"
    return found


def training_summary(
    experiment: Experiment, policy: Policy, plan: Batching, identity: dict[str, Any]
) -> dict[str, Any]:
    """What ``training.json`` says of how the run was made, besides versions."""
    settings, shards = experiment.settings, experiment.shards
    return {
        "settings": identity,
        "model": settings.model,
        "kind": shards.model.kind,
        "objective": experiment.objective.name,
        "rewards": _described(experiment.mix) if experiment.mix else {},
        "shards": [
            {"path": source.name, "manifest_sha256": digest}
            for source, digest in zip(shards.sources, shards.manifest_hashes(), strict=True)
        ],
        "starts_from_reference": policy.starts_from_reference,
        "states": plan.num_states,
        "states_per_step": plan.states_per_step,
        "steps": settings.steps.max_steps,
        "epochs": settings.steps.max_steps * plan.states_per_step / plan.num_states,
    }


def _described(mix: RewardMix) -> dict[str, Any]:
    """Of each reward its weight, its model, and what its score differences were divided by in the mix."""
    return {
        name: {
            "weight": weight,
            "scale": mix.preference.scales[name],
            **mix.statistics[name].model_dump(include={"model", "unit", "min", "max"}),
        }
        for name, weight in mix.preference.weights.items()
    }


def _reward_words(mix: RewardMix) -> list[str]:
    """Each reward as ``--reward`` takes it: with its model, where that is a folder or a hub id."""
    models = {name: mix.statistics[name].model for name in mix.preference.weights}
    return [f"{name}={model}" if "/" in model else name for name, model in models.items()]


def evaluation_command(experiment: Experiment) -> str:
    """The command that compares a run's result with the model it was made from."""
    settings = experiment.settings
    words = ["smpo-pipeline", "evaluate", "--model", f"base={settings.model}", f"tuned={settings.out}"]
    words += ["--prompts", str(settings.images.validation_prompts or "FILE")]
    words += ["--reward", *(_reward_words(experiment.mix) if experiment.mix else ["NAME"])]
    return shlex.join([*words, "--out", f"{settings.out}-evaluation"])
