"""What a run needs to go on: written beside and renamed, so that a checkpoint is whole or absent.

No pickle: weights are safetensors, the optimizer's state is read with ``weights_only``.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from smpo_schemas.errors import UserError
from smpo_schemas.files import read_json, write_json

_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.pt", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run after ``step`` optimizer steps.

    Attributes:
        step: finished optimizer steps.
        identity: the settings that a run which goes on from here must share.
        weights: the trained weights by name.
        optimizer: state dicts of what changes beside the weights (optimizer, schedule, gradient scaler, ...), by name.
    """

    step: int
    identity: dict[str, Any]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]


class Checkpoints:
    """The folders ``checkpoint-000100`` of one run."""

    def __init__(self, out: Path, kept: int) -> None:
        """Those in ``out``, of which the last ``kept`` are kept."""
        self._out, self._kept = out, kept

    def latest(self) -> Path | None:
        """The folder of the last checkpoint, or None."""
        found = self._all()
        return found[-1] if found else None

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then drop all but the last ones.

        Raises:
            UserError: it cannot be written; those before are still there.
        """
        target = self._out / f"checkpoint-{checkpoint.step:06d}"
        staging = self._out / f".{target.name}.tmp"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.weights.items()}
            safetensors.torch.save_file(weights, staging / _WEIGHTS)
            torch.save(checkpoint.optimizer, staging / _OPTIMIZER)
            write_json(staging / _STATE, {"step": checkpoint.step, "identity": checkpoint.identity})
            for file in (_WEIGHTS, _OPTIMIZER):
                with (staging / file).open("rb") as written:
                    os.fsync(written.fileno())
            shutil.rmtree(target, ignore_errors=True)
            staging.replace(target)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            shutil.rmtree(staging, ignore_errors=True)
            raise UserError(f"cannot write {target}: {error}") from error
        for old in self._all()[: -self._kept]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def remove(self) -> None:
        """Drop all checkpoints, and what a killed run left of one."""
        for path in [*self._all(), *self._out.glob(".checkpoint-*.tmp")]:
            shutil.rmtree(path, ignore_errors=True)

    def _all(self) -> list[Path]:
        found = [path for path in self._out.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def read_identity(checkpoint: Path) -> dict[str, Any]:
    """The settings that a checkpoint's run was made with."""
    return dict(read_json(checkpoint / _STATE)["identity"])


def load_checkpoint(checkpoint: Path) -> Checkpoint:
    """Read a checkpoint, all tensors to the CPU.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    state = read_json(checkpoint / _STATE)
    try:
        weights = safetensors.torch.load_file(checkpoint / _WEIGHTS)
        optimizer = torch.load(checkpoint / _OPTIMIZER, map_location="cpu", weights_only=True)
    except (OSError, EOFError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{checkpoint} cannot be read ({error}); remove it to go on from the one before, or use --overwrite"
        ) from error
    return Checkpoint(state["step"], state["identity"], weights, optimizer)
