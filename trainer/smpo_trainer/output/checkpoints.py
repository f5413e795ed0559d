"""Checkpoints, written to a temporary folder and renamed, so that a checkpoint is complete or absent.

A checkpoint is also a model, with the same files as the result of a run that ends there. It needs no unsafe unpickling:
weights are safetensors, the optimizer state is read with ``weights_only``.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
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
    """The state of a run after ``step`` optimizer steps.

    Attributes:
        step: number of finished optimizer steps.
        identity: settings that a resumed run must share.
        weights: weights in training, by name.
        average: their moving average, by name, which is then the model; None without ``--ema-decay``.
        optimizer: state dicts of optimizer, schedule, gradient scaler, ..., by name.
    """

    step: int
    identity: dict[str, Any]
    weights: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor] | None
    optimizer: dict[str, Any]


class Checkpoints:
    """The folders ``checkpoint-000100``, ... of a run."""

    def __init__(self, out: Path, limit: int, reach: int = 0) -> None:
        """Manage the checkpoints of a run.

        Args:
            out: the run's folder.
            limit: number of checkpoints to keep, the latest ones.
            reach: if not 0, also keep one that has at least this many steps less than the latest one.
        """
        self._out, self._limit, self._reach = out, limit, reach

    def latest(self) -> Path | None:
        """Return the folder of the last checkpoint, or None."""
        folders = self._all()
        return folders[-1] if folders else None

    def before(self, step: int) -> Path | None:
        """Return the folder of the last checkpoint of at most ``step`` steps, else of the first one, else None."""
        folders = self._all()
        early = [folder for folder in folders if _step_of(folder) <= step]
        return next(iter([*early[-1:], *folders]), None)

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of more than ``step`` steps."""
        for folder in reversed(self._all()):
            if _step_of(folder) > step:
                _remove(folder)

    def save(self, checkpoint: Checkpoint, policy: Policy) -> Path:
        """Write a checkpoint of ``policy``, then remove old ones; return its folder.

        Raises:
            UserError: it cannot be written; earlier checkpoints remain.
        """
        target = self._out / f"checkpoint-{checkpoint.step:06d}"
        staging = self._out / f".{target.name}.tmp"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            _write(staging, checkpoint, policy)
            # A folder cannot be replaced at once. After a kill in between, the checkpoint before this one is the last.
            _remove(target)
            staging.replace(target)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            shutil.rmtree(staging, ignore_errors=True)
            raise UserError(f"cannot write {target}: {error}") from error
        self._drop_all_but([*self._all()[-self._limit :], *self._in_reach(checkpoint.step)])
        return target

    def drop_leftovers(self) -> None:
        """Remove incomplete checkpoints of a killed run."""
        self._drop_all_but(self._all())

    def drop_all_but(self, limit: int) -> None:
        """Remove all checkpoints but the last ``limit``, and incomplete ones of a killed run."""
        self._drop_all_but(self._all()[-limit:] if limit else [])

    def _in_reach(self, last: int) -> list[Path]:
        """Return the checkpoint to go back to from step ``last``, and the one that takes its place later."""
        if not self._reach:
            return []
        folders = self._all()
        late = [folder for folder in folders if _step_of(folder) > last - self._reach]
        return [*folders[: -len(late)][-1:], *late[:1]]

    def _drop_all_but(self, kept: Collection[Path]) -> None:
        for folder in self._all():
            if folder not in kept:
                _remove(folder)
        for path in self._out.glob(".checkpoint-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def _all(self) -> list[Path]:
        folders = [path for path in self._out.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(folders, key=_step_of)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, if there is one; after a kill it is whole, or a leftover."""
    leftover = folder.with_name(f".{folder.name}.removed.tmp")
    shutil.rmtree(leftover, ignore_errors=True)
    with suppress(OSError):
        folder.replace(leftover)
    shutil.rmtree(leftover, ignore_errors=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _write(folder: Path, checkpoint: Checkpoint, policy: Policy) -> None:
    if checkpoint.average is None:
        policy.save(folder, checkpoint.weights)
    else:
        policy.save(folder, checkpoint.average)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.weights.items()}
        safetensors.torch.save_file(weights, folder / _WEIGHTS)
    torch.save(checkpoint.optimizer, folder / _OPTIMIZER)
    write_json(folder / _STATE, {"version": _VERSION, "step": checkpoint.step, "identity": checkpoint.identity})
    # safetensors creates files that only the owner may read.
    follow_umask(folder)
    # Flush to disk before the rename: after a power cut, a renamed folder must hold complete files.
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def read_state(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """Read the number of finished steps and the settings of a checkpoint's run.

    Raises:
        UserError: it is damaged, or was written by another version of this program.
    """
    state = read_json(checkpoint / _STATE)
    if not isinstance(state, dict) or state.get("version") != _VERSION or not {"step", "identity"} <= state.keys():
        raise UserError(
            f"{checkpoint} is damaged, or was written by another version of smpo-train; start over with --overwrite, "
            "or choose another --out"
        )
    return state["step"], state["identity"]


def load_checkpoint(checkpoint: Path, policy: Policy) -> Checkpoint:
    """Read a checkpoint of ``policy``.

    Tensors are on the CPU and memory-mapped, so that the processes of a machine share their memory.

    Raises:
        UserError: a file is missing or damaged.
    """
    step, identity = read_state(checkpoint)
    try:
        model = policy.read(checkpoint)
        # With a moving average, the average is the model, and the weights in training have a file of their own.
        has_average = (checkpoint / _WEIGHTS).is_file()
        weights = safetensors.torch.load_file(checkpoint / _WEIGHTS) if has_average else model
        optimizer = torch.load(checkpoint / _OPTIMIZER, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, KeyError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{checkpoint} cannot be read ({error}); delete it to resume from the one before, or start over with "
            "--overwrite"
        ) from error
    return Checkpoint(step, identity, weights, model if has_average else None, optimizer)
