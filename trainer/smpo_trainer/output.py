"""The output folder of a run: whether it is new, unfinished or finished, and what finishes it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from smpo_schemas.commandline import CONFIG_FILE
from smpo_schemas.errors import UserError
from smpo_schemas.files import read_json, write_json
from smpo_trainer.checkpoints import Checkpoints, read_identity
from smpo_trainer.experiment import differing
from smpo_trainer.metrics import METRICS_FILE, TENSORBOARD_FOLDER
from smpo_trainer.policy import LORA_FILE, UNET_FOLDER
from smpo_trainer.skipped import NONFINITE_FILE
from smpo_trainer.validation_images import VALIDATION_FOLDER
from smpo_trainer.wandb_log import WANDB_FOLDER

TRAINING_FILE = "training.json"
TRAINING_VERSION = 1
REFERENCE_FILE = "reference.safetensors"

_PACKAGES = ("smpo-diffusion", "torch", "diffusers", "transformers", "accelerate", "peft")


class OutputFolder:
    """``OUT``: the trained model, ``training.json`` (written last), metrics; while unfinished, what to go on from.

    That is checkpoints and, where the reference's errors were computed anew, these.
    """

    def __init__(self, path: Path, kept_checkpoints: int) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path, kept_checkpoints)
        self.reference = path / REFERENCE_FILE

    def is_finished(self, identity: Mapping[str, Any]) -> bool:
        """Whether there is a finished run of exactly these settings.

        Raises:
            UserError: the folder holds a run of other settings.
        """
        marker = self.path / TRAINING_FILE
        if marker.is_file():
            self._require_same(read_json(marker)["settings"], identity, "a finished")
            return True
        checkpoint = self.checkpoints.latest()
        if checkpoint is not None:
            self._require_same(read_identity(checkpoint), identity, "an unfinished")
        return False

    def _require_same(self, old: Mapping[str, Any], new: Mapping[str, Any], state: str) -> None:
        changed = differing(old, new)
        if changed:
            raise UserError(
                f"--out {self.path} holds {state} run with other settings: {', '.join(changed)}; "
                "choose another --out, or begin anew with --overwrite"
            )

    def clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        # The marker first: a kill in between must not leave a folder that looks finished.
        for name in (TRAINING_FILE, CONFIG_FILE, METRICS_FILE, LORA_FILE):
            (self.path / name).unlink(missing_ok=True)
        self.forget()
        for name in (UNET_FOLDER, TENSORBOARD_FOLDER, WANDB_FOLDER, VALIDATION_FOLDER):
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.checkpoints.remove()

    def forget(self) -> None:
        """Remove what only belongs to checkpoints, where there are none: it may be of a run with other settings."""
        for name in (REFERENCE_FILE, NONFINITE_FILE):
            (self.path / name).unlink(missing_ok=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write ``training.json``, which finishes the run."""
        write_json(self.path / TRAINING_FILE, {"schema_version": TRAINING_VERSION, **summary, "versions": _versions()})
        self.tidy()

    def tidy(self) -> None:
        """Drop what a finished run needs no more; a kill may have kept ``finish`` from it."""
        self.checkpoints.remove()
        self.reference.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[package] = "unknown"
    return found
