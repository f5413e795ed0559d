"""What a run needs to go on: written beside and renamed, so that a checkpoint is whole or absent.

A checkpoint is a model, too: it holds what the run would leave behind if it ended there, by the same names. No pickle:
weights are safetensors, the optimizer's state is read with ``weights_only``.
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

from smpo_common.errors import UserError
from smpo_common.files import follow_umask, read_json, write_json
from smpo_trainer.model.policy import Policy

_VERSION = 3
_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS, _OPTIMIZER, _STATE = "weights_in_training.safetensors", "optimizer.pt", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run after ``step`` optimizer steps.

    Attributes:
        step: finished optimizer steps.
        identity: the settings that a run which goes on from here must share.
        weights: those in training, by name.
        average: their moving average, by name, which is then the model; None: none is kept.
        optimizer: state dicts of what changes beside the weights (optimizer, schedule, gradient scaler, ...), by name.
    """

    step: int
    identity: dict[str, Any]
    weights: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor] | None
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

    def save(self, checkpoint: Checkpoint, policy: Policy) -> Path:
        """Write a checkpoint of ``policy``, then drop all but the last ones.

        Raises:
            UserError: it cannot be written; those before are still there.
        """
        target = self._out / f"checkpoint-{checkpoint.step:06d}"
        staging = self._out / f".{target.name}.tmp"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            _write(staging, checkpoint, policy)
            shutil.rmtree(target, ignore_errors=True)
            staging.replace(target)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            shutil.rmtree(staging, ignore_errors=True)
            raise UserError(f"cannot write {target}: {error}") from error
        self.drop_all_but(self._kept)
        return target

    def drop_leftovers(self) -> None:
        """Remove what a killed run left of a checkpoint."""
        self.drop_all_but(len(self._all()))

    def drop_all_but(self, kept: int) -> None:
        """Remove all checkpoints but the last ``kept``, and what a killed run left of one."""
        found = self._all()
        for path in [*found[: max(0, len(found) - kept)], *self._out.glob(".checkpoint-*.tmp")]:
            shutil.rmtree(path, ignore_errors=True)

    def _all(self) -> list[Path]:
        found = [path for path in self._out.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _write(folder: Path, checkpoint: Checkpoint, policy: Policy) -> None:
    if checkpoint.average is None:
        policy.save(folder, checkpoint.weights)
    else:
        policy.save(folder, checkpoint.average)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.weights.items()}
        safetensors.torch.save_file(weights, folder / _WEIGHTS)
    torch.save(checkpoint.optimizer, folder / _OPTIMIZER)
    write_json(folder / _STATE, {"version": _VERSION, "step": checkpoint.step, "identity": checkpoint.identity})
    follow_umask(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as written:
                os.fsync(written.fileno())


def read_state(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """A checkpoint's finished steps, and the settings that its run was made with.

    Raises:
        UserError: it is damaged, or of another version of this program.
    """
    state = read_json(checkpoint / _STATE)
    if state.get("version") != _VERSION:
        raise UserError(
            f"{checkpoint} was written by another version of smpo-train; start over with --overwrite, or choose "
            "another --out"
        )
    return state["step"], state["identity"]


def load_checkpoint(checkpoint: Path, policy: Policy) -> Checkpoint:
    """Read a checkpoint of ``policy``, all tensors on the CPU and mapped: processes of a machine share their memory.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    step, identity = read_state(checkpoint)
    try:
        model = policy.read(checkpoint)
        averaged = (checkpoint / _WEIGHTS).is_file()
        weights = safetensors.torch.load_file(checkpoint / _WEIGHTS) if averaged else model
        optimizer = torch.load(checkpoint / _OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, KeyError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{checkpoint} cannot be read ({error}); remove it to go on from the one before, or use --overwrite"
        ) from error
    return Checkpoint(step, identity, weights, model if averaged else None, optimizer)
