"""The output folder of a run, which is new, unfinished or finished."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from smpo_common.commandline import CONFIG_FILE
from smpo_common.errors import UserError
from smpo_common.files import link_or_copy, read_json, write_bytes, write_json
from smpo_common.same_settings import require_same_settings
from smpo_models.sharing.card import CARD_FILE, own_card
from smpo_models.sharing.model_card import describe_model
from smpo_schemas.choices import Dtype
from smpo_schemas.trained_model import (
    DENOISER_FOLDERS,
    EXTRA_LORA_FILES,
    LORA_FILE,
    METRICS_FILE,
    TRAINING_FILE,
    VALIDATION_FOLDER,
)
from smpo_trainer.data.order import Batching
from smpo_trainer.experiment import Experiment
from smpo_trainer.model.policy import Policy
from smpo_trainer.monitoring.trackers import TENSORBOARD_FOLDER, WANDB_FOLDER
from smpo_trainer.output.checkpoints import Checkpoints, read_state
from smpo_trainer.output.skipped_steps import NONFINITE_FILE
from smpo_trainer.preference.reward_mix import RewardMix
from smpo_trainer.safeguards.spikes import SPIKES_FILE

TRAINING_VERSION = 1
REFERENCE_FILE = "reference.safetensors"
BEST_FOLDER = "best"

_PACKAGES = ("smpo-diffusion", "torch", "diffusers", "transformers", "accelerate", "peft")


def dtype_of_run(out: Path) -> Dtype | None:
    """Return the dtype of the run in a folder, finished or not; None without a run."""
    checkpoint = Checkpoints(out, 1).latest()
    if checkpoint is not None:
        return cast("Dtype", read_state(checkpoint)[1]["dtype"])
    marker = out / TRAINING_FILE
    return cast("Dtype | None", _settings_of(marker).get("dtype")) if marker.is_file() else None


def _settings_of(marker: Path) -> dict[str, Any]:
    """Read the settings in ``training.json``.

    Raises:
        UserError: it cannot be read, or has none.
    """
    record = read_json(marker)
    settings = record.get("settings") if isinstance(record, dict) else None
    if not isinstance(settings, dict):
        raise UserError(f"{marker} is damaged; start over with --overwrite, or choose another --out")
    return settings


class OutputFolder:
    """``OUT``: the trained model, metrics, checkpoints, and ``training.json``, which is written last."""

    def __init__(self, path: Path, max_checkpoints: int, *, keep_checkpoints: bool, reach: int = 0) -> None:
        """Manage a folder.

        Args:
            path: the folder.
            max_checkpoints: number of checkpoints to keep during the run.
            keep_checkpoints: whether a finished run keeps them all; if not, it keeps its last one.
            reach: if not 0, keep during the run also one that has at least this many steps less than the latest one.
        """
        self.path = path
        self.checkpoints = Checkpoints(path, max_checkpoints, reach)
        self.reference = path / REFERENCE_FILE
        self._max_checkpoints_at_end = max_checkpoints if keep_checkpoints else 1

    def is_finished(self, identity: Mapping[str, Any]) -> bool:
        """Whether the folder holds a finished run of these settings; false if there is a run to start or to resume.

        Raises:
            UserError: the folder holds a run of other settings, or of more steps.
        """
        marker, checkpoint = self.path / TRAINING_FILE, self.checkpoints.latest()
        if marker.is_file():
            old = _settings_of(marker)
            self._require_same(old, identity, "a finished")
            if old.get("max_steps") == identity["max_steps"]:
                return True
            # With more steps the finished run continues from its last checkpoint.
        if checkpoint is not None:
            step, old = read_state(checkpoint)
            self._require_same(old, identity, "an unfinished")
            if step > identity["max_steps"]:
                raise self._refuse(f"a run of {step} steps, more than --max-steps {identity['max_steps']}")
        elif marker.is_file():
            raise self._refuse(
                f"a finished run, but not the checkpoint to continue to --max-steps {identity['max_steps']}"
            )
        return False

    def _require_same(self, old: Mapping[str, Any], new: Mapping[str, Any], state: str) -> None:
        # max_steps may differ: a larger number continues the run.
        require_same_settings(f"--out {self.path}", f"{state} run", {**old, "max_steps": new["max_steps"]}, new)

    def _refuse(self, what: str) -> UserError:
        return UserError(f"--out {self.path} holds {what}; choose another --out, or start over with --overwrite")

    def clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        # In this order: a kill in between must not leave a folder that looks finished, nor a checkpoint without its
        # reference errors.
        (self.path / TRAINING_FILE).unlink(missing_ok=True)
        self.checkpoints.drop_all_but(0)
        for name in (CONFIG_FILE, METRICS_FILE, LORA_FILE, *EXTRA_LORA_FILES.values()):
            (self.path / name).unlink(missing_ok=True)
        if own_card(self.path) is None:
            (self.path / CARD_FILE).unlink(missing_ok=True)
        self._forget()
        for name in (*DENOISER_FOLDERS, TENSORBOARD_FOLDER, WANDB_FOLDER, VALIDATION_FOLDER, BEST_FOLDER):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def begin(self) -> None:
        """Mark the run as unfinished; it resumes from the last checkpoint, if any."""
        (self.path / TRAINING_FILE).unlink(missing_ok=True)
        if self.checkpoints.latest() is None:
            self._forget()

    def _forget(self) -> None:
        # These files belong to checkpoints: without one, they may come from a run with other settings.
        for name in (REFERENCE_FILE, NONFINITE_FILE, SPIKES_FILE):
            (self.path / name).unlink(missing_ok=True)

    def keep_best(self, step: int) -> None:
        """Keep the model of a checkpoint as the best one.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self._copy_models(self.path / f"checkpoint-{step:06d}", self.path / BEST_FOLDER)
        except OSError as error:
            raise UserError(f"cannot write the best model into {self.path / BEST_FOLDER}: {error}") from error

    def finish(self, summary: Mapping[str, Any], license_: str | None = None) -> None:
        """Copy the best or last model, write its card and ``training.json``, which finishes the run.

        Args:
            summary: content of ``training.json``, except for the versions.
            license_: the model's license, for its card.

        Raises:
            UserError: they cannot be written.
        """
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            raise RuntimeError("a run ends with a checkpoint")
        best = self.path / BEST_FOLDER
        try:
            self._copy_models(checkpoint if summary.get("best") is None else best, self.path)
        except OSError as error:
            raise UserError(f"cannot write the trained weights into {self.path}: {error}") from error
        # Before training.json, since a finished run is never changed again.
        self.tidy()
        record = {"schema_version": TRAINING_VERSION, **summary, "versions": _versions()}
        if own_card(self.path) is None:
            card = describe_model(self.path, record, self.path.absolute().name, license_)
            write_bytes(self.path / CARD_FILE, card.encode())
        write_json(self.path / TRAINING_FILE, record)

    def tidy(self) -> None:
        """Remove the checkpoints that a finished run does not keep."""
        self.checkpoints.drop_all_but(self._max_checkpoints_at_end)

    def _copy_models(self, source: Path, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for name in EXTRA_LORA_FILES.values():  # of an earlier adapter, if it was written in another format
            (folder / name).unlink(missing_ok=True)
        for name in (*DENOISER_FOLDERS, LORA_FILE, *EXTRA_LORA_FILES.values()):
            self._copy(source / name, folder)

    def _copy(self, source: Path, folder: Path) -> None:
        """Copy a file or folder into ``folder``, and replace an existing one by a rename."""
        target = folder / source.name
        staging = folder / f".{source.name}.tmp"
        if source.is_dir():
            shutil.rmtree(staging, ignore_errors=True)
            shutil.copytree(source, staging, copy_function=link_or_copy)
            shutil.rmtree(target, ignore_errors=True)
            staging.replace(target)
        elif source.is_file():
            staging.unlink(missing_ok=True)
            link_or_copy(source, staging)
            staging.replace(target)


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # a source tree that is not installed
            versions[package] = "unknown"
    return versions


def training_summary(
    experiment: Experiment, policy: Policy, batching: Batching, identity: dict[str, Any], steps: int
) -> dict[str, Any]:
    """Return the content of ``training.json`` about settings and data, after ``steps`` steps."""
    settings, shards = experiment.settings, experiment.shards
    return {
        "settings": identity,
        "model": str(Path(settings.model).absolute()) if Path(settings.model).exists() else settings.model,
        "kind": shards.model.kind,
        "objective": experiment.objective.name,
        "rewards": _described(experiment.mix) if experiment.mix else {},
        "shards": [
            {"path": source.name, "manifest_sha256": digest}
            for source, digest in zip(shards.sources, shards.manifest_hashes(), strict=True)
        ],
        "starts_from_reference": policy.starts_from_reference,
        "states": batching.num_states,
        "states_per_step": batching.states_per_step,
        "steps": steps,
        "epochs": steps * batching.states_per_step / batching.num_states,
    }


def _described(mix: RewardMix) -> dict[str, Any]:
    """Return weight, model and scale (the divisor of score differences) of each reward."""
    return {
        name: {
            "weight": weight,
            "scale": mix.preference.scales[name],
            **mix.statistics[name].model_dump(include={"model", "unit", "min", "max"}),
        }
        for name, weight in mix.preference.weights.items()
    }


def _reward_words(mix: RewardMix) -> list[str]:
    """Write each reward as ``evaluate --reward`` takes it, with its model if that is a folder or hub id."""
    models = {name: mix.statistics[name].model for name in mix.preference.weights}
    return [f"{name}={model}" if "/" in model else name for name, model in models.items()]


def evaluation_command(experiment: Experiment) -> str:
    """Return the command that compares the result with its base model; a negative result guides the base model."""
    settings = experiment.settings
    words = ["smpo-pipeline", "evaluate", "--model", f"base={settings.model}"]
    if experiment.objective.trains_negative:
        words += [f"guided={settings.model}", "--negative", f"guided={settings.out}"]
    else:
        words += [f"tuned={settings.out}"]
    words += ["--prompts", str(settings.images.image_prompts or "FILE")]
    words += ["--reward", *(_reward_words(experiment.mix) if experiment.mix else ["NAME"])]
    return shlex.join([*words, "--out", f"{settings.out}-evaluation"])
